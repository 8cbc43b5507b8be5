"""Test the role of each source, and rebuilding a run's test items, with rows that are plain pairs of id and label."""

import json
from collections import namedtuple
from functools import partial

import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.tasks import sources
from zerotune.tasks.sources import Corpus, Origin, load_test, origins, rows_for_shots, split_record
from zerotune.tasks.splits import Splits, ids_sha256, subset

Row = namedtuple("Row", "id label")
CORPUS = Corpus(
    name="toy",
    title="Toy",
    splits=("official", "80-20", "70-10-20"),
    lone_file_split="80-20",
    dataset="org/toy",
    test_split="heldout",
    sample=lambda num_rows, seed: [],
    sample_train=(10, 1),
    sample_test=(4, 2),
)
HUB_TRAIN = Origin("train", hub=("org/toy", "train", None))
HUB_TEST = Origin("heldout", hub=("org/toy", "heldout", None))
SAMPLE_TRAIN, SAMPLE_TEST = Origin("train", sample=(CORPUS.sample, 10, 1)), Origin("test", sample=(CORPUS.sample, 4, 2))
OTHER_TRAIN, OTHER_TEST = Origin("train", hub=("a/b", "train", "c0")), Origin("heldout", hub=("a/b", "heldout", "c0"))
TRAIN, VALIDATION, TEST = (Origin(name, path=f"/{name}") for name in ("train", "validation", "test"))
FILES = {"train_file": "/train", "validation_file": "/validation", "test_file": "/test"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"train": HUB_TRAIN, "test": HUB_TEST}),
        ({"split": "70-10-20"}, {"train": HUB_TRAIN, "more": HUB_TEST}),
        ({"split": "80-20"}, {"train": HUB_TRAIN}),
        ({"test_file": "/test"}, {"train": HUB_TRAIN, "test": TEST}),
        (FILES, {"train": TRAIN, "validation": VALIDATION, "test": TEST}),
        ({**FILES, "test_file": None}, {"train": TRAIN, "test": VALIDATION}),
        ({**FILES, "validation_file": None}, {"train": TRAIN, "test": TEST}),
        ({**FILES, "validation_file": None, "split": "70-10-20"}, {"train": TRAIN, "more": TEST}),
        ({"train_file": "/train"}, {"train": TRAIN}),
        ({"train_file": "/train", "split": "70-10-20"}, {"train": TRAIN}),
        ({"sample": True}, {"train": SAMPLE_TRAIN, "test": SAMPLE_TEST}),
        ({"dataset": "a/b", "dataset_revision": "c0"}, {"train": OTHER_TRAIN, "test": OTHER_TEST}),
    ],
)
def test_which_source_does_what(given, wanted):
    assert origins(CORPUS, DataSettings(**given)) == wanted


def read(origin):
    """Return sixteen rows of any origin, half of each label."""
    where = origin.path or "/".join(origin.hub[:2])
    rows = [Row(f"{origin.prefix}-{number}", number % 2) for number in range(16)]
    record = {"sha256": f"hash of {where}", "rows": 16} | ({"dataset": origin.hub[0]} if origin.hub else {})
    return rows, record


def describe(rows):
    return {"count": len(rows), "ids_sha256": ids_sha256(rows)}


def load(settings):
    """Load the sources that `origins` gives; without test rows, every third train row is one."""
    rows, records = {}, {}
    for name, origin in origins(CORPUS, settings).items():
        rows[name], records[name] = read(origin)
    train = rows["train"]
    test = rows["test"] if "test" in rows else train[::3]
    parts = {
        "train": [row for row in train if row not in test],
        "validation": [],
        "test": subset(settings, "test", test),
    }
    described = {name: describe(rows) for name, rows in parts.items()}
    record = split_record(CORPUS, settings, records, described, ["a note"])
    return Splits(**parts, record=json.loads(json.dumps(record)))


load_items = partial(load_test, CORPUS, load=load, read=read, subset=subset, describe=describe)


@pytest.mark.parametrize("given", [{}, {"split": "80-20"}, {"limit_eval": 6}, {"dataset": "a/b"}])
def test_a_run_gives_its_test_items_back(given):
    splits = load(DataSettings(**given))
    rows, record = load_items(DataSettings(), splits.record)
    assert rows == splits.test and record["splits"] == {"test": splits.record["splits"]["test"]}
    fewer, record = load_items(DataSettings(test_size=2), splits.record)
    assert len(fewer) == 2 and set(fewer) < set(rows) and record["splits"] == {"test": describe(fewer)}
    assert record["settings"]["test_size"] == 2
    assert rows_for_shots(CORPUS, DataSettings(), splits.record, load=load, read=read) == splits.train


