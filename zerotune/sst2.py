"""SST-2: is a sentence from a film review positive or negative? Its rows, its splits and the words of its prompt.

A row of ours, in the data set's form (lower case, tokens apart, `sentence<TAB>label`):

    a small , stubborn film that earns its quiet ending .	1

Label 1 is positive, 0 negative. The published score is accuracy on the 872 validation sentences; the hub's test rows
have no labels (-1). Nine in ten train rows are phrases of other train rows, so the choosing slice is drawn from whole
sentences and takes its phrases out of train (zerotune/phrases.py). Socher et al. 2013; Wang et al. 2018 (GLUE).
"""

from argparse import Namespace
from dataclasses import asdict, replace

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
    draw_choosing_slice,
    require_labels,
    stratified_split,
    stratified_subset,
    without_texts_of,
)

TASK = "sst2"
LABELS = ("negative", "positive")
COLUMNS = Columns(text=("sentence", "text"), label="label", labels=LABELS)
DATASET = "stanfordnlp/sst2"
PROMPT = "Review: {text}\nSentiment:"
LABEL_WORDS = ("negative", "positive")

SAMPLE_TRAIN = (8000, 1)  # rows, seed
SAMPLE_TEST = (1000, 2)
TEST_SHARE = 0.2
OVERLAP_NOTE = "phrases overlap: not comparable with official figures"
GIVE_LABELS = "give rows with a label column of 0 (negative) and 1 (positive)"
PREDICT_INSTEAD = "a run reports on labelled rows; predict these with eval/sst2.py --test-file"


def load_splits(args: Namespace) -> Splits:
    """The rows that train, choose and report, by the flags in `Settings`.

    official: the validation set (or --test-file, or a lone --validation-file) reports; 80-20: a fifth of train does.
    Whole sentences of train choose, unless a validation file stands beside a test file. Raises Refused for bad input
    or flags."""
    return _load(settings_of(args))


def load_test(args: Namespace, run_split: dict | None) -> tuple[list[Example], dict]:
    """The items that an eval script scores, and their record: as `Splits.record`, of the test split alone.

    --sample, --dataset, --validation-file, --test-file or --split name them; else they are the test items of the run
    that wrote `run_split` (the content of split.json); else the hub's validation set. `--dataset ID:SPLIT` names a hub
    split, such as the unlabelled stanfordnlp/sst2:test. Either all labels are None or none is. Raises Refused for bad
    input, and where a source of the run has changed."""
    settings = settings_of(args)
    if run_split is None or _names_items(settings):
        if settings.split != "80-20":
            settings = replace(settings, train_file=None)  # in an eval script it only says where shots come from
        return _test_items(settings)
    return _test_items_of_run(run_split, settings.limit_eval)


def load_shots_source(args: Namespace, run_split: dict | None, test: list[Example]) -> list[Example]:
    """Labelled rows to draw few-shot examples from: --train-file, else the run's train rows, else the data set's.

    No row with the text of one of `test` is among them. Raises Refused for bad input."""
    settings = settings_of(args)
    names_train = settings.sample or settings.dataset or settings.split
    if settings.split == "80-20":
        train = _load(replace(settings, limit_train=None, limit_eval=None)).train
    elif run_split is not None and not settings.train_file and not names_train:
        train = _train_of_run(run_split)
    else:
        dataset = (settings.dataset or "").partition(":")[0] or None
        train, _ = read_origin(_train_origin(replace(settings, dataset=dataset)), COLUMNS, GIVE_LABELS)
    shots = without_texts_of(train, test)
    require_labels(shots, "shots", LABELS, "give labelled rows that are not test items by --train-file")
    return shots


# --- which source does what ---


def _rule(settings: Settings) -> str:
    train_file_alone = settings.train_file and not (settings.validation_file or settings.test_file)
    rule = settings.split or ("80-20" if train_file_alone else "official")
    if rule not in ("official", "80-20"):
        raise Refused(f"SST-2 has no split {rule!r}; choose official or 80-20")
    return rule


def _origins(settings: Settings) -> dict[str, Origin]:
    """The sources by what they do: "train" always, "test" and "choose" where they are not drawn from train."""
    validation_file, test_file = settings.validation_file, settings.test_file
    train = _train_origin(settings)
    if _rule(settings) == "80-20":
        if validation_file or test_file:
            given = validation_file or test_file
            raise Refused(f"--split 80-20 draws its test rows from train, but {given} is given too; leave one out")
        return {"train": train}
    if validation_file and test_file:
        return {
            "train": train,
            "choose": Origin("validation", path=validation_file),
            "test": Origin("test", path=test_file),
        }
    if test_file:
        test = Origin("test", path=test_file)
    elif validation_file:
        test = Origin("validation", path=validation_file)
    elif settings.sample:
        test = Origin("test", sample=SAMPLE_TEST)
    elif settings.train_file:
        raise Refused("--split official wants rows that report; give --test-file beside --train-file, or --split 80-20")
    else:
        test = Origin("validation", hub=_hub(settings, "validation"))
    return {"train": train, "test": test}


def _train_origin(settings: Settings) -> Origin:
    if settings.sample:
        if settings.dataset or settings.train_file or settings.validation_file or settings.test_file:
            raise Refused("--sample makes its own rows; leave out --sample, or --dataset and the --*-file flags")
        return Origin("train", sample=SAMPLE_TRAIN)
    if settings.train_file:
        if settings.dataset:
            raise Refused(f"--train-file and --dataset {settings.dataset} both name the train rows; give one of them")
        return Origin("train", path=settings.train_file)
    return Origin("train", hub=_hub(settings, "train"))


