"""What tells the files of a model from another version of them."""

import hashlib
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json

BLOCK = 2**20
# So many blocks of a large file are hashed, evenly spaced: enough to tell another training step, fast enough for 14 GB.
NUM_BLOCKS = 16


def model_identity(name: str, revision: str | None) -> str:
    """The hub commit of a model, or a hash of a folder's files; for an adapter with its base's.

    Files up to 16 MiB count whole, larger ones by 16 blocks of 1 MiB and their size.

    Raises:
        Refused: an adapter does not say to which model it belongs.
    """
    folder = Path(name)
    if not folder.is_dir():
        snapshot = cached_snapshot(name, revision)
        return f"commit {snapshot and snapshot.name}"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(NUM_BLOCKS):
                file.seek(max(block * BLOCK, block * (size - BLOCK) // (NUM_BLOCKS - 1)))
                digest.update(file.read(BLOCK))
    base = adapter_base(folder)
    if base is not None:
        digest.update(model_identity(*base).encode())
    return digest.hexdigest()


def adapter_base(folder: Path) -> tuple[str, str | None] | None:
    """Name or folder, and hub revision, of the model that an adapter belongs to; None for a folder without an adapter.

    Raises:
        Refused: adapter_config.json is damaged or names no model.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    described = read_json(path)
    base = described.get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise Refused(f"{path} has base_model_name_or_path {base!r}: wanted the model that the adapter was trained on")
    return base, described.get("revision")


def is_hub_id(name: str) -> bool:
    """Whether a model or data set can be called so on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model's cached files, named after their commit; None where none is cached."""
    from huggingface_hub import try_to_load_from_cache

    for filename in ("config.json", "adapter_config.json") if is_hub_id(name) else ():
        path = try_to_load_from_cache(name, filename, revision=revision or "main")
        if isinstance(path, str):
            return Path(path).parent
    return None
