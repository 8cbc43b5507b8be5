"""Read the rows of a data set of the Hugging Face hub."""

import os
import re
from pathlib import Path

from zerotune.errors import Refused, Unavailable, first_line
from zerotune.models.model_files import missing_folder, no_hub
from zerotune.run.hub_connection import stay_offline_without_network
from zerotune.tasks.files import Source, Table, rows_sha256


def read_hub(dataset: str, split: str, revision: str | None = None) -> Source:
    """Read one split of a hub data set. A ClassLabel becomes its name, or None if the row is unlabelled (-1).

    Args:
        dataset: an id, ORG/NAME/CONFIGURATION for one of several configurations, or a folder.

    Needs the network only if the data set is not in the local cache.

    Raises:
        Unavailable: the data set is gated, or neither in the cache nor to be reached.
        Refused: there is no such data set or split, or it cannot be used.
    """
    stay_offline_without_network()
    import datasets
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    transport_error = HfHubHTTPError.__bases__[0]  # HTTPError of httpx or httpx2, whichever huggingface_hub uses
    give_file = "or give files of your own with --train-file and --test-file"
    at = f" at revision {revision}" if revision else ""
    hub_id, configuration = id_and_configuration(dataset)
    try:
        table = datasets.load_dataset(hub_id, configuration, split=split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        if refusal := missing_folder(dataset, "--dataset", most_parts=3):
            raise refusal from None
        if isinstance(error.__cause__, GatedRepoError) or "gated" in str(error):
            raise Unavailable(
                f"{dataset} is gated: accept its terms at https://huggingface.co/datasets/{hub_id}, then log in with "
                f"`hf auth login` (or set HF_TOKEN), {give_file}"
            ) from None
        raise Refused(
            f"{dataset}: no such data set on the hub{at}; check the id, log in with `hf auth login` if it is private, "
            f"{give_file}"
        ) from None
    except ConnectionError:
        raise missing_folder(dataset, "--dataset", most_parts=3) or Unavailable(
            f"{dataset}{at} is not in the local cache and {no_hub()}; load it once on a machine with network "
            f"and the same HF_HOME, {give_file}"
        ) from None
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError, transport_error) as error:
        draw = ", or draw the rows from train with --split" if "Unknown split" in str(error) else ""
        raise Refused(
            f"{dataset}, split {split!r}{at}: cannot be loaded ({first_line(error)}); {give_file}{draw}"
        ) from None
    rows = _hub_rows(table)
    if not rows:
        raise Refused(f"{dataset}, split {split!r}{at}: holds no rows; {give_file}")
    record = {
        "dataset": dataset,
        "split": split,
        "revision": revision or cached_commit(table),
        "fingerprint": table._fingerprint,
        "sha256": rows_sha256(rows),
        "rows": len(rows),
    }
    return Source(f"{dataset}[{split}]", rows, None, record, _class_names(table))


def id_and_configuration(dataset: str) -> tuple[str, str | None]:
    """Return ("org/name", "configuration") for org/name/configuration, (dataset, None) for an id or a folder."""
    parts = dataset.split("/")
    if len(parts) != 3 or os.path.isdir(dataset):
        return dataset, None
    return "/".join(parts[:2]), parts[2]


def _class_names(table) -> dict[str, tuple[str, ...]]:
    """Return the class names of each column that holds class numbers or lists of them."""
    from datasets import ClassLabel

    classes = {name: getattr(each, "feature", each) for name, each in table.features.items()}
    return {name: tuple(each.names) for name, each in classes.items() if isinstance(each, ClassLabel) and each.names}


def _hub_rows(table) -> Table:
    columns = table.to_dict()
    for name, classes in _class_names(table).items():
        columns[name] = [_named(value, classes) for value in columns[name]]
    return Table(columns)


def _named(value: int | list[int] | None, classes: tuple[str, ...]) -> str | list | None:
    if isinstance(value, list):
        return [_named(each, classes) for each in value]
    return None if value in (None, -1) else classes[value]


def cached_commit(table) -> str | None:
    """Return the hub commit of a data set, from the name of its cache folder; None if that is something else."""
    for entry in table.cache_files:
        name = Path(entry["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", name):
            return name
    return None
