"""split.json read back: its form, and whether the sources and items of a run are still those that it describes."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NotRequired, Required

from annotated_types import Ge
from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.files import json_sha256, read_json
from zerotune.records import Count
from zerotune.settings.groups import DataSettings
from zerotune.tasks.files import require_file_sha256


class SourceRecord(TypedDict):
    """split.json's entry for a source of rows: a file, a hub data set or a sample."""

    sha256: str
    rows: NotRequired[Count]
    path: NotRequired[str]
    dataset: NotRequired[str]
    sample: NotRequired[str]
    revision: NotRequired[str | None]


class PartRecord(TypedDict):
    """split.json's entry for a part."""

    count: Count
    labels: NotRequired[dict[str, Count] | None]
    ids_sha256: str


class SplitRecord(TypedDict, total=False):
    """split.json of a run or of an evaluation, as far as every one has it."""

    task: str
    rule: str
    splits: dict[str, PartRecord]
    sources: dict[str, SourceRecord]
    notes: list[str]
    removed_rows: dict[str, Count]


class _TrainSource(TypedDict, extra_items=SourceRecord):
    train: SourceRecord


_SIZES = ("train_size", "validation_size", "test_size", "limit_train", "limit_eval")
_SETTINGS = DataSettings.__annotations__ | dict.fromkeys(_SIZES, Annotated[int, Ge(1)] | None)


class RunSplit(SplitRecord):
    """split.json of a run: all that rebuilds its parts."""

    splits: Required[dict[str, PartRecord]]
    sources: Required[_TrainSource]
    settings: Required[TypedDict("SettingsRecord", _SETTINGS, closed=True)]


def reporting_sha256(record: dict) -> str:
    """Return a hash of the source of the test items, or of all sources where they are drawn from several."""
    hashes = {name: source["sha256"] for name, source in record["sources"].items()}
    if "test" in hashes:
        return hashes["test"]
    return hashes["train"] if len(hashes) == 1 else json_sha256(hashes)


def split_of_run(model: str, task: str) -> dict | None:
    """Return split.json of the run whose final/ this model is; None where it is of another task or of no run."""
    path = Path(model).resolve().parent / "split.json"
    if not (os.path.exists(Path(model) / "task.json") and path.exists()):
        return None
    record = read_split(path)
    return record if record.get("task") == task else None


def read_split(path: Path) -> dict:
    """Return the content of a run's split.json, from which its parts can be rebuilt. Raises Refused: it is damaged."""
    return read_json(path, RunSplit, "restore it, or give --test-file")


def require_unchanged_files(run_split: dict, names: Iterable[str]) -> None:
    """Raise Refused, naming the file, where one of these sources of a run is a file that is missing or has changed."""
    for name in names:
        source = run_split["sources"].get(name, {})
        if "path" in source:
            require_file_sha256(Path(source["path"]), source["sha256"])


def require_same_items(run_split: dict, record: dict) -> None:
    """Raise Refused where the rebuilt parts that `record` describes are not the run's."""
    for name, source in record["sources"].items():
        if source["sha256"] != run_split["sources"].get(name, {}).get("sha256"):
            origin = source.get("path") or source.get("dataset") or source["sample"]
            raise Refused(f"{origin}: its rows are not those the run was split from; name the items by --test-file")
    for name, part in record["splits"].items():
        wanted = run_split["splits"].get(name, {}).get("ids_sha256", "none")
        if part["ids_sha256"] != wanted:
            raise Refused(
                f"the {name} items rebuilt from split.json are not the run's (hash of ids {part['ids_sha256'][:12]}, "
                f"wanted {wanted[:12]}): the split rule has changed; name the items by --test-file"
            )