def _hub(settings: Settings, split: str) -> tuple[str, str, str | None]:
    dataset = settings.dataset or DATASET
    if ":" in dataset:
        raise Refused(f"--dataset {dataset}: one split can be evaluated, but not trained on; give the id alone")
    return dataset, split, settings.dataset_revision


# --- the splits ---


def _load(settings: Settings) -> Splits:
    rows, sources = {}, {}
    for name, origin in _origins(settings).items():
        way_out = PREDICT_INSTEAD if name == "test" else GIVE_LABELS
        rows[name], sources[name] = read_origin(origin, COLUMNS, way_out)
    notes = _source_notes(settings, sources)
    train, seed, removed = rows["train"], settings.split_seed, {}
    if "test" not in rows:
        train, rows["test"] = stratified_split(train, TEST_SHARE, seed, "test")
        require_labels(rows["test"], "test split (a fifth of train)", LABELS, "give more rows", every=False)
    train, removed["train_rows_in_test"] = _without(train, rows["test"])
    require_labels(train, f"train, less {removed['train_rows_in_test']} rows that stand in test", LABELS, GIVE_LABELS)
    if "choose" in rows:
        choose, removed["choose_rows_in_test"] = _without(rows["choose"], rows["test"])
        left = f"validation file, less {removed['choose_rows_in_test']} rows that stand in test"
        require_labels(choose, left, LABELS, GIVE_LABELS, every=False)
        train, removed["train_rows_in_choose"] = _without(train, choose)
        sized = ("train", "choose", "test")
    else:
        num_before = len(train)
        train, choose, num_whole = draw_choosing_slice(train, seed, settings.validation_size)
        removed["train_rows_in_choose"] = num_before - len(train) - len(choose)
        notes.append(f"{len(choose)} rows choose, drawn from the {num_whole} whole sentences of train")
        sized = ("train", "test")
    notes += _removal_notes(removed)
    parts = subsets(settings, {"train": train, "choose": choose, "test": rows["test"]}, sized)
    require_labels(parts["train"], "what is left to train on", LABELS, "give more rows, or raise --limit-train")
    require_labels(parts["choose"], "choosing split", LABELS, "give more rows, or a --validation-file", every=False)
    return Splits(**parts, record=_record(settings, sources, parts, notes) | {"removed_rows": removed})


def _without(examples: list[Example], others: list[Example]) -> tuple[list[Example], int]:
    kept = without_texts_of(examples, others)
    return kept, len(examples) - len(kept)


def _source_notes(settings: Settings, sources: dict) -> list[str]:
    notes = []
    if _rule(settings) == "80-20":
        notes.append(f"80-20 split of {sources['train']['rows']} rows: {OVERLAP_NOTE}")
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


def _record(settings: Settings, sources: dict, parts: dict, notes: list[str]) -> dict:
    return {
        "task": TASK,
        "rule": _rule(settings),
        "split_seed": settings.split_seed,
        "splits": {name: describe(examples, LABELS) for name, examples in parts.items()},
        "sources": sources,
        "notes": notes,
        "settings": asdict(settings),
    }


# --- test items alone, and those of a run ---


def _names_items(settings: Settings) -> bool:
    return settings.sample or any((settings.dataset, settings.validation_file, settings.test_file, settings.split))


def _test_items(settings: Settings) -> tuple[list[Example], dict]:
    """The test split alone. Train is read only where the test rows are drawn from it."""
    dataset, colon, split = (settings.dataset or "").partition(":")
    if colon and not (dataset and split):
        raise Refused(f"--dataset {settings.dataset} must be a hub id, or ID:SPLIT; {DATASET}:test is one")
    origins = {"test": Origin(split, hub=(dataset, split, None))} if colon else _origins(settings)
    if "test" not in origins:
        splits = _load(settings)
        return splits.test, splits.record | {"splits": {"test": splits.record["splits"]["test"]}}
    examples, source = read_origin(origins["test"], COLUMNS, None)
    parts = subsets(settings, {"test": examples}, ("test",))
    sources = {"test": source}
    return parts["test"], _record(settings, sources, parts, _source_notes(settings, sources))


def _test_items_of_run(run_split: dict, limit: int | None) -> tuple[list[Example], dict]:
    require_unchanged_files(run_split, ("test",) if "test" in run_split["sources"] else ("train",))
    settings = _settings_of_run(run_split)
    test, record = _test_items(settings)
    require_same_items(run_split, record)
    if limit is not None:
        test = stratified_subset(test, limit, settings.split_seed, "test limit")
        record = record | {"splits": {"test": describe(test, LABELS)}}
    return test, record


def _train_of_run(run_split: dict) -> list[Example]:
    require_unchanged_files(run_split, tuple(run_split["sources"]))
    splits = _load(_settings_of_run(run_split))
    require_same_items(run_split, splits.record)
    return splits.train


def _settings_of_run(run_split: dict) -> Settings:
    """The run's settings, with hub data pinned to the commit that the run read."""
    return replace(Settings(**run_split["settings"]), dataset_revision=run_split["sources"]["train"].get("revision"))
