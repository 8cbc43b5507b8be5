"""Choose by the data flags which sources train, validate and test, and find a run's test items again.

A task passes in the functions that read, cut down and describe its rows, so labelled texts (zerotune/tasks/texts.py)
and SQuAD's questions follow the same rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from zerotune.errors import Refused, Unavailable
from zerotune.settings.groups import DataSettings
from zerotune.tasks.split_file import require_same_items, require_unchanged_files
from zerotune.tasks.splits import Splits

# Shares of test and validation rows; None: a slice of train validates.
DRAWN_SHARES = {"80-20": (0.2, None), "70-10-20": (0.2, 0.1), "80-10-10": (0.1, 0.1), "random": (0.2, None)}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A task's published data and its sample.

    Attributes:
        name, title: "sst2", "SST-2".
        splits: the supported split rules: "official" and some of DRAWN_SHARES.
        lone_file_split: the rule if --train-file is the only file.
        split_warnings: a warning for each rule that has one, printed whenever it is used.
        dataset, test_split: hub id (None: the user names one), and the hub split that scores are reported on.
        sample: (number of rows, seed) -> generated rows; sample_train, sample_test: its arguments.
    """

    name: str
    title: str
    splits: tuple[str, ...]
    lone_file_split: str
    split_warnings: Mapping[str, str] = field(default_factory=dict)
    dataset: str | None
    test_split: str
    sample: Callable[[int, int], list | dict]
    sample_train: tuple[int, int]
    sample_test: tuple[int, int]


@dataclass(frozen=True)
class Origin:
    """Where rows come from: a file, a hub split (dataset, split, revision) or a sample (generator, rows, seed).
    `prefix` starts the rows' ids."""

    prefix: str
    path: str | None = None
    hub: tuple[str, str, str | None] | None = None
    sample: tuple[Callable[[int, int], list | dict], int, int] | None = None


# --- which source does what ---


def split_rule(corpus: Corpus, settings: DataSettings) -> str:
    """Return --split, or the default for the given files. Raises Refused for a rule that the task does not support."""
    is_lone_file = settings.train_file and not (settings.validation_file or settings.test_file)
    rule = settings.split or (corpus.lone_file_split if is_lone_file else "official")
    if rule not in corpus.splits:
        raise Refused(f"{corpus.title} has no split {rule!r}; choose {' or '.join(corpus.splits)}")
    return rule


def origins(corpus: Corpus, settings: DataSettings) -> dict[str, Origin]:
    """Return the sources by their use: "train" always; "test" and "validation" unless they are drawn from train; "more"
    for rows that join train before the draw. Raises Refused for flags that contradict each other."""
    validation_file, test_file = settings.validation_file, settings.test_file
    train, rule = train_origin(corpus, settings), split_rule(corpus, settings)
    if rule in ("80-20", "80-10-10", "random"):
        if validation_file or test_file:
            given = validation_file or test_file
            raise Refused(f"--split {rule} draws its test rows from train, but {given} is given too; leave one out")
        return {"train": train}
    published = _published_test(corpus, settings)
    if rule == "70-10-20":
        if validation_file:
            raise Refused(f"--split {rule} draws its validation rows, but {validation_file} is given; leave one out")
        return {"train": train, "more": published} if published else {"train": train}
    if validation_file and test_file:
        return {"train": train, "validation": Origin("validation", path=validation_file), "test": published}
    test = Origin("validation", path=validation_file) if validation_file else published
    if test is None:
        raise Refused(
            "--split official needs rows to report on; give --test-file beside --train-file, or --split "
            f"{corpus.lone_file_split}"
        )
    return {"train": train, "test": test}


def train_origin(corpus: Corpus, settings: DataSettings) -> Origin:
    """Return the origin of the train rows: --sample, --train-file, --dataset or the task's own data set."""
    if settings.sample:
        if settings.dataset or settings.train_file or settings.validation_file or settings.test_file:
            raise Refused("--sample makes its own rows; leave out --sample, or --dataset and the --*-file flags")
        return Origin("train", sample=(corpus.sample, *corpus.sample_train))
    if settings.train_file:
        if settings.dataset:
            raise Refused(f"--train-file and --dataset {settings.dataset} both name the train rows; give one of them")
        return Origin("train", path=settings.train_file)
    return Origin("train", hub=_hub_split(corpus, settings, "train"))


