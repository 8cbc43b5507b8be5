"""From a task's sources to the rows that train, choose and report: by one set of rules."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from zerotune.errors import Refused
from zerotune.split_settings import (
    Columns,
    Origin,
    Settings,
    read_origin,
    require_same_items,
    require_unchanged_files,
    settings_of,
    subsets,
)
from zerotune.splits import (
    Example,
    Splits,
    describe,
    require_labels,
    stratified_split,
    without_texts_of,
)

# Shares of the rows that report and that choose; None: a slice of train chooses.
DRAWN_SHARES = {"80-20": (0.2, None), "70-10-20": (0.2, 0.1)}


@dataclass(frozen=True)
class TaskRows:
    """What a task's rows are and how they are split.

    Attributes:
        task, title: "sst2", "SST-2".
        rules: the splits that it has, of official, 80-20 and 70-10-20.
        lone_file_rule: the split of a --train-file that stands alone.
        dataset, reporting: the hub id, and its split that reports.
        sample: (rows, seed) -> (text, label) pairs, and (rows, seed) of train and of test.
        draw_choosing: (train, seed, balanced size or None) -> rest of train, choosing slice, what to say of it.
        drawn_note: what is said of a split that is drawn from the rows.
    """

    task: str
    title: str
    columns: Columns
    rules: tuple[str, ...]
    lone_file_rule: str
    dataset: str
    reporting: str
    sample: Callable[[int, int], list[tuple[str, int]]]
    sample_train: tuple[int, int]
    sample_test: tuple[int, int]
    draw_choosing: Callable[[list[Example], int, int | None], tuple[list[Example], list[Example], str]]
    drawn_note: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in label order."""
        return self.columns.labels

    @property
    def give_labels(self) -> str:
        """The way out for rows that are not labelled as they must be."""
        numbered = " and ".join(f"{index} ({name})" for index, name in enumerate(self.labels))
        return f"give rows with a label column of {numbered}"

    @property
    def predict_instead(self) -> str:
        """The way out for a run whose test rows have no labels."""
        return f"a run reports on labelled rows; predict these with eval/{self.task}.py --test-file"


def load_splits(task: TaskRows, args: Namespace) -> Splits:
    """The rows that train, choose and report, by the flags in `Settings`.

    official: the data set's own split (or --test-file, or a lone --validation-file) reports, and a slice of train
    chooses, unless a validation file stands beside a test file. 80-20: a fifth of train reports. 70-10-20: a fifth of
    all rows that are given reports and a tenth chooses. Raises Refused for bad input or flags."""
    return _load(task, settings_of(args))


def load_test(task: TaskRows, args: Namespace, run_split: dict | None) -> tuple[list[Example], dict]:
    """The items that an eval script scores, and their record: as `Splits.record`, of the test split alone.

    --sample, --dataset, --validation-file, --test-file or --split name them; else they are the test items of the run
    that wrote `run_split` (the content of split.json); else the hub's split that reports. `--dataset ID:SPLIT` names a
    hub split, such as the unlabelled stanfordnlp/sst2:test. Either all labels are None or none is. Raises Refused for
    bad input, and where a source of the run has changed."""
    settings = settings_of(args)
    if run_split is None or _names_items(settings):
        if settings.split not in DRAWN_SHARES:
            settings = replace(settings, train_file=None)  # in an eval script it only says where shots come from
        return _test_items(task, settings)
    return _test_items_of_run(task, run_split, settings)


def load_shots_source(task: TaskRows, args: Namespace, run_split: dict | None, test: list[Example]) -> list[Example]:
    """Labelled rows to draw few-shot examples from: --train-file, else the run's train rows, else the data set's.

    No row with the text of one of `test` is among them. Raises Refused for bad input."""
    settings = settings_of(args)
    names_train = settings.sample or settings.dataset or settings.split
    if settings.split in DRAWN_SHARES:
        train = _load(task, replace(settings, limit_train=None, limit_eval=None)).train
    elif run_split is not None and not settings.train_file and not names_train:
        train = _train_of_run(task, run_split)
    else:
        dataset = (settings.dataset or "").partition(":")[0] or None
        train, _ = read_origin(_train_origin(task, replace(settings, dataset=dataset)), task.columns, task.give_labels)
    shots = without_texts_of(train, test)
    require_labels(shots, "shots", task.labels, "give labelled rows that are not test items by --train-file")
    return shots


# --- which source does what ---


