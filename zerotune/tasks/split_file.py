"""Read split.json, and check that the sources and items of a run are still those that it describes."""

import os
from collections.abc import Iterable
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import json_sha256
from zerotune.run.run_files import check_run_files, read_split
from zerotune.tasks.files import require_file_sha256


def reporting_sha256(record: dict) -> str:
    """Return a hash of the source of the test items, or of all sources if they are drawn from several."""
    hashes = {name: source["sha256"] for name, source in record["sources"].items()}
    if "test" in hashes:
        return hashes["test"]
    return hashes["train"] if len(hashes) == 1 else json_sha256(hashes)


def split_of_run(model: str, task: str) -> dict | None:
    """Return split.json of the run whose final/ this model is; None for another task or a model of no run."""
    run = run_of_final(model)
    if run is None:
        return None
    if (run / "run.json").exists():
        check_run_files(run)
    record = read_split(run / "split.json")
    return record if record.get("task") == task else None


def run_of_final(model: str) -> Path | None:
    """Return the folder of the run whose final/ this model is; None for any other model. Links are followed."""
    if not os.path.exists(Path(model) / "task.json"):
        return None
    places = (Path(os.path.abspath(model)).parent, Path(model).resolve().parent)
    return next((place for place in places if (place / "split.json").exists()), None)


def require_unchanged_files(run_split: dict, names: Iterable[str]) -> None:
    """Raise Refused, naming the file, if one of these sources of a run is a file that is missing or has changed."""
    for name in names:
        source = run_split["sources"].get(name, {})
        if "path" in source:
            require_file_sha256(Path(source["path"]), source["sha256"])


def require_same_items(run_split: dict, record: dict) -> None:
    """Raise Refused if the rebuilt sources and parts that `record` describes are not the run's."""
    for name, source in record["sources"].items():
        if source["sha256"] != run_split["sources"].get(name, {}).get("sha256"):
            origin = source.get("path") or source.get("dataset") or source["sample"]
            raise Refused(f"{origin}: its rows are not those the run was split from; name the items with --test-file")
    for name, part in record["splits"].items():
        wanted = run_split["splits"].get(name, {}).get("ids_sha256", "none")
        if part["ids_sha256"] != wanted:
            raise Refused(
                f"the {name} items rebuilt from split.json are not the run's (hash of ids {part['ids_sha256'][:12]}, "
                f"wanted {wanted[:12]}): the split rule has changed; name the items with --test-file"
            )
