"""Test SST-2's splits from files, the sample and the hub, and rebuilding a run's items from split.json."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.tasks import texts
from zerotune.tasks.files import Source, rows_sha256
from zerotune.tasks.splits import normalise_text
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import load, load_shots, load_test

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "sst2"


def flags(**given) -> DataSettings:
    return DataSettings(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def review_rows(num_sentences: int, seed: int, word: str = "w") -> list[tuple[str, int]]:
    """Return sentences of nine made-up words, each with two of its phrases, with alternating labels."""
    generator = random.Random(seed)
    rows = []
    for number in range(num_sentences):
        words = [f"{word}{generator.randrange(5000)}" for _ in range(9)]
        rows += [(" ".join(part), number % 2) for part in (words, words[:4], words[3:8])]
    return rows


def write_tsv(path: Path, rows) -> Path:
    path.write_text("sentence\tlabel\n" + "".join(f"{text} \t{label}\n" for text, label in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return {
        "train_file": write_tsv(tmp_path / "train.tsv", review_rows(200, 0)),
        "validation_file": write_tsv(tmp_path / "validation.tsv", review_rows(20, 1, "v")),
        "test_file": write_tsv(tmp_path / "test.tsv", review_rows(30, 2, "t")),
    }


def ids(examples):
    return {example.id for example in examples}


def counts(splits):
    return len(splits.train), len(splits.validation), len(splits.test)


def test_validation_file_validates_and_test_file_reports(files):
    splits = load(SST2, flags(**files))
    assert counts(splits) == (600, 60, 90)
    assert {splits.train[0].id, splits.validation[0].id, splits.test[0].id} == {"train-0", "validation-0", "test-0"}
    assert splits.record["rule"] == "official"
    assert splits.record["notes"] == []
    json.dumps(splits.record)


@pytest.mark.parametrize("alone", ["validation_file", "test_file"])
def test_alone_it_reports_and_whole_sentences_validate(files, alone):
    splits = load(SST2, flags(train_file=files["train_file"], **{alone: files[alone]}))
    # 10 % of 600 rows is 60, but 25 % of the 200 whole sentences is 50; each comes with its two phrases
    assert counts(splits) == (450, 50, {"validation_file": 60, "test_file": 90}[alone])
    assert all(int(example.id.split("-")[1]) % 3 == 0 for example in splits.validation)
    assert splits.record["removed_rows"]["train_rows_in_validation"] == 100
    given, lacking = ("validation", "test")[:: 1 if alone == "validation_file" else -1]
    note = f"no --{lacking}-file: --{given}-file is the test, and a slice of train validates"
    assert note in splits.record["notes"]
    assert "50 of the 200 whole sentences of train are set aside for validation" in splits.record["notes"]


def test_lone_train_file_is_an_80_20_split_marked_as_overlapping(files):
    splits = load(SST2, flags(train_file=files["train_file"]))
    assert len(splits.test) == 120
    assert Counter(example.label for example in splits.test) == {0: 60, 1: 60}
    assert splits.record["rule"] == "80-20"
    assert any(SST2.split_warnings["80-20"] in note for note in splits.record["notes"])
    parts = [ids(part) for part in (splits.train, splits.validation, splits.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    for example in splits.train:
        assert not any(f" {example.text} " in f" {sentence.text} " for sentence in splits.validation)


def test_rows_of_test_leave_train(tmp_path, files):
    train = [*review_rows(50, 0), ("The  SAME words", 1), ("only here", 0)]
    write_tsv(files["train_file"], train)
    write_tsv(files["test_file"], [("the same words", 1), ("other words", 0)])
    write_tsv(files["validation_file"], [("the same words", 1), ("only here", 0)])
    splits = load(SST2, flags(**files))
    assert splits.record["removed_rows"] == {
        "train_rows_in_test": 1,
        "validation_rows_in_test": 1,
        "train_rows_in_validation": 1,
    }
    assert counts(splits) == (150, 1, 2)
    assert "removed 1 train rows that are also in test" in splits.record["notes"]


def test_duplicates_and_conflicts_are_counted(files):
    rows = review_rows(20, 0)
    write_tsv(files["train_file"], [*rows, rows[0], (rows[1][0], 1 - rows[1][1])])
    record = load(SST2, flags(**files)).record
    assert (record["sources"]["train"]["duplicates"], record["sources"]["train"]["conflicting_texts"]) == (1, 1)
    (note,) = (note for note in record["notes"] if "train rows as read" in note)
    assert "1 rows that repeat another one and 1 texts that have different labels" in note


def test_limits_and_sizes_come_after_the_split(files):
    whole = load(SST2, flags(train_file=files["train_file"], test_file=files["test_file"]))
    some = load(
        SST2,
        flags(
            train_file=files["train_file"], test_file=files["test_file"], limit_train=50, limit_eval=20, test_size=30
        ),
    )
    assert counts(some) == (50, 20, 20)
    assert ids(some.train) < ids(whole.train)
    assert ids(some.validation) < ids(whole.validation)
    numbers = [int(example.id.split("-")[1]) for example in some.train]
    assert numbers == sorted(numbers)
    sized = load(
        SST2,
        flags(train_file=files["train_file"], test_file=files["test_file"], train_size=100, validation_size=30),
    )
    assert counts(sized) == (100, 30, 90)
    assert Counter(example.label for example in sized.train) == {0: 50, 1: 50}


def test_sample_takes_the_same_path():
    splits = load(SST2, flags(sample=True))
    train_texts = {normalise_text(example.text) for example in splits.train}
    assert len(splits.test) == SST2.sample_test[0]
    assert not train_texts & {normalise_text(example.text) for example in [*splits.test, *splits.validation]}
    again = load(SST2, flags(sample=True))
    assert again == splits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "official", "validation_file": None, "test_file": None}, "--split official needs rows to report on"),
        ({"split": "80-20"}, "--split 80-20 draws its test rows from train"),
        ({"split": "70-10-20"}, "SST-2 has no split '70-10-20'"),
        ({"sample": True}, "--sample makes its own rows"),
        ({"dataset": "a/b"}, "both name the train rows"),
        ({"train_size": 10_000}, "--train-size 10000: a balanced subset needs 5000 rows of each label"),
        ({"limit_train": 1}, "what is left to train on: none of 1 rows is"),
        ({"train_file": None, "dataset": "a/b:test", "validation_file": None}, "can be evaluated, but not trained on"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(files, given, message):
    with pytest.raises(Refused, match=message):
        load(SST2, flags(**{**files, **given}))


def test_one_class_and_unlabelled_files_are_refused(files):
    write_tsv(files["train_file"], [("a", 1), ("b", 1)])
    with pytest.raises(Refused, match=r"train\.tsv: none of 2 rows is 'negative'"):
        load(SST2, flags(**files))
    write_tsv(files["train_file"], review_rows(20, 0))
    write_tsv(files["test_file"], [("a", -1), ("b", -1)])
    with pytest.raises(Refused, match=r"test\.tsv: the rows have no labels; .* eval/sst2\.py --test-file"):
        load(SST2, flags(**files))
    files["test_file"].write_text("sentence\na\n")
    with pytest.raises(Refused, match=r"no column for the labels, 'label' \(or 'sentiment'\); found 'sentence'$"):
        load(SST2, flags(**files))


@pytest.mark.parametrize(
    ("same", "words"),
    [
        (("train_file", "test_file"), "all 600 train rows are also test rows: give train rows of their own"),
        (
            ("validation_file", "test_file"),
            "all 60 validation rows are also test rows: give validation rows",
        ),
        (
            ("train_file", "validation_file"),
            "all 600 train rows are also validation rows: give train rows",
        ),
    ],
)
def test_one_file_for_two_parts_is_refused_for_what_it_is(files, same, words):
    with pytest.raises(Refused, match=words):
        load(SST2, flags(**files | {same[1]: files[same[0]]}))


# --- eval ---


def saved(record: dict) -> dict:
    """Return a record as it is read back from split.json."""
    return json.loads(json.dumps(record))


@pytest.mark.parametrize("given", [("train_file", "test_file"), ("train_file",)])
def test_a_run_gives_its_own_test_items_back(files, given):
    splits = load(SST2, flags(**{name: files[name] for name in given}, limit_eval=25, limit_train=100))
    test, record = load_test(SST2, flags(), saved(splits.record))
    assert test == splits.test
    assert record["splits"] == {"test": splits.record["splits"]["test"]}
    fewer, record = load_test(SST2, flags(limit_eval=10), saved(splits.record))
    assert ids(fewer) < ids(test)
    assert record["splits"]["test"]["count"] == 10
    shots = load_shots(SST2, flags(), saved(splits.record), test)
    assert shots == splits.train


@pytest.mark.parametrize("given", [("train_file", "test_file"), ("train_file",)])
def test_a_changed_file_of_a_run_is_named(files, given):
    record = saved(load(SST2, flags(**{name: files[name] for name in given})).record)
    changed = files[given[-1]]
    changed.write_text(changed.read_text() + "one more row\t1\n")
    with pytest.raises(Refused, match=rf"{changed.name} has changed since the run was split"):
        load_test(SST2, flags(), record)
    changed.unlink()
    with pytest.raises(Refused, match=rf"{changed.name}: no such file.*, or name the items with --test-file$"):
        load_test(SST2, flags(), record)


def test_train_may_be_gone_where_test_is_a_file_of_its_own(files):
    splits = load(SST2, flags(**files))
    files["train_file"].unlink()
    assert load_test(SST2, flags(), saved(splits.record))[0] == splits.test


def test_flags_win_over_the_run_and_labels_may_be_missing(files):
    record = saved(load(SST2, flags(**files)).record)
    files["test_file"].write_text("index\tsentence\n0\ta warm film\n1\ta dull one\n")
    test, used = load_test(SST2, flags(test_file=files["test_file"], train_file=files["train_file"]), record)
    assert [(example.id, example.label) for example in test] == [("test-0", None), ("test-1", None)]
    assert used["splits"]["test"]["labels"] == {"unlabelled": 2}
    assert len(load_test(SST2, flags(sample=True), record)[0]) == SST2.sample_test[0]


def test_shots_never_hold_a_test_text(files):
    test, _ = load_test(SST2, flags(test_file=files["test_file"]), None)
    write_tsv(files["train_file"], [(test[0].text.upper(), 1), ("a warm film", 1), ("a dull film", 0)])
    shots = load_shots(SST2, flags(train_file=files["train_file"]), None, test)
    assert [example.id for example in shots] == ["train-1", "train-2"]


def test_hub_rows_and_their_unlabelled_test_split(monkeypatch):
    names = {"train": review_rows(40, 0), "validation": review_rows(5, 1, "v"), "test": [("what is this", None)]}
    asked = []

    def read_hub(dataset, split, revision):
        asked.append((dataset, split, revision))
        rows = [{"sentence": text, "label": label} for text, label in names[split]]
        record = {"dataset": dataset, "revision": revision or "c0ffee", "sha256": rows_sha256(rows), "rows": len(rows)}
        return Source(f"{dataset}[{split}]", rows, None, record)

    monkeypatch.setattr(texts, "read_hub", read_hub)
    splits = load(SST2, flags())
    assert asked == [(SST2.dataset, "train", None), (SST2.dataset, "validation", None)]
    assert ids(splits.test) == {f"validation-{row}" for row in range(15)}
    test, _ = load_test(SST2, flags(), saved(splits.record))
    assert test == splits.test
    assert asked[-1] == (SST2.dataset, "validation", "c0ffee")
    unlabelled, _ = load_test(SST2, flags(dataset="stanfordnlp/sst2:test"), None)
    assert [(example.id, example.label) for example in unlabelled] == [("test-0", None)]
    names["validation"] = names["validation"][::-1]
    with pytest.raises(Refused, match="stanfordnlp/sst2: its rows are not those the run was split from"):
        load_test(SST2, flags(), saved(splits.record))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real SST-2 files are not beside the repository")
def test_real_sst2():
    start = time.perf_counter()
    splits = load(
        SST2, flags(train_file=REAL / "train.tsv.gz", validation_file=REAL / "validation.tsv.gz", limit_train=6400)
    )
    seconds = time.perf_counter() - start
    assert counts(splits) == (6400, 872, 872)
    assert splits.record["sources"]["train"]["rows"] == 67349
    assert splits.record["sources"]["train"]["conflicting_texts"] == 5
    assert splits.record["removed_rows"]["train_rows_in_test"] == 0
    assert "872 of the 6,885 whole sentences of train are set aside for validation" in splits.record["notes"]
    # 1.2 s on one quiet core; the bound leaves room for a busy machine and still fails a quadratic search (minutes)
    assert seconds < 15
