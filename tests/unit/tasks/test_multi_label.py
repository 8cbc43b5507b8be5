"""Test --multi-label: how a row's labels are read, how rows are split, and what is refused."""

import csv
import json
from collections import Counter

import datasets
import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.tasks import classify
from zerotune.tasks.labels import label_words
from zerotune.tasks.sample import sample_ticket_queues, sample_tickets
from zerotune.tasks.texts import load_test


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def several(each=12):
    """Return rows with zero, one and two of three labels."""
    kinds = ([], ["a"], ["b"], ["c"], ["a", "b"], ["b", "c"])
    return [{"text": f"{number} {kind}", "labels": kind} for number in range(each) for kind in kinds]


def load(path, **given):
    return classify.load(DataSettings(train_file=path, multi_label=True, **given))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["a", "b"], ["a", "b"]),
        ([], []),
        ("a, b ,c d", ["a", "b", "c d"]),
        ("a,,a", ["a"]),
        ("", []),
        ("  ", []),
        (3.0, ["3"]),
        ([2, True, "x, y"], ["2", "true", "x, y"]),
        (None, None),
        (float("nan"), None),
    ],
)
def test_labels_of_a_row(value, words):
    assert label_words(value, ",", "here") == words


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("['a', 'b']", r"here: the labels are \"\['a', 'b'\]\": write them with ',' between them and without brackets"),
        (["a", None], "here: one of the 2 labels is missing: leave it out, or fill it in"),
        (["a", " "], "one of the 2 labels is missing"),
        (
            [0.0, 1.0, 0.0],
            r"here: the labels are \[0.0, 1.0, 0.0\], which looks like a 0 for each label: write the",
        ),
        ([True, False, True], "which looks like a true for each label"),
        ([0, 0], "which looks like a 0 for each label"),
        ("1,0,1", "the labels are 1,0,1, which looks like a 1 for each label"),
        ([["a"]], r"here: the labels are \[\['a'\]\], a list in a list: give one list of labels a row"),
        ({"a": 1}, r"here: the label is dict"),
    ],
)
def test_values_that_are_no_labels_are_refused(value, message):
    with pytest.raises(Refused, match=message):
        label_words(value, ",", "here")


def test_lists_and_separated_words_and_parquet_give_the_same_rows(tmp_path):
    rows = several()
    task, splits = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert task.labels == ("a", "b", "c") and task.multi_label
    assert {row.label for row in splits.train} == {(), (0,), (1,), (2,), (0, 1), (1, 2)}
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "labels"], *([row["text"], "; ".join(row["labels"])] for row in rows)])
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for path, given in ((tmp_path / "a.csv", {"label_separator": ";"}), (tmp_path / "a.parquet", {})):
        same = load(str(path), **given)[1]
        assert (same.train, same.validation, same.test) == (splits.train, splits.validation, splits.test)


def test_a_label_that_holds_the_separator_is_refused(tmp_path):
    rows = [{"text": row["text"], "labels": [f"{label}, x" for label in row["labels"]]} for row in several()]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(Refused, match=r"the label 'a, x' holds ',', .* name another --label-separator"):
        load(path)
    assert load(path, label_separator=";")[0].labels == ("a, x", "b, x", "c, x")


def test_a_copied_model_knows_the_separator_of_its_labels(tmp_path):
    """task.json of a final/ alone has the columns, and the model's configuration that it gives several labels."""
    columns = {"text_column": None, "label_column": None, "glue": None, "label_separator": ";"}
    path = tmp_path / "b.csv"
    path.write_text("text,label\nx,a;b\ny,\n")
    of_run = classify.data_of_model({"columns": columns}, None)
    task, settings = classify.task_to_evaluate(DataSettings(test_file=str(path)), of_run, ("a", "b"), multi_label=True)
    assert [row.label for row in load_test(task, settings, None)[0]] == [(0, 1), ()]


def test_split_json_counts_the_rows_with_each_label_and_those_without(tmp_path):
    _, splits = load(write_jsonl(tmp_path / "a.jsonl", several(20)))
    parts = splits.record["splits"]
    assert [parts[name]["count"] for name in ("train", "validation", "test")] == [96, 12, 12]
    found = Counter(label for row in splits.test for label in row.labels)
    assert parts["test"]["labels"] == {"a": found[0], "b": found[1], "c": found[2]}
    assert sum(part["without_label"] for part in parts.values()) == 20
    # a tenth of the 40, 60 and 40 rows with a label
    assert all(abs(found[label] - wanted) <= 2 for label, wanted in ((0, 4), (1, 6), (2, 4)))


def test_the_only_row_of_a_label_is_trained_on(tmp_path):
    rows = [*several(20), {"text": "one of its kind", "labels": ["rare", "b"]}]
    for seed in range(5):
        task, splits = load(write_jsonl(tmp_path / "a.jsonl", rows), split_seed=seed)
        assert sum(task.labels.index("rare") in row.labels for row in splits.train) == 1
    test = write_jsonl(tmp_path / "b.jsonl", several(2))
    _, splits = load(write_jsonl(tmp_path / "a.jsonl", rows), test_file=test)
    assert any(row.text == "one of its kind" for row in splits.train), "nor does the validation slice take it"