def _rule(task: TaskRows, settings: Settings) -> str:
    train_file_alone = settings.train_file and not (settings.validation_file or settings.test_file)
    rule = settings.split or (task.lone_file_rule if train_file_alone else "official")
    if rule not in task.rules:
        raise Refused(f"{task.title} has no split {rule!r}; choose {' or '.join(task.rules)}")
    return rule


def _origins(task: TaskRows, settings: Settings) -> dict[str, Origin]:
    """The sources by what they do: "train" always, "test", "choose" where they are not drawn; "more" to draw from."""
    validation_file, test_file = settings.validation_file, settings.test_file
    train, rule = _train_origin(task, settings), _rule(task, settings)
    if rule == "80-20":
        if validation_file or test_file:
            given = validation_file or test_file
            raise Refused(f"--split 80-20 draws its test rows from train, but {given} is given too; leave one out")
        return {"train": train}
    if rule == "70-10-20":
        if validation_file:
            raise Refused(f"--split 70-10-20 draws the rows that choose, but {validation_file} is given; leave one out")
        more = _reporting_origin(task, settings)
        return {"train": train, "more": more} if more else {"train": train}
    if validation_file and test_file:
        return {
            "train": train,
            "choose": Origin("validation", path=validation_file),
            "test": Origin("test", path=test_file),
        }
    test = Origin("validation", path=validation_file) if validation_file else _reporting_origin(task, settings)
    if test is None:
        drawn = task.lone_file_rule
        raise Refused(
            f"--split official wants rows that report; give --test-file beside --train-file, or --split {drawn}"
        )
    return {"train": train, "test": test}


def _reporting_origin(task: TaskRows, settings: Settings) -> Origin | None:
    """The rows that the data set has for reporting; None where a train file stands alone."""
    if settings.test_file:
        return Origin("test", path=settings.test_file)
    if settings.sample:
        return Origin("test", sample=(task.sample, *task.sample_test))
    if settings.train_file:
        return None
    return Origin(task.reporting, hub=_hub(task, settings, task.reporting))


def _train_origin(task: TaskRows, settings: Settings) -> Origin:
    if settings.sample:
        if settings.dataset or settings.train_file or settings.validation_file or settings.test_file:
            raise Refused("--sample makes its own rows; leave out --sample, or --dataset and the --*-file flags")
        return Origin("train", sample=(task.sample, *task.sample_train))
    if settings.train_file:
        if settings.dataset:
            raise Refused(f"--train-file and --dataset {settings.dataset} both name the train rows; give one of them")
        return Origin("train", path=settings.train_file)
    return Origin("train", hub=_hub(task, settings, "train"))


def _hub(task: TaskRows, settings: Settings, split: str) -> tuple[str, str, str | None]:
    dataset = settings.dataset or task.dataset
    if ":" in dataset:
        raise Refused(f"--dataset {dataset}: one split can be evaluated, but not trained on; give the id alone")
    return dataset, split, settings.dataset_revision


# --- the splits ---


def _load(task: TaskRows, settings: Settings) -> Splits:
    rows, sources = {}, {}
    for name, origin in _origins(task, settings).items():
        way_out = task.predict_instead if name == "test" else task.give_labels
        rows[name], sources[name] = read_origin(origin, task.columns, way_out)
    notes = _source_notes(task, settings, sources)
    train, seed, removed = rows["train"] + rows.pop("more", []), settings.split_seed, {}
    num_rows, (test_share, choose_share) = len(train), DRAWN_SHARES.get(_rule(task, settings), (None, None))
    if test_share:
        train, rows["test"] = stratified_split(train, test_share, seed, "test")
        require_labels(rows["test"], "test split (a fifth of the rows)", task.labels, "give more rows", every=False)
    train, removed["train_rows_in_test"] = _without(train, rows["test"])
    left = f"train, less {removed['train_rows_in_test']} rows that stand in test"
    require_labels(train, left, task.labels, task.give_labels)
    sized = ("train", "choose", "test")
    if "choose" in rows or choose_share:
        if choose_share:
            train, rows["choose"] = stratified_split(train, choose_share * num_rows / len(train), seed, "choose")
        choose, removed["choose_rows_in_test"] = _without(rows["choose"], rows["test"])
        left = f"choosing split, less {removed['choose_rows_in_test']} rows that stand in test"
        require_labels(choose, left, task.labels, task.give_labels, every=False)
        train, removed["train_rows_in_choose"] = _without(train, choose)
    else:
        num_before = len(train)
        train, choose, note = task.draw_choosing(train, seed, settings.validation_size)
        removed["train_rows_in_choose"] = num_before - len(train) - len(choose)
        notes.append(note)
        sized = ("train", "test")
    notes += _removal_notes(removed)
    parts = subsets(settings, {"train": train, "choose": choose, "test": rows["test"]}, sized)
    require_labels(parts["train"], "what is left to train on", task.labels, "give more rows, or raise --limit-train")
    require_labels(
        parts["choose"], "choosing split", task.labels, "give more rows, or a --validation-file", every=False
    )
    return Splits(**parts, record=_record(task, settings, sources, parts, notes) | {"removed_rows": removed})


