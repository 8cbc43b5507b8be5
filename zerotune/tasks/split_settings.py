"""Where the rows of a run come from: the flags that decide a split, its sources, and the rebuilding of its items."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import Refused
from zerotune.tasks.files import Source, find_column, read_file, read_hub, require_file_sha256, rows_sha256
from zerotune.tasks.splits import (
    Example,
    balanced_subset,
    count_repeats,
    make_examples,
    require_labels,
    stratified_subset,
)

FILE_FLAGS = ("train_file", "validation_file", "test_file")


@dataclass(frozen=True)
class Settings:
    """The flags that decide the split: with the sources' hashes, all that is needed to rebuild it."""

    sample: bool
    dataset: str | None
    dataset_revision: str | None
    train_file: str | None
    validation_file: str | None
    test_file: str | None
    split: str | None
    split_seed: int
    train_size: int | None
    validation_size: int | None
    test_size: int | None
    limit_train: int | None
    limit_eval: int | None


SETTING_NAMES = frozenset(Settings.__dataclass_fields__)


def settings_of(args: Namespace) -> Settings:
    """The split flags of a script; those it does not have count as not given. File paths are made absolute."""
    given = {name: getattr(args, name, None) for name in SETTING_NAMES}
    for name in FILE_FLAGS:
        given[name] = None if given[name] is None else str(Path(given[name]).absolute())
    return Settings(**{**given, "sample": bool(given["sample"]), "split_seed": given["split_seed"] or 0})


@dataclass(frozen=True)
class Origin:
    """Where rows come from: a file, a hub split, or the sample generator. `prefix` starts their ids."""

    prefix: str
    path: str | None = None
    hub: tuple[str, str, str | None] | None = None  # dataset, split, revision
    sample: tuple[Callable[[int, int], list[tuple[str, int]]], int, int] | None = None  # generator, rows, seed


@dataclass(frozen=True)
class Columns:
    """What a task reads: text and label columns (the first of each that is there), the labels, how a text is mended."""

    text: tuple[str, ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    mend: Callable[[str], str] | None = None

    @property
    def wanted(self) -> str:
        text, label = (f"{' (or '.join(map(repr, names))}{')' * (len(names) - 1)}" for names in (self.text, self.label))
        return f"{text} and {label}"


def read_origin(origin: Origin, columns: Columns, way_out: str | None) -> tuple[list[Example], dict]:
    """(examples, the source's record with its duplicates and conflicts).

    With `way_out` (what to give instead) the rows must be labelled, and those of train hold every label, or Refused."""
    source = _read(origin)
    text_column = find_column(source, columns.text, columns.wanted)
    is_labelled = way_out or any(name in source.columns for name in columns.label)
    label_column = find_column(source, columns.label, columns.wanted) if is_labelled else None
    examples = make_examples(source, origin.prefix, text_column, label_column, columns.labels, columns.mend)
    if way_out:
        require_labels(examples, source.name, columns.labels, way_out, every=origin.prefix == "train")
    return examples, {**source.record, **count_repeats(examples)}


def _read(origin: Origin) -> Source:
    if origin.path:
        return read_file(Path(origin.path))
    if origin.hub:
        return read_hub(*origin.hub)
    generate, num_rows, seed = origin.sample
    rows = [{"text": text, "label": label} for text, label in generate(num_rows, seed)]
    name = f"{generate.__module__}.{generate.__name__}"
    record = {"sample": name, "seed": seed, "sha256": rows_sha256(rows), "rows": len(rows)}
    return Source(f"--sample {origin.prefix} rows", rows, None, record)


def subsets(
    settings: Settings,
    parts: dict[str, list],
    sized: tuple[str, ...],
    balanced: Callable[[list, int, int, str], list] = balanced_subset,
    limited: Callable[[list, int, int, str], list] = stratified_subset,
) -> dict[str, list]:
    """The splits after --*-size (`balanced`; of the splits named in `sized`) and --limit-* (`limited`).

    These come last, so that no limit changes which split a row belongs to."""
    sizes = {
        "train": ("--train-size", settings.train_size, settings.limit_train),
        "choose": ("--validation-size", settings.validation_size, settings.limit_eval),
        "test": ("--test-size", settings.test_size, settings.limit_eval),
    }
    chosen = {}
    for name, examples in parts.items():
        flag, size, limit = sizes[name]
        if size is not None and name in sized:
            examples = balanced(examples, size, settings.split_seed, flag)
        if limit is not None:
            examples = limited(examples, limit, settings.split_seed, f"{name} limit")
        chosen[name] = examples
    return chosen


def require_unchanged_files(run_split: dict, names: tuple[str, ...]) -> None:
    """Raises Refused, naming the file, where one of these sources of a run is a file that is missing or has changed."""
    for name in names:
        source = run_split["sources"].get(name, {})
        if "path" in source:
            require_file_sha256(Path(source["path"]), source["sha256"])


def require_same_items(run_split: dict, record: dict) -> None:
    """Raises Refused where the splits of `record`, rebuilt from a run's split.json, do not hold the run's items."""
    for name, source in record["sources"].items():
        if source["sha256"] != run_split["sources"][name]["sha256"]:
            origin = source.get("path") or source.get("dataset") or source["sample"]
            raise Refused(f"{origin}: its rows are not those the run was split from; name the items by --test-file")
    for name, split in record["splits"].items():
        wanted = run_split["splits"][name]["ids_sha256"]
        if split["ids_sha256"] != wanted:
            raise Refused(
                f"the {name} items rebuilt from split.json are not the run's (hash of ids {split['ids_sha256'][:12]}, "
                f"wanted {wanted[:12]}): the split rule has changed; name the items by --test-file"
            )
