"""Models, data sets and WordNet on the shared disk, for jobs without a network: fetched, hashed, listed, checked.

    bash slurm/prefetch.sh train/sst2.py --model meta-llama/Llama-3.2-1B
    bash slurm/prefetch.sh --model google/gemma-2-2b-it --dataset stanfordnlp/imdb --wordnet
    bash slurm/prefetch.sh --verify

The manifest, zerotune-manifest.json in the cache of Hugging Face's libraries (HF_HOME), holds the commit of each item
and the size and sha256 of each of its files. Listed items keep their commit until --update.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from zerotune.errors import Refused, first_line
from zerotune.files import file_record, file_sha256, hold_lock, read_json, write_json, write_text
from zerotune.metrics.wordnet import DEBIAN_FOLDER
from zerotune.models.model_files import WeightIndex, cached_snapshot
from zerotune.records import FileRecord
from zerotune.run.run_files import SplitRecord
from zerotune.settings.names import DATASETS
from zerotune.tasks.hub import cached_commit, id_and_configuration

MANIFEST = "zerotune-manifest.json"
# Files that transformers and peft read from a repository, and its card, which has the license. Weights in the older
# .bin form are fetched only if there are no others.
MODEL_PATTERNS = ["README.md", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Mistral's own form of the same weights, which is just as large.
UNREAD = ["consolidated*"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
# The revision if none is asked for.
LATEST = "main"


@dataclass(frozen=True)
class Item:
    """An item to fetch: `kind` is model, dataset or wordnet, `revision` the one asked for, None for the latest."""

    kind: str
    name: str = "3.0"
    revision: str | None = None

    @property
    def flag(self) -> str:
        """The flag with which slurm/prefetch.sh fetches it."""
        if self.kind == "wordnet":
            return "--wordnet"
        return f"--{self.kind} {self.name}" + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" at {self.revision}" if self.revision else "")


class Entry(TypedDict):
    """An item of the manifest; `asked` is the revision that was asked for, None for the latest."""

    kind: Literal["model", "dataset", "wordnet"]
    name: str
    asked: str | None
    revision: str | None
    files: dict[str, FileRecord]


def parse_item(kind: str, text: str) -> Item:
    """Return the item of ID or ID@REVISION."""
    name, _, revision = text.partition("@")
    return Item(kind, name, revision or None)


def cache_root() -> Path:
    """Return HF_HOME: on the shared disk, the same for login and compute nodes."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def nltk_folder() -> Path:
    """Return WordNet's folder: the first of the jobs' NLTK_DATA, else nltk_data in HF_HOME."""
    return Path(os.environ.get("NLTK_DATA", "").split(os.pathsep)[0] or cache_root() / "nltk_data")


def read_manifest() -> dict[str, Entry]:
    """Return the manifest's entries by item. Raises Refused where the manifest is damaged."""
    path = cache_root() / MANIFEST
    return read_json(path, dict[str, Entry], "delete it and fetch again") if path.exists() else {}


def listed_items() -> list[Item]:
    """Return all items of the manifest. Raises Refused like `read_manifest`."""
    return [Item(entry["kind"], entry["name"], entry["asked"]) for entry in read_manifest().values()]


def dataset_of(task: str, flag: str | None) -> tuple[str | None, str | None]:
    """Return hub id and revision of --dataset ID[:SPLIT], else of the task's own data set.

    (None, None) for a folder, and for a task without a data set of its own.
    """
    name = (flag or DATASETS.get(task) or "").partition(":")[0]
    return (None, None) if not name or os.path.isdir(name) else (name, None)


def dataset_of_split(path: Path) -> tuple[str | None, str | None]:
    """Return hub id and revision of a run's rows by its split.json; (None, None) for rows of files or a sample."""
    sources = read_json(path, SplitRecord).get("sources", {})
    for source in sources.values():
        if source.get("dataset"):
            return source["dataset"], source.get("revision")
    return None, None


# --- what is there ---


def missing_items(items: list[Item], whole: bool = False) -> dict[Item, str]:
    """Return the items that a job would not find, and why. With `whole` files are hashed, else only measured."""
    manifest = read_manifest()
    found = {item: _defect(item, _entry(manifest, item), whole) for item in items}
    return {item: why for item, why in found.items() if why}


def _entry(manifest: dict[str, Entry], item: Item) -> Entry | None:
    """Return an item's entry in the manifest, listed for the same revision or at the commit that is asked for now."""
    same = [entry for entry in manifest.values() if (entry["kind"], entry["name"]) == (item.kind, item.name)]
    return next((entry for entry in same if _wants(item, entry)), None)


def _wants(item: Item, entry: dict) -> bool:
    return (item.revision or LATEST) == (entry["asked"] or LATEST) or item.revision == entry["revision"]


def _defect(item: Item, entry: dict | None, whole: bool) -> str | None:
    if entry is None:
        return _not_cached_anyhow(item)
    if item.kind == "model":
        found = cached_snapshot(item.name, item.revision)
        if found is not None and found.name != entry["revision"]:
            return f"{item.revision or LATEST} was {entry['revision'][:12]} when fetched and is {found.name[:12]} now"
    for name, expected in entry["files"].items():
        path = cache_root() / name
        if not path.exists():
            return f"{path} is gone"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if whole and file_sha256(path) != expected["sha256"]:
            return f"{path} has changed since it was fetched"
    return None