def _without(examples: list[Example], others: list[Example]) -> tuple[list[Example], int]:
    kept = without_texts_of(examples, others)
    return kept, len(examples) - len(kept)


def _source_notes(task: TaskRows, settings: Settings, sources: dict) -> list[str]:
    notes = []
    if _rule(task, settings) in DRAWN_SHARES:
        num_rows = sum(source["rows"] for source in sources.values())
        warning = f": {task.drawn_note}" if task.drawn_note else ""
        notes.append(f"{_rule(task, settings)} split of {num_rows} rows{warning}")
    elif "train" in sources and bool(settings.validation_file) != bool(settings.test_file):
        flag = "--validation-file" if settings.validation_file else "--test-file"
        notes.append(f"only {flag} is given: it reports, and a slice of train chooses")
    for name, source in sources.items():
        counts = source["duplicates"], source["conflicting_texts"]
        if any(counts):
            notes.append(f"{name} source: {counts[0]} duplicate rows, {counts[1]} texts with both labels")
    return notes


def _removal_notes(removed: dict) -> list[str]:
    said = {
        "train_rows_in_test": "train rows that stand in test left train",
        "choose_rows_in_test": "rows of the validation file that stand in test do not choose",
        "train_rows_in_choose": "train rows that stand in the rows that choose left train",
    }
    return [f"{removed[name]} {words}" for name, words in said.items() if removed.get(name)]


def _record(task: TaskRows, settings: Settings, sources: dict, parts: dict, notes: list[str]) -> dict:
    return {
        "task": task.task,
        "rule": _rule(task, settings),
        "split_seed": settings.split_seed,
        "splits": {name: describe(examples, task.labels) for name, examples in parts.items()},
        "sources": sources,
        "notes": notes,
        "settings": asdict(settings),
    }


# --- test items alone, and those of a run ---


def _names_items(settings: Settings) -> bool:
    return settings.sample or any((settings.dataset, settings.validation_file, settings.test_file, settings.split))


def _test_items(task: TaskRows, settings: Settings) -> tuple[list[Example], dict]:
    """The test split alone. Train is read only where the test rows are drawn from it."""
    dataset, colon, split = (settings.dataset or "").partition(":")
    if colon and not (dataset and split):
        raise Refused(f"--dataset {settings.dataset} must be a hub id, or ID:SPLIT; {task.dataset}:test is one")
    origins = {"test": Origin(split, hub=(dataset, split, None))} if colon else _origins(task, settings)
    if "test" not in origins:
        splits = _load(task, settings)
        return splits.test, splits.record | {"splits": {"test": splits.record["splits"]["test"]}}
    examples, source = read_origin(origins["test"], task.columns, None)
    parts = subsets(settings, {"test": examples}, ("test",))
    sources = {"test": source}
    return parts["test"], _record(task, settings, sources, parts, _source_notes(task, settings, sources))


def _test_items_of_run(task: TaskRows, run_split: dict, given: Settings) -> tuple[list[Example], dict]:
    """A run's test items, or as many of them as the flags that are `given` now ask for."""
    sources = run_split["sources"]
    require_unchanged_files(run_split, ("test",) if "test" in sources else tuple(sources))
    settings = _settings_of_run(run_split)
    test, record = _test_items(task, settings)
    require_same_items(run_split, record)
    if given.test_size is None and given.limit_eval is None:
        return test, record
    sizes = replace(settings, test_size=given.test_size, limit_eval=given.limit_eval)
    parts = subsets(sizes, {"test": test}, ("test",))
    return parts["test"], record | {"splits": {"test": describe(parts["test"], task.labels)}}


def _train_of_run(task: TaskRows, run_split: dict) -> list[Example]:
    require_unchanged_files(run_split, tuple(run_split["sources"]))
    splits = _load(task, _settings_of_run(run_split))
    require_same_items(run_split, splits.record)
    return splits.train


def _settings_of_run(run_split: dict) -> Settings:
    """The run's settings, with hub data pinned to the commit that the run read."""
    return replace(Settings(**run_split["settings"]), dataset_revision=run_split["sources"]["train"].get("revision"))
