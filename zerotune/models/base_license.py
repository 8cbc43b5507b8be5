"""The base of a tuned model as the model's card names it: its hub id, and the license that the base's card states."""

import os
import re

from zerotune.errors import Refused
from zerotune.models.model_files import find_file, is_hub_id

# The card's section about the license.
LICENSE_HEADING = "## License"

# Where the hub's cache keeps a model: models--ORG--NAME/snapshots/COMMIT.
_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


def hub_id(name: str) -> str | None:
    """Return the hub id of a model named by it or by its folder in the hub's cache; None for other names."""
    if found := _SNAPSHOT.search(os.path.abspath(name)):
        return f"{found['org']}/{found['name']}"
    return name if not os.path.isdir(name) and is_hub_id(name) else None


def base_license(name: str, revision: str | None = None) -> dict[str, str]:
    """Return the license, license_name and license_link that a model's card has; {} without a card or a license.

    Args:
        name: a folder, or a hub id whose card is in the cache or can be fetched.
    """
    try:
        path = find_file(name, "README.md", revision) if os.path.isdir(name) or is_hub_id(name) else None
    except (OSError, Refused):  # no such model, or the hub cannot be asked
        path = None
    if path is None:
        return {}
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        data = metadata_load(path) or {}
    except (ValueError, YAMLError):  # a card whose front matter cannot be read
        return {}
    found = {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}
    link = found.get("license_link")
    if link and "://" not in link:  # a file in the base's own repository
        found.pop("license_link")
        if repository := hub_id(name):
            found["license_link"] = f"https://huggingface.co/{repository}/blob/main/{link.removeprefix('./')}"
    return found if "license" in found else {}