def _published_test(corpus: Corpus, settings: DataSettings) -> Origin | None:
    """Return the origin of the test rows: --test-file, sample or data set; None if --train-file replaces those."""
    if settings.test_file:
        return Origin("test", path=settings.test_file)
    if settings.sample:
        return Origin("test", sample=(corpus.sample, *corpus.sample_test))
    if settings.train_file:
        return None
    return Origin(corpus.test_split, hub=_hub_split(corpus, settings, corpus.test_split))


def _hub_split(corpus: Corpus, settings: DataSettings, split: str) -> tuple[str, str, str | None]:
    dataset = settings.dataset or corpus.dataset
    if dataset is None:
        flags = "--train-file (to evaluate, --test-file), --dataset (a hub id) or --sample"
        raise Unavailable(f"{corpus.title} need rows: give {flags}")
    if ":" in dataset:
        raise Refused(f"--dataset {dataset}: one split can be evaluated, but not trained on; give the id alone")
    return dataset, split, settings.dataset_revision


# --- split.json ---


def split_record(corpus: Corpus, settings: DataSettings, sources: dict, parts: dict, notes: list[str]) -> dict:
    """Return the content of split.json, from the record of each source and the description of each part."""
    return {
        "task": corpus.name,
        "rule": split_rule(corpus, settings),
        "split_seed": settings.split_seed,
        "splits": parts,
        "sources": sources,
        "notes": [*_source_notes(corpus, settings, sources), *notes],
        "settings": asdict(settings),
    }


def _source_notes(corpus: Corpus, settings: DataSettings, sources: dict) -> list[str]:
    """Return notes about a drawn split, a validation or test file without the other, and repeated rows."""
    notes, rule = [], split_rule(corpus, settings)
    if rule in DRAWN_SHARES:
        num_rows = sum(source["rows"] for source in sources.values())
        warning = f": {corpus.split_warnings[rule]}" if rule in corpus.split_warnings else ""
        notes.append(f"{rule} split of {num_rows} rows{warning}")
    elif "train" in sources and bool(settings.validation_file) != bool(settings.test_file):
        given, lacking = ("--validation-file", "--test-file")[:: 1 if settings.validation_file else -1]
        notes.append(f"no {lacking}: {given} is the test, and a slice of train validates")
    for name, source in sources.items():
        counts = source.get("duplicates", 0), source.get("conflicting_texts", 0)
        words = ("rows that repeat another one", "texts that have different labels in different rows")
        found = [f"{count:,} {what}" for count, what in zip(counts, words, strict=True) if count]
        if found:
            notes.append(f"{name} rows as read hold {' and '.join(found)}: they are kept, within one split")
    return notes


# --- test items and train rows for an evaluation ---


def load_test(
    corpus: Corpus,
    settings: DataSettings,
    run_split: dict | None,
    *,
    load: Callable[[DataSettings], Splits],
    read: Callable[[Origin], tuple[list, dict]],
    subset: Callable[[DataSettings, str, list], list],
    describe: Callable[[list], dict],
) -> tuple[list, dict]:
    """Return the items that an eval script scores, and the content of its split.json, whose only part is "test".

    --sample, --dataset, --validation-file, --test-file or --split name them; otherwise they are the test items of the
    run that wrote `run_split`, or else the data set's. `--dataset ID:SPLIT` names a hub split, such as the unlabelled
    stanfordnlp/sst2:test. All items have labels or none has.

    Args:
        run_split: content of the run's split.json.
        load: loads all parts, if the test items are drawn from train.
        read: reads rows and record of a source, with or without labels.
        subset: (settings, part's name, its rows) -> the rows within the part's size and limit.
        describe: split.json's description of a part.
    Raises:
        Refused: bad input, or a source of the run has changed.
    """
    is_drawn = settings.split in DRAWN_SHARES
    is_subset = settings.test_size is not None or settings.limit_eval is not None
    of_run = run_split is not None and not _names_items(settings)
    if of_run:
        names = run_split["sources"]
        require_unchanged_files(run_split, ["test"] if "test" in names else names)
        wanted = _settings_of_run(run_split)
        if settings.glue != wanted.glue:
            raise Refused(
                f"--glue {settings.glue} is not the task of the model's run, whose test items are scored: name other "
                f"items, such as --dataset {corpus.dataset}:{corpus.test_split}"
            )
        seed = settings.split_seed or wanted.split_seed
        if seed != wanted.split_seed and not is_subset:
            raise Refused(
                f"--split-seed {seed} is for drawing a --split or a subset, and all test items of the model's run are "
                "scored: add --limit-eval, or leave it out"
            )
    elif settings.validation_file and settings.test_file and not is_drawn:
        raise Refused("--validation-file and --test-file both name the items that are scored: leave one of them out")
    else:  # --train-file only gives shots, unless the items are drawn from it
        wanted = settings if is_drawn else replace(settings, train_file=None)

    origin = test_origin(corpus, wanted)
    if origin is None:
        splits, source = load(wanted), None
        rows, record = splits.test, splits.record | {"splits": {"test": splits.record["splits"]["test"]}}
    else:
        rows, source = read(origin)
        rows = subset(wanted, "test", rows)
        record = split_record(corpus, wanted, {"test": source}, {"test": describe(rows)}, [])

    if of_run:
        require_same_items(run_split, record)
        if is_subset:
            smaller = replace(wanted, test_size=settings.test_size, limit_eval=settings.limit_eval, split_seed=seed)
            rows = subset(smaller, "test", rows)
            record = record | {"splits": {"test": describe(rows)}, "settings": asdict(smaller)}
    elif run_split is not None and _may_hold_train_rows(record, source, run_split):
        note = "the model was trained on rows of this file or split, so this is not a score on unseen items"
        record = record | {"notes": [*record["notes"], note]}
    return rows, record