def _not_cached_anyhow(item: Item) -> str | None:
    """Return why a job would not find an unlisted item; None if something other than this module fetched it."""
    from huggingface_hub import constants

    if item.kind == "model":
        folder = cached_snapshot(item.name, item.revision)
        if folder is not None:
            return None if _has_weights(folder) else "without its weights"
        is_path = Path(item.name).parent != Path(".") and Path(item.name).parent.is_dir()
        return "no such folder, and never fetched" if is_path else "never fetched"
    if item.kind == "wordnet":
        found = (DEBIAN_FOLDER / "data.noun").exists() or any(nltk_folder().glob("corpora/wordnet*"))
    else:
        root = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
        name, configuration = id_and_configuration(item.name)
        found = any(Path(root, name.replace("/", "___"), configuration or "").glob("**/*.arrow"))
    return None if found else "never fetched"


def _has_weights(snapshot: Path) -> bool:
    """Return whether a model's weights are there, in one file or in all that its index names."""
    if any((snapshot / name).exists() for name in WEIGHT_FILES):
        return True
    indices = [path for name in WEIGHT_FILES if (path := snapshot / f"{name}.index.json").exists()]
    return any(
        all(
            (snapshot / part).exists() for part in read_json(path, WeightIndex, "fetch it again")["weight_map"].values()
        )
        for path in indices
    )


# --- fetching ---


def fetch(item: Item, update: bool = False) -> dict:
    """Fetch an item and add it to the manifest; return its entry. A listed item keeps its commit unless `update`.

    Raises:
        Refused: no network, no such repository or revision, or one that is gated.
    """
    entry = _entry(read_manifest(), item)
    pinned = entry["revision"] if entry and not update else None
    fetchers = {"model": _fetch_model, "dataset": _fetch_dataset, "wordnet": _fetch_wordnet}
    revision, files = fetchers[item.kind](item, pinned or item.revision)
    root = cache_root()
    # not resolved: a snapshot's files are links to blobs that are named after their content
    described = {os.path.relpath(path, root): file_record(path) for path in sorted(files)}
    entry = {"kind": item.kind, "name": item.name, "asked": item.revision, "revision": revision, "files": described}
    with hold_lock(root / f".{MANIFEST}.lock"):  # others may fetch at the same time
        write_json(root / MANIFEST, read_manifest() | {str(item): entry})
    return entry


def _fetch_model(item: Item, revision: str | None) -> tuple[str, list[Path]]:
    from huggingface_hub import snapshot_download

    def download(patterns: list[str]) -> Path:
        found = snapshot_download(item.name, revision=revision, allow_patterns=patterns, ignore_patterns=UNREAD)
        return Path(found)

    with _hub_errors(item):
        folder = download(MODEL_PATTERNS)
        if not any(folder.glob("*.safetensors")):
            folder = download([*MODEL_PATTERNS, "*.bin"])
    _point_at(folder, item.revision or LATEST)
    return folder.name, [path for path in folder.rglob("*") if path.is_file()]


def _point_at(snapshot: Path, revision: str) -> None:
    """Point a branch or tag of the cache at this commit, even if something else has moved it since."""
    if revision != snapshot.name:
        reference = snapshot.parent.parent / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, snapshot.name)


def _fetch_dataset(item: Item, revision: str | None) -> tuple[str | None, list[Path]]:
    import datasets

    with _hub_errors(item):
        parts = datasets.load_dataset(*id_and_configuration(item.name), revision=revision)
    files = {Path(file["filename"]) for table in parts.values() for file in table.cache_files}
    files |= {folder / "dataset_info.json" for folder in {file.parent for file in files}}
    commits = {cached_commit(table) for table in parts.values()}
    return revision if commits == {None} else commits.pop(), [path for path in files if path.exists()]


def _fetch_wordnet(item: Item, revision: str | None) -> tuple[str, list[Path]]:
    target = nltk_folder() / "corpora" / "wordnet"
    if (DEBIAN_FOLDER / "data.noun").exists():
        target.mkdir(parents=True, exist_ok=True)
        for source in [*DEBIAN_FOLDER.glob("data.*"), *DEBIAN_FOLDER.glob("index.*"), *DEBIAN_FOLDER.glob("*.exc")]:
            shutil.copyfile(source, target / source.name)
    else:
        import nltk

        if not nltk.download("wordnet", download_dir=str(nltk_folder()), quiet=True):
            raise Refused(
                "WordNet cannot be fetched: install Debian's wordnet-base on this node, or run prefetch where there is "
                "a network"
            )
    return item.name, [path for path in (nltk_folder() / "corpora").rglob("*") if path.is_file()]


@contextlib.contextmanager
def _hub_errors(item: Item):
    """Turn the hub's errors inside the block into refusals of one line."""
    try:
        yield
    except Exception as error:
        raise Refused(_what_went_wrong(item, error)) from None


def _what_went_wrong(item: Item, error: Exception) -> str:
    causes, cause = set(), error
    while cause is not None:
        causes.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    page = f"datasets/{id_and_configuration(item.name)[0]}" if item.kind == "dataset" else item.name
    if "GatedRepoError" in causes:
        return (
            f"{item} is gated: accept its terms at https://huggingface.co/{page}, then `hf auth login` of "
            "this environment (or set HF_TOKEN) and run this again"
        )
    if causes & {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError"}:
        return f"{item}: no such repository or revision on the hub; check the spelling"
    return f"{item} cannot be fetched ({first_line(error)}): run this where there is a network, without HF_HUB_OFFLINE"
