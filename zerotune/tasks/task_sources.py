"""Which sources a task's rows come from, by its flags, and the test items of a run rebuilt: for every kind of row."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from zerotune.errors import Refused
from zerotune.files import json_sha256
from zerotune.tasks.split_settings import Origin, Settings, require_same_items, require_unchanged_files, settings_of
from zerotune.tasks.splits import Splits

# Shares of the rows that report and that choose; None: a slice of train chooses.
DRAWN_SHARES = {"80-20": (0.2, None), "70-10-20": (0.2, 0.1), "random": (0.2, None)}


@dataclass(frozen=True, kw_only=True)
class TaskSources:
    """Where a task's rows come from. Each kind of rows adds how they are read, split, cut down and described.

    Attributes:
        task, title: "sst2", "SST-2".
        rules: the splits that it has, of official and DRAWN_SHARES.
        drawn_notes: what is said of a split that is drawn from the rows, by its name.
        lone_file_rule: the split of a --train-file that stands alone.
        dataset, reporting: the hub id, and its split that reports.
        sample: (rows, seed) -> rows of our own, and (rows, seed) of train and of test.
    """

    task: str
    title: str
    rules: tuple[str, ...]
    drawn_notes: Mapping[str, str] = field(default_factory=dict)
    lone_file_rule: str
    dataset: str
    reporting: str
    sample: Callable[[int, int], list | dict]
    sample_train: tuple[int, int]
    sample_test: tuple[int, int]

    @property
    def predict_instead(self) -> str:
        """The way out for a run whose test rows have no labels."""
        return f"a run reports on labelled rows; predict these with eval/{self.task}.py --test-file"

    @property
    def give_labels(self) -> str:
        """The way out for rows that are not labelled as they must be."""
        raise NotImplementedError

    def read(self, origin: Origin, way_out: str | None) -> tuple[list, dict]:
        """(rows, the source's record). With `way_out`, what to give instead, they must be labelled, or Refused."""
        raise NotImplementedError

    def load(self, settings: Settings) -> Splits:
        """The rows that train, choose and report. Raises Refused for bad input or flags."""
        raise NotImplementedError

    def subsets(self, settings: Settings, parts: dict[str, list], sized: tuple[str, ...]) -> dict[str, list]:
        """The splits after --*-size (of the splits named in `sized`) and --limit-*."""
        raise NotImplementedError

    def describe(self, rows: list) -> dict:
        """What split.json says of one split."""
        raise NotImplementedError


def load_test(task: TaskSources, args: Namespace, run_split: dict | None) -> tuple[list, dict]:
    """The items that an eval script scores, and their record: as `Splits.record`, of the test split alone.

    --sample, --dataset, --validation-file, --test-file or --split name them; else they are the test items of the run
    that wrote `run_split` (the content of split.json); else the hub's split that reports. `--dataset ID:SPLIT` names a
    hub split, such as the unlabelled stanfordnlp/sst2:test. Either all labels are None or none is. Raises Refused for
    bad input, and where a source of the run has changed."""
    settings = settings_of(args)
    if settings.validation_file and settings.test_file and settings.split not in DRAWN_SHARES:
        raise Refused("--validation-file and --test-file both name the items that are scored: leave one of them out")
    if run_split is not None and not _names_items(settings):
        return _test_items_of_run(task, run_split, settings)
    if settings.split not in DRAWN_SHARES:
        settings = replace(settings, train_file=None)  # in an eval script it only says where shots come from
    rows, record = _test_items(task, settings)
    source = record["sources"].get("test")
    if run_split is not None and source and source["sha256"] == run_split["sources"]["train"]["sha256"]:
        note = "the model was tuned on rows of this very file or split: this is no score on unseen items"
        record = record | {"notes": [*record["notes"], note]}
    return rows, record


def rows_for_shots(task: TaskSources, args: Namespace, run_split: dict | None) -> list:
    """Labelled rows to draw few-shot examples from: --train-file, else the run's train rows, else the data set's.

    Raises Refused for bad input."""
    settings = settings_of(args)
    names_train = settings.sample or settings.dataset or settings.split
    if settings.split in DRAWN_SHARES:
        return task.load(replace(settings, limit_train=None, limit_eval=None)).train
    if run_split is not None and not settings.train_file and not names_train:
        require_unchanged_files(run_split, tuple(run_split["sources"]))
        splits = task.load(_settings_of_run(run_split))
        require_same_items(run_split, splits.record)
        return splits.train
    dataset = (settings.dataset or "").partition(":")[0] or None
    return task.read(train_origin(task, replace(settings, dataset=dataset)), task.give_labels)[0]


# --- which source does what ---


def rule_of(task: TaskSources, settings: Settings) -> str:
    train_file_alone = settings.train_file and not (settings.validation_file or settings.test_file)
    rule = settings.split or (task.lone_file_rule if train_file_alone else "official")
    if rule not in task.rules:
        raise Refused(f"{task.title} has no split {rule!r}; choose {' or '.join(task.rules)}")
    return rule


def origins_of(task: TaskSources, settings: Settings) -> dict[str, Origin]:
    """The sources by what they do: "train" always, "test", "choose" where they are not drawn; "more" to draw from."""
    validation_file, test_file = settings.validation_file, settings.test_file
    train, rule = train_origin(task, settings), rule_of(task, settings)
    if rule in ("80-20", "random"):
        if validation_file or test_file:
            given = validation_file or test_file
            raise Refused(f"--split {rule} draws its test rows from train, but {given} is given too; leave one out")
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


def _reporting_origin(task: TaskSources, settings: Settings) -> Origin | None:
    """The rows that the data set has for reporting; None where a train file stands alone."""
    if settings.test_file:
        return Origin("test", path=settings.test_file)
    if settings.sample:
        return Origin("test", sample=(task.sample, *task.sample_test))
    if settings.train_file:
        return None
    return Origin(task.reporting, hub=_hub(task, settings, task.reporting))


def train_origin(task: TaskSources, settings: Settings) -> Origin:
    """The rows of --sample, --train-file, --dataset, or the data set's train split."""
    if settings.sample:
        if settings.dataset or settings.train_file or settings.validation_file or settings.test_file:
            raise Refused("--sample makes its own rows; leave out --sample, or --dataset and the --*-file flags")
        return Origin("train", sample=(task.sample, *task.sample_train))
    if settings.train_file:
        if settings.dataset:
            raise Refused(f"--train-file and --dataset {settings.dataset} both name the train rows; give one of them")
        return Origin("train", path=settings.train_file)
    return Origin("train", hub=_hub(task, settings, "train"))


def _hub(task: TaskSources, settings: Settings, split: str) -> tuple[str, str, str | None]:
    dataset = settings.dataset or task.dataset
    if ":" in dataset:
        raise Refused(f"--dataset {dataset}: one split can be evaluated, but not trained on; give the id alone")
    return dataset, split, settings.dataset_revision


def record_of(task: TaskSources, settings: Settings, sources: dict, parts: dict, notes: list[str]) -> dict:
    """What split.json holds: the splits `parts`, and all that rebuilds them."""
    return {
        "task": task.task,
        "rule": rule_of(task, settings),
        "split_seed": settings.split_seed,
        "splits": {name: task.describe(rows) for name, rows in parts.items()},
        "sources": sources,
        "notes": notes,
        "settings": asdict(settings),
    }


def source_notes(task: TaskSources, settings: Settings, sources: dict) -> list[str]:
    """What is said of the sources: a split that is drawn, a file that stands alone, repeated rows."""
    notes, rule = [], rule_of(task, settings)
    if rule in DRAWN_SHARES:
        num_rows = sum(source["rows"] for source in sources.values())
        warning = f": {task.drawn_notes[rule]}" if rule in task.drawn_notes else ""
        notes.append(f"{rule} split of {num_rows} rows{warning}")
    elif "train" in sources and bool(settings.validation_file) != bool(settings.test_file):
        flag = "--validation-file" if settings.validation_file else "--test-file"
        notes.append(f"only {flag} is given: it reports, and a slice of train chooses")
    for name, source in sources.items():
        counts = source.get("duplicates", 0), source.get("conflicting_texts", 0)
        if any(counts):
            notes.append(f"{name} source: {counts[0]} duplicate rows, {counts[1]} texts with both labels")
    return notes


def reporting_sha256(record: dict) -> str:
    """Hash of the source that the test items of a split come from, or of all that they are drawn from: their ids alone
    do not tell it."""
    hashes = {name: source["sha256"] for name, source in record["sources"].items()}
    if "test" in hashes:
        return hashes["test"]
    return hashes["train"] if len(hashes) == 1 else json_sha256(hashes)


# --- test items alone, and those of a run ---


def _names_items(settings: Settings) -> bool:
    return settings.sample or any((settings.dataset, settings.validation_file, settings.test_file, settings.split))


def _test_items(task: TaskSources, settings: Settings) -> tuple[list, dict]:
    """The test split alone. Train is read only where the test rows are drawn from it."""
    dataset, colon, split = (settings.dataset or "").partition(":")
    if colon and (settings.validation_file or settings.test_file):
        raise Refused(f"--dataset {settings.dataset} names the items, and a file is given too: leave one of them out")
    if colon and not (dataset and split):
        raise Refused(f"--dataset {settings.dataset} must be a hub id, or ID:SPLIT; {task.dataset}:test is one")
    origins = {"test": Origin(split, hub=(dataset, split, None))} if colon else origins_of(task, settings)
    if "test" not in origins:
        splits = task.load(settings)
        return splits.test, splits.record | {"splits": {"test": splits.record["splits"]["test"]}}
    rows, source = task.read(origins["test"], None)
    parts, sources = task.subsets(settings, {"test": rows}, ("test",)), {"test": source}
    return parts["test"], record_of(task, settings, sources, parts, source_notes(task, settings, sources))


def _test_items_of_run(task: TaskSources, run_split: dict, given: Settings) -> tuple[list, dict]:
    """A run's test items, or as many of them as the flags that are `given` now ask for."""
    sources = run_split["sources"]
    require_unchanged_files(run_split, ("test",) if "test" in sources else tuple(sources))
    settings = _settings_of_run(run_split)
    test, record = _test_items(task, settings)
    require_same_items(run_split, record)
    if given.test_size is None and given.limit_eval is None:
        return test, record
    sizes = replace(settings, test_size=given.test_size, limit_eval=given.limit_eval)
    parts = task.subsets(sizes, {"test": test}, ("test",))
    return parts["test"], record | {"splits": {"test": task.describe(parts["test"])}}


def _settings_of_run(run_split: dict) -> Settings:
    """The run's settings, with hub data pinned to the commit that the run read."""
    return replace(Settings(**run_split["settings"]), dataset_revision=run_split["sources"]["train"].get("revision"))