def test_hub_lists_of_classes_keep_their_names_and_order(monkeypatch):
    classes = datasets.ClassLabel(names=["z", "a", "never"])
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.List(classes)})
    columns = {"text": [f"text {n}" for n in range(60)], "labels": [[[], [0], [1], [0, 1]][n % 4] for n in range(60)]}
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, split, revision: table)
    task, _ = classify.load(DataSettings(dataset="org/set", split="80-10-10", multi_label=True))
    assert task.labels == ("z", "a")


def test_an_unseen_label_is_named_with_its_line(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", several())
    test = write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "labels": ["a"]}, {"text": "y", "labels": ["b", "d"]}])
    with pytest.raises(Refused, match=r"b\.jsonl line 2: unknown label 'd'; the 3 labels are 'a', 'b', 'c'"):
        load(train, test_file=test)


def test_a_row_without_labels_and_one_whose_labels_are_missing_differ(tmp_path):
    rows = [*several(), {"text": "missing", "labels": None}]
    with pytest.raises(Refused, match=r"line 73: no label, as in 1 of 73 rows; label every row"):
        load(write_jsonl(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("value", [None, "", []])
def test_rows_of_which_none_has_a_label_are_unlabelled(tmp_path, value):
    train = write_jsonl(tmp_path / "a.jsonl", several())
    test = write_jsonl(tmp_path / "b.jsonl", [{"text": f"x {n}", "labels": value} for n in range(3)])
    settings = DataSettings(test_file=test, multi_label=True)
    task, settings = classify.task_to_evaluate(settings, None, ("a", "b", "c"))
    assert [row.label for row in load_test(task, settings, None)[0]] == [None] * 3
    with pytest.raises(Refused, match="the rows have no labels; a run reports on labelled rows"):
        load(train, test_file=test)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"glue": "mnli"}, "--glue mnli has one label for each text: leave --multi-label out"),
        ({"multi_label": False, "label_separator": ";"}, "add --multi-label, or leave it out"),
        ({"train_size": 10}, "--train-size 10: a balanced subset .* use --limit-train"),
        ({"validation_size": 10, "split": "official"}, "--validation-size 10: a balanced subset"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, given, message):
    path = write_jsonl(tmp_path / "a.jsonl", several())
    if given.get("split") == "official":
        given = given | {"test_file": write_jsonl(tmp_path / "b.jsonl", several(1))}
    with pytest.raises(Refused, match=message):
        classify.load(DataSettings(train_file=path, **{"multi_label": True} | given))


def test_one_label_is_too_few(tmp_path):
    rows = [{"text": f"text {number}", "labels": ["a"][: number % 2]} for number in range(30)]
    with pytest.raises(Refused, match="the only label is 'a', with nothing to tell apart: give rows with two labels"):
        load(write_jsonl(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("values", [([0, 1], [1, 0]), ("1,0", "0,1"), ([True, False], [])])
def test_one_of_two_labels_is_not_two_labels(tmp_path, values):
    rows = [{"text": f"text {number}", "labels": values[number % 2]} for number in range(30)]
    with pytest.raises(Refused, match="which look like one for each of two labels: write the names"):
        load(write_jsonl(tmp_path / "a.jsonl", rows))


def test_two_numbers_may_be_labels(tmp_path):
    rows = [{"text": f"text {number}", "labels": [[0, 1], [1], []][number % 3]} for number in range(30)]
    assert load(write_jsonl(tmp_path / "a.jsonl", rows))[0].labels == ("0", "1")


def test_an_evaluation_reads_labels_as_the_run_or_the_model_does(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        rows = ([row["text"], "|".join(row["labels"])] for row in several(20))
        csv.writer(file).writerows([["text", "topics"], *rows])
    _, splits = load(str(path), label_separator="|", label_column="topics")
    run_split = json.loads(json.dumps(splits.record))
    task, settings = classify.task_to_evaluate(DataSettings(), classify.data_of_model(None, run_split), ("a", "b", "c"))
    assert task.multi_label and load_test(task, settings, run_split)[0] == splits.test
    test = write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "labels": "c,a"}])
    task, settings = classify.task_to_evaluate(
        DataSettings(test_file=test), DataSettings(), ("a", "b", "c"), multi_label=True
    )
    assert [row.label for row in load_test(task, settings, None)[0]] == [(0, 2)]


def test_limits_keep_the_labels_shares(tmp_path):
    _, splits = load(write_jsonl(tmp_path / "a.jsonl", several(20)), limit_train=48, limit_eval=6)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [48, 6, 6]
    assert Counter(label for row in splits.train for label in row.labels)[1] == pytest.approx(24, abs=1)


def test_sample_messages_belong_to_all_queues_that_they_are_about():
    with_one, with_all = sample_tickets(300, 4), sample_ticket_queues(300, 4)
    assert [text for text, _ in with_one] == [text for text, _ in with_all]
    assert all(one in several for (_, one), (_, several) in zip(with_one, with_all, strict=True))
    assert {len(queues) for _, queues in with_all} == {1, 2}
