"""Test SQuAD's splits: articles stay whole, no test data is trained on, and split.json rebuilds the items."""

import json
from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.squad.files import parse_questions
from zerotune.squad.sample import sample_articles
from zerotune.squad.splits import draw_articles, first_paragraphs, load, load_test


def flags(**given) -> DataSettings:
    return DataSettings(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


@pytest.fixture
def files(tmp_path):
    paths = {}
    for name, num_questions, seed in (("train", 900, 1), ("validation", 120, 2), ("test", 100, 4)):
        paths[f"{name}_file"] = tmp_path / f"{name}.json"
        paths[f"{name}_file"].write_text(json.dumps(sample_articles(num_questions, seed)))
    return paths


def articles(questions):
    return {question.paragraph.article for question in questions}


def ids(questions):
    return [question.id for question in questions]


def kinds(questions):
    return {bool(question.answers) for question in questions}


def test_a_slice_of_train_validates_by_article(files):
    splits = load(flags(train_file=files["train_file"], test_file=files["test_file"]))
    assert len(splits.test) == 100 and len(splits.train) + len(splits.validation) == 900
    assert not articles(splits.train) & articles(splits.validation)
    assert 0.05 * 900 <= len(splits.validation) < 0.08 * 900
    assert kinds(splits.validation) == {True, False}
    assert splits.record["splits"]["validation"]["articles"] == len(articles(splits.validation))
    num_articles = len(articles(splits.validation))
    said = f"{len(splits.validation)} questions of {num_articles} articles leave train for validation"
    assert any(note.startswith(said) and note.endswith("%)") for note in splits.record["notes"])
    other = load(flags(train_file=files["train_file"], test_file=files["test_file"], split_seed=1))
    assert ids(other.validation) != ids(splits.validation) and ids(other.test) == ids(splits.test)


def test_given_files_validate_and_report(files):
    splits = load(flags(**files))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (900, 120, 100)
    alone = load(flags(train_file=files["train_file"], validation_file=files["validation_file"]))
    said = "no --test-file: --validation-file is the test"
    assert len(alone.test) == 120 and any(said in note for note in alone.record["notes"])


@pytest.mark.parametrize("name", ["validation", "train"])
def test_one_file_for_two_parts_is_refused_for_what_it_is(files, name):
    with pytest.raises(Refused, match=rf"the {name} and the test questions are the same \(.*{name}.json\): give"):
        load(flags(**files | {"test_file": files[f"{name}_file"]}))


def test_80_20_keeps_articles_whole(files):
    splits = load(flags(train_file=files["train_file"]))
    assert splits.record["rule"] == "80-20"
    assert 0.2 * 900 <= len(splits.test) < 0.22 * 900
    sides = [articles(part) for part in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*sides)) == sum(map(len, sides))
    assert not any("not comparable" in note for note in splits.record["notes"])


def test_a_random_split_says_that_it_is_not_comparable(files):
    splits = load(flags(train_file=files["train_file"], split="random"))
    assert len(splits.test) == 180
    assert articles(splits.train) & articles(splits.test)
    assert not articles(splits.train) & articles(splits.validation)
    assert any("paragraphs are on both sides: not comparable" in note for note in splits.record["notes"])


def test_paragraphs_of_test_leave_train(tmp_path, files):
    value = json.loads(files["train_file"].read_text())
    copied = json.loads(files["test_file"].read_text())["data"][0]
    for paragraph in copied["paragraphs"]:
        paragraph["context"] = f"{paragraph['context']} "
        for qa in paragraph["qas"]:
            qa["id"] = f"copy of {qa['id']}"
    value["data"].append(copied)
    num_copied = sum(len(paragraph["qas"]) for paragraph in copied["paragraphs"])
    files["train_file"].write_text(json.dumps(value))
    splits = load(flags(**files))
    assert len(splits.train) == 900 and splits.record["removed_rows"]["train_rows_in_test"] == num_copied
    assert f"removed {num_copied} train questions about paragraphs that are also in test" in splits.record["notes"]


@pytest.mark.parametrize("split", ["official", "80-20", "random"])
def test_the_items_of_a_run_are_rebuilt(files, split):
    given = {"test_file": files["test_file"]} if split == "official" else {}
    splits = load(flags(train_file=files["train_file"], split=split, **given))
    record = json.loads(json.dumps(splits.record))
    test, of_test = load_test(flags(), record)
    assert ids(test) == ids(splits.test)
    assert of_test["splits"]["test"] == record["splits"]["test"]
    fewer, _ = load_test(flags(limit_eval=10), record)
    assert len(fewer) == 10 and set(ids(fewer)) < set(ids(test))
    source = files["test_file" if split == "official" else "train_file"]
    source.write_text(source.read_text() + " ")
    with pytest.raises(Refused, match="has changed since the run was split"):
        load_test(flags(), record)


