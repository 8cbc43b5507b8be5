"""Test IMDB's reviews as published: markup, quotes, words for labels, repeats in train and test, the 70/10/20 split."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.tasks.imdb import IMDB, strip_markup
from zerotune.tasks.sample import FEWEST_SENTENCES, sample_reviews
from zerotune.tasks.splits import normalise_text
from zerotune.tasks.texts import load, load_shots, load_test

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "imdb"


def flags(**given) -> DataSettings:
    return DataSettings(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def write_csv(path: Path, rows, header=("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def reviews(num_rows: int, word: str) -> list[tuple[str, int]]:
    """Return reviews sorted by label, like the published files."""
    return [
        (f"{word} {number} was long.<br /><br />It ended.", int(number >= num_rows / 2)) for number in range(num_rows)
    ]


@pytest.fixture
def files(tmp_path):
    train, test = reviews(200, "film"), reviews(100, "picture")
    train[3] = (test[7][0].replace("<br /><br />", "\n"), train[3][1])  # a text that is in both files
    return {"train_file": write_csv(tmp_path / "train.csv", train), "test_file": write_csv(tmp_path / "test.csv", test)}


# --- a review ---


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Dull.<br /><br />Very dull.", "Dull.\nVery dull."),
        ("Dull. <BR> <br/>Very dull.", "Dull.\nVery dull."),
        ("<i>Ran</i> &amp; others &#8230; 5 &lt; 6", "Ran & others … 5 < 6"),
        ("I <3 it, <sigh> and 2 < 3 > 1", "I <3 it, <sigh> and 2 < 3 > 1"),
        ("<b>no</b> <spoiler>he dies</spoiler>", "no he dies"),
    ],
)
def test_markup_is_taken_out_and_nothing_else(written, read):
    assert strip_markup(written) == read


def test_a_review_of_markup_alone_is_empty(tmp_path):
    path = write_csv(tmp_path / "train.csv", [*reviews(20, "film"), ("<br /><br />", 1)])
    with pytest.raises(Refused, match="line 22: empty text"):
        load(IMDB, flags(train_file=path))


def test_quotes_newlines_and_words_for_labels(tmp_path):
    rows = [(f'"Quoted", no. {number}\nand "over" lines', ("negative", "positive")[number % 2]) for number in range(40)]
    path = write_csv(tmp_path / "IMDB.csv", rows, header=("review", "sentiment"))
    splits = load(IMDB, flags(train_file=path))
    everything = {row.id: row for part in (splits.train, splits.validation, splits.test) for row in part}
    assert len(everything) == 40 and splits.record["rule"] == "70-10-20"
    assert all(row.label == int(name.removeprefix("train-")) % 2 for name, row in everything.items())
    assert everything["train-5"].text == '"Quoted", no. 5\nand "over" lines'


def test_wrong_columns_name_all_that_would_do(tmp_path):
    path = write_csv(tmp_path / "train.csv", [("x", 1)], header=("body", "label"))
    texts = r"no column for the texts, 'text' \(or 'review', 'sentence'\); found "
    with pytest.raises(Refused, match=rf"{texts}'body', 'label'$"):
        load(IMDB, flags(train_file=path))
    path = write_csv(tmp_path / "train.csv", [("x", 1)], header=("body", "stars"))
    with pytest.raises(Refused, match=rf"{texts}'body', 'stars'; nor one for the labels, 'label' \(or 'sentiment'\)$"):
        load(IMDB, flags(train_file=path))


# --- the splits ---


def parts_of(splits):
    return splits.train, splits.validation, splits.test


def test_70_10_20_pools_both_files(files):
    splits = load(IMDB, flags(**files, split="70-10-20"))
    removed = splits.record["removed_rows"]
    assert len(splits.test) == 60 and len(splits.validation) + removed["validation_rows_in_test"] == 30
    assert sum(map(len, parts_of(splits))) + sum(removed.values()) == 300
    for part in (splits.validation, splits.test):
        assert {row.id.partition("-")[0] for row in part} == {"train", "test"}
        assert abs(sum(row.label for row in part) - len(part) / 2) <= 1
    texts = [{normalise_text(row.text) for row in part} for part in parts_of(splits)]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert splits.record["notes"][0] == "70-10-20 split of 300 rows"


def test_official_keeps_test_whole_and_takes_its_texts_out_of_train(files):
    splits = load(IMDB, flags(**files))
    assert [len(part) for part in parts_of(splits)] == [179, 20, 100]
    assert splits.record["removed_rows"]["train_rows_in_test"] == 1
    assert "removed 1 train rows that are also in test" in splits.record["notes"]


def test_balanced_sizes(files):
    splits = load(IMDB, flags(**files, train_size=50, validation_size=10, test_size=40))
    counts = [Counter(row.label for row in part) for part in parts_of(splits)]
    assert counts == [{0: 25, 1: 25}, {0: 5, 1: 5}, {0: 20, 1: 20}]
    other = load(IMDB, flags(**files, train_size=50, validation_size=10, test_size=40, split_seed=1))
    assert {row.id for row in other.test} != {row.id for row in splits.test}


@pytest.mark.parametrize("split", ["official", "80-20", "70-10-20"])
def test_a_run_is_rebuilt_from_its_split_record(files, split):
    given = {"train_file": files["train_file"]} if split == "80-20" else files
    splits = load(IMDB, flags(**given, split=split, train_size=40))
    record = json.loads(json.dumps(splits.record))
    test, _ = load_test(IMDB, flags(), record)
    assert test == splits.test
    fewer, of_fewer = load_test(IMDB, flags(test_size=10), record)
    assert Counter(row.label for row in fewer) == {0: 5, 1: 5} and {row.id for row in fewer} <= {row.id for row in test}
    assert of_fewer["splits"]["test"]["count"] == 10
    shots = load_shots(IMDB, flags(), record, test)
    assert {row.id for row in shots} == {row.id for row in splits.train}
    files["train_file"].write_text(files["train_file"].read_text() + "one more,1\n")
    if split == "official":
        load_test(IMDB, flags(), record)
    else:
        with pytest.raises(Refused, match=r"train.csv has changed"):
            load_test(IMDB, flags(), record)


def test_a_validation_file_is_refused_where_the_split_draws_one(files):
    with pytest.raises(Refused, match="--split 70-10-20 draws its validation rows"):
        load(IMDB, flags(**files, validation_file=files["test_file"], split="70-10-20"))


# --- the sample ---


def test_sample_reviews_have_markup_both_labels_and_no_giveaway():
    rows = sample_reviews(400, 1)
    assert rows == sample_reviews(400, 1) and rows != sample_reviews(400, 2)
    assert Counter(label for _, label in rows) == {0: 200, 1: 200}
    assert sum("<br />" in text for text, _ in rows) > 200
    assert {label for _, label in rows[:20]} == {0, 1}
    assert min(text.count(".") + text.count("?") for text, _ in rows) >= FEWEST_SENTENCES - 1


# --- the real files ---


@pytest.mark.skipif(not REAL.exists(), reason="the real IMDB files are not beside the repository")
def test_the_real_files():
    files = {"train_file": REAL / "train.csv.gz", "test_file": REAL / "test.csv.gz"}
    splits = load(IMDB, flags(**files))
    assert len(splits.test) == 25_000 and len(splits.validation) == round(0.1 * (25_000 - 123))
    removed = splits.record["removed_rows"]
    assert removed["train_rows_in_test"] == 123, "published: 123 texts are in both"
    assert not any("<br" in row.text for row in splits.train)
    pooled = load(IMDB, flags(**files, split="70-10-20"))
    assert len(pooled.test) == 10_000
    assert sum(map(len, parts_of(pooled))) + sum(pooled.record["removed_rows"].values()) == 50_000
