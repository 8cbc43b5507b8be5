"""Models, data sets and WordNet on the shared disk, for jobs without a network: fetched, hashed, listed, checked.

    bash slurm/prefetch.sh train/sst2.py --model meta-llama/Llama-3.2-1B
    bash slurm/prefetch.sh --model google/gemma-2-2b-it --dataset stanfordnlp/imdb --wordnet
    bash slurm/prefetch.sh --verify

The manifest, zerotune-manifest.json in the cache of Hugging Face's libraries (HF_HOME), holds the commit of each item
and the size and sha256 of each of its files. What it lists keeps its commit until --update.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_json
from zerotune.scores.wordnet import DEBIAN_FOLDER

MANIFEST = "zerotune-manifest.json"
# What transformers and peft read of a repository. Weights in the older .bin form only where there are no others.
MODEL_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Item:
    """Something to be had: kind is model, dataset or wordnet; `revision` is what was asked for, None for the latest."""

    kind: str
    name: str = "3.0"
    revision: str | None = None

    @property
    def flag(self) -> str:
        """How slurm/prefetch.sh is asked for it."""
        if self.kind == "wordnet":
            return "--wordnet"
        return f"--{self.kind} {self.name}" + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" at {self.revision}" if self.revision else "")


def parse_item(kind: str, text: str) -> Item:
    """An item from ID or ID@REVISION."""
    name, _, revision = text.partition("@")
    return Item(kind, name, revision or None)


def cache_root() -> Path:
    """HF_HOME: on the shared disk, the same for login and compute nodes."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def nltk_folder() -> Path:
    """Where WordNet goes: NLTK_DATA of the jobs, else in HF_HOME."""
    return Path(os.environ.get("NLTK_DATA", "").split(os.pathsep)[0] or cache_root() / "nltk_data")


def read_manifest() -> dict[str, dict]:
    """What has been fetched, by item without its revision. Raises Refused where the manifest is damaged."""
    path = cache_root() / MANIFEST
    return read_json(path) if path.exists() else {}


def _key(item: Item) -> str:
    return f"{item.kind} {item.name}"


def dataset_of(task: str, flag: str | None) -> tuple[str | None, str | None]:
    """Hub id and revision of a task's data set, or of --dataset ID[:SPLIT]; no id where it is a folder."""
    from zerotune import imdb, sst2
    from zerotune.data import squad_splits

    own = {"sst2": sst2.ROWS.dataset, "imdb": imdb.ROWS.dataset, "squad": squad_splits.SOURCES.dataset}
    name = (flag or own[task]).partition(":")[0]
    return (None, None) if os.path.isdir(name) else (name, None)


def dataset_of_split(path: Path) -> tuple[str | None, str | None]:
    """Hub id and revision of the rows that a run's split.json records, none where they are files or a sample."""
    sources = read_json(path).get("sources", {})
    for source in sources.values():
        if source.get("dataset"):
            return source["dataset"], source.get("revision")
    return None, None


# --- what is there ---


def missing_items(items: list[Item], whole: bool = False) -> dict[Item, str]:
    """The items that a job would not find, and why. With `whole` the files are hashed too, else only measured."""
    manifest = read_manifest()
    found = {item: _defect(item, manifest.get(_key(item)), whole) for item in items}
    return {item: why for item, why in found.items() if why}


def _defect(item: Item, entry: dict | None, whole: bool) -> str | None:
    if entry is None:
        return None if _is_cached_anyhow(item) else "never fetched"
    if item.revision not in (None, entry["asked"], entry["revision"]):
        return f"fetched at {entry['asked'] or entry['revision']}"
    for name, expected in entry["files"].items():
        path = cache_root() / name
        if not path.exists():
            return f"{path} is gone"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if whole and _sha256(path) != expected["sha256"]:
            return f"{path} has changed since it was fetched"
    return None


def _is_cached_anyhow(item: Item) -> bool:
    """Whether something else than this module has put it there; then nothing is known of its files."""
    from huggingface_hub import constants, try_to_load_from_cache

    if item.kind == "wordnet":
        return (DEBIAN_FOLDER / "data.noun").exists() or any(nltk_folder().glob("corpora/wordnet*"))
    if item.kind == "model":
        names = ("config.json", "adapter_config.json")
        revision = item.revision or "main"
        return any(isinstance(try_to_load_from_cache(item.name, name, revision=revision), str) for name in names)
    root = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    return any(Path(root, item.name.replace("/", "___")).glob("**/*.arrow"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- fetching ---


def fetch(item: Item, update: bool = False) -> dict:
    """Fetch an item and add it to the manifest; returns its entry. What the manifest has keeps its commit.

    Raises:
        Refused: no network, no such repository or revision, or one that is gated.
    """
    entry = read_manifest().get(_key(item))
    pinned = entry["revision"] if entry and not update and item.revision in (None, entry["asked"]) else None
    fetchers = {"model": _fetch_model, "dataset": _fetch_dataset, "wordnet": _fetch_wordnet}
    revision, files = fetchers[item.kind](item, pinned or item.revision)
    root = cache_root()
    described = {
        # not resolved: a snapshot's files are links to blobs that are named after their content
        os.path.relpath(path, root): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(files)
    }
    asked = item.revision if item.revision is not None else (entry or {}).get("asked")
    entry = {"kind": item.kind, "name": item.name, "asked": asked, "revision": revision, "files": described}
    write_json(root / MANIFEST, read_manifest() | {_key(item): entry})
    return entry


def _fetch_model(item: Item, revision: str | None) -> tuple[str, list[Path]]:
    from huggingface_hub import snapshot_download

    with _hub_errors(item):
        folder = Path(snapshot_download(item.name, revision=revision, allow_patterns=MODEL_PATTERNS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(item.name, revision=revision, allow_patterns=[*MODEL_PATTERNS, "*.bin"]))
    return folder.name, [path for path in folder.rglob("*") if path.is_file()]


def _fetch_dataset(item: Item, revision: str | None) -> tuple[str | None, list[Path]]:
    import datasets

    from zerotune.data.sources import cached_commit

    with _hub_errors(item):
        parts = datasets.load_dataset(item.name, revision=revision)
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


class _hub_errors:
    """A context that turns what goes wrong with the hub into one line."""

    def __init__(self, item: Item):
        self.item = item

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or isinstance(error, (Refused, KeyboardInterrupt)):
            return False
        causes, cause = [], error
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        folder = "datasets/" if self.item.kind == "dataset" else ""
        if "GatedRepoError" in causes:
            raise Refused(
                f"{self.item} is gated: accept its terms at https://huggingface.co/{folder}{self.item.name}, then "
                "`hf auth login` (or set HF_TOKEN) and run this again"
            ) from None
        if {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError"} & {*causes}:
            raise Refused(f"{self.item}: no such repository or revision on the hub; check the spelling") from None
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(
            f"{self.item} cannot be fetched ({first_line}): run this where there is a network, without HF_HUB_OFFLINE"
        ) from None