def _may_hold_train_rows(record: dict, source: dict | None, run_split: dict) -> bool:
    """Return whether scored rows come from the source that a run was trained on, and are not the run's own test rows.

    Args:
        source: their record; None if they are drawn from train.
    """
    earlier = run_split["sources"]
    trained_on = {earlier[name]["sha256"] for name in ("train", "more") if name in earlier}  # both, where it was drawn
    if source is not None:
        return source["sha256"] in trained_on
    same_draw = (record["rule"], record["split_seed"]) == (run_split.get("rule"), run_split["settings"]["split_seed"])
    return record["sources"]["train"]["sha256"] in trained_on and not same_draw


def rows_for_shots(
    corpus: Corpus,
    settings: DataSettings,
    run_split: dict | None,
    *,
    load: Callable[[DataSettings], Splits],
    read: Callable[[Origin], tuple[list, dict]],
) -> list:
    """Return the rows that shots are drawn from: those of --train-file, else the run's train rows, else the data set's.

    `load` and `read` are as for `load_test`, but `read` refuses rows without labels. Raises Refused as `load_test`."""
    if settings.split in DRAWN_SHARES:
        return load(replace(settings, limit_train=None, limit_eval=None)).train
    names_train = settings.sample or settings.dataset or settings.split or settings.train_file
    if run_split is not None and not names_train:
        require_unchanged_files(run_split, run_split["sources"])
        splits = load(_settings_of_run(run_split))
        require_same_items(run_split, splits.record)
        return splits.train
    dataset = (settings.dataset or "").partition(":")[0] or None
    return read(train_origin(corpus, replace(settings, dataset=dataset)))[0]


def _names_items(settings: DataSettings) -> bool:
    return settings.sample or any((settings.dataset, settings.validation_file, settings.test_file, settings.split))


def test_origin(corpus: Corpus, settings: DataSettings) -> Origin | None:
    """Return where the test items come from; None if they are drawn from train."""
    dataset, colon, split = (settings.dataset or "").partition(":")
    if not colon:
        file, drawn = settings.test_file or settings.validation_file, settings.split in DRAWN_SHARES
        if file and not (drawn or settings.sample or settings.dataset):  # train rows are not needed and may not exist
            return Origin("test" if settings.test_file else "validation", path=file)
        return origins(corpus, settings).get("test")
    if settings.validation_file or settings.test_file:
        raise Refused(f"--dataset {settings.dataset} names the items, and a file is given too: leave one of them out")
    if not (dataset and split):
        raise Refused(f"--dataset {settings.dataset} must be a hub id, or ID:SPLIT; {corpus.dataset}:test is one")
    if settings.split:
        raise Refused(
            f"--dataset {settings.dataset} names the items, and --split {settings.split} draws some: leave one of them "
            "out"
        )
    return Origin(split, hub=(dataset, split, None))


def _settings_of_run(run_split: dict) -> DataSettings:
    """Return the run's settings, with hub data pinned to the commit that the run read."""
    revision = run_split["sources"]["train"].get("revision")
    return replace(DataSettings(**run_split["settings"]), dataset_revision=revision)