def test_a_typed_seed_draws_the_subset_of_a_runs_items():
    run_split = load(DataSettings(split="80-20", split_seed=3)).record
    fewer = [load_items(DataSettings(limit_eval=2, split_seed=seed), run_split)[0] for seed in (0, 3, 4)]
    assert fewer[0] == fewer[1] != fewer[2]
    assert load_items(DataSettings(split_seed=3), run_split)[0] == load_items(DataSettings(), run_split)[0]
    with pytest.raises(Refused, match="--split-seed 4 is for drawing a --split or a subset, and all test items of the"):
        load_items(DataSettings(split_seed=4), run_split)


def test_flags_name_other_items_than_the_runs():
    run_split = load(DataSettings()).record
    assert load_items(DataSettings(test_file="/test"), run_split)[1]["sources"]["test"]["sha256"] == "hash of /test"
    rows, record = load_items(DataSettings(dataset="org/toy:extra"), run_split)
    assert rows[0].id == "extra-0" and record["sources"]["test"]["sha256"] == "hash of org/toy/extra"
    _, record = load_items(DataSettings(dataset="org/toy:train"), run_split)
    assert any("not a score on unseen items" in note for note in record["notes"])
    pooled = run_split | {"sources": run_split["sources"] | {"more": {"sha256": "hash of org/toy/extra"}}}
    _, record = load_items(DataSettings(dataset="org/toy:extra"), pooled)
    assert any("not a score on unseen items" in note for note in record["notes"])
    drawn = load(DataSettings(train_file="/train")).record
    for given, has_note in (({}, False), ({"split_seed": 1}, True), ({"split": "70-10-20"}, True)):
        _, record = load_items(DataSettings(**{"train_file": "/train", "split": "80-20"} | given), drawn)
        assert any("not a score on unseen items" in note for note in record["notes"]) == has_note
    _, record = load_items(DataSettings(split="80-20", split_seed=1), drawn)  # of another source
    assert not any("not a score on unseen items" in note for note in record["notes"])
    with pytest.raises(Refused, match=r"--glue cola is not the task of .* such as --dataset org/toy:heldout"):
        load_items(DataSettings(glue="cola"), run_split)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["sources"]["test"].update(sha256="other"), "org/toy: its rows are not those"),
        (lambda record: record["splits"]["test"].update(ids_sha256="other"), "the test items rebuilt from split.json"),
    ],
)
def test_a_source_or_rule_that_changed_is_refused(change, message):
    record = load(DataSettings()).record
    change(record)
    with pytest.raises(Refused, match=message):
        load_items(DataSettings(), record)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation_file": "/a", "test_file": "/b"}, "both name the items"),
        ({"dataset": "a/b:c", "test_file": "/b"}, "names the items, and a file is given too"),
        ({"dataset": "a/b:"}, "must be a hub id, or ID:SPLIT"),
        ({"dataset": "a/b:test", "split": "80-20"}, "names the items, and --split 80-20 draws some: leave one"),
    ],
)
def test_items_that_are_named_twice_or_badly(given, message):
    with pytest.raises(Refused, match=message):
        load_items(DataSettings(**given), None)


def test_shots_come_from_the_train_file_or_the_named_data():
    def prefixes(run_split=None, **given):
        rows = rows_for_shots(CORPUS, DataSettings(**given), run_split, load=load, read=lambda origin: ([origin], None))
        return rows[0]

    run_split = load(DataSettings()).record
    assert prefixes(run_split, train_file="/train") == TRAIN
    assert prefixes(run_split, dataset="a/b:test") == Origin("train", hub=("a/b", "train", None))
    assert prefixes() == HUB_TRAIN
    assert len(rows_for_shots(CORPUS, DataSettings(split="80-20"), None, load=load, read=read)) == 10


def test_notes_of_drawn_splits_lone_files_and_repeats():
    def notes(given, **record):
        settings = DataSettings(**given)
        return sources.split_record(CORPUS, settings, {"train": {"rows": 8} | record}, {}, ["last"])["notes"]

    assert notes({"split": "80-20"}) == ["80-20 split of 8 rows", "last"]
    lone = "no --validation-file: --test-file is the test, and a slice of train validates"
    assert notes({"test_file": "/test"}) == [lone, "last"]
    repeats = notes({}, duplicates=3, conflicting_texts=1)
    both = "3 rows that repeat another one and 1 texts that have different labels in different rows"
    assert repeats == [f"train rows as read hold {both}: they are kept, within one split", "last"]