def test_sizes_are_balanced_and_limits_keep_paragraphs(files):
    splits = load(flags(**files, train_size=100, test_size=20))
    for part, size in ((splits.train, 100), (splits.test, 20)):
        assert len(part) == size and sum(bool(question.answers) for question in part) == size // 2
    with pytest.raises(Refused, match=r"--train-size 800: a balanced subset needs 400"):
        load(flags(**files, train_size=800))
    limited = load(flags(**files, limit_train=100, limit_eval=30))
    assert [len(part) for part in (limited.train, limited.validation, limited.test)] == [100, 30, 30]
    files.pop("validation_file")
    for given, number in (({"limit_eval": 30}, 30), ({"validation_size": 20}, 20)):
        drawn = load(flags(**files, **given))
        assert len(drawn.validation) == number
        assert any(note.endswith(f"%); {number} of them validate") for note in drawn.record["notes"])


def test_limits_take_whole_paragraphs():
    questions = parse_questions(sample_articles(200, 1), "sample")
    some = first_paragraphs(questions, 40, seed=0, purpose="test")
    assert ids(some) == [each for each in ids(questions) if each in set(ids(some))]
    sizes = {each.paragraph: sum(other.paragraph is each.paragraph for other in questions) for each in some}
    cut = [each for each in sizes if sum(other.paragraph is each for other in some) < sizes[each]]
    assert len(some) == 40 and len(cut) <= 1
    assert first_paragraphs(questions, 500, seed=0, purpose="test") == questions
    assert set(ids(some)) < set(ids(first_paragraphs(questions, 90, seed=0, purpose="test")))


def test_the_first_article_drawn_has_questions_of_both_kinds():
    """Otherwise no threshold could be chosen: eight of ten official train articles have only answerable questions."""
    value = sample_articles(900, 1)
    for article in value["data"][:-3]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [qa for qa in paragraph["qas"] if qa["answers"]]
    questions = parse_questions(value, "sample")
    for seed in range(10):
        rest, drawn = draw_articles(questions, 0.01, seed, "validation")
        assert kinds(drawn) == kinds(rest) == {True, False}
        assert sorted(ids(rest) + ids(drawn)) == sorted(ids(questions))


def test_what_cannot_be_split_is_refused(tmp_path, files):
    one = {"data": json.loads(files["train_file"].read_text())["data"][:1]}
    lone = tmp_path / "one.json"
    lone.write_text(json.dumps(one))
    with pytest.raises(Refused, match=r"the test split is drawn by article, .* are of 1; give more articles"):
        load(flags(train_file=lone))
    copy = tmp_path / "copy.json"  # the same paragraphs under other ids
    copy.write_text(lone.read_text().replace('"sample-1-', '"copy-'))
    for sizes in ({}, {"train_size": 10}):
        with pytest.raises(Refused, match="the train split: no questions are left"):
            load(flags(train_file=lone, test_file=copy, validation_file=files["validation_file"], **sizes))
    with pytest.raises(Refused, match=r"the id 'sample-1-0-0-0' occurs in .*train\.json and in .*train\.json"):
        longer = tmp_path / "longer-train.json"
        longer.write_text(files["train_file"].read_text() + "\n")
        load(flags(train_file=files["train_file"], test_file=longer))
    with pytest.raises(Refused, match="SQuAD v2 has no split '70-10-20'; choose official or random or 80-20"):
        load(flags(train_file=files["train_file"], split="70-10-20"))
    with pytest.raises(Refused, match="--split random draws its test rows from train"):
        load(flags(train_file=files["train_file"], test_file=files["test_file"], split="random"))


def test_unanswered_questions_can_be_predicted_but_not_reported(tmp_path, files):
    value = json.loads(files["test_file"].read_text())
    for article in value["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [{"id": qa["id"], "question": qa["question"]} for qa in paragraph["qas"]]
    blind = tmp_path / "blind.json"
    blind.write_text(json.dumps(value))
    with pytest.raises(Refused, match=r"its questions have no answers; .*predict these with eval/qa\.py"):
        load(flags(train_file=files["train_file"], test_file=blind))
    test, record = load_test(flags(test_file=blind), None)
    assert {question.answers for question in test} == {None}
    assert record["splits"]["test"]["labels"] == {"unlabelled": 100}
