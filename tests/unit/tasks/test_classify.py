"""Test the user's own labels: which columns and labels are read, how rows are split, and what is refused."""

import csv
import json
import tracemalloc
from collections import Counter
from decimal import Decimal

import datasets
import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.tasks import classify
from zerotune.tasks.labels import label_word
from zerotune.tasks.texts import load_test

ODD_LABELS = ("no, thanks", "Müll", "a / b", "多字", "art", "art history")


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def rows_of(labels, each=10):
    return [(f"text {number} of {label}", label) for number in range(each) for label in labels]


@pytest.mark.parametrize("num_labels", [2, 3, 20])
def test_labels_are_those_of_the_rows_and_a_tenth_each_validates_and_tests(tmp_path, num_labels):
    labels = tuple(f"label {chr(97 + number)}" for number in range(num_labels))
    task, splits = classify.load(DataSettings(train_file=write_csv(tmp_path / "a.csv", rows_of(labels, 20))))
    assert task.labels == labels and all(wording.label_words == labels for wording in task.wordings)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [
        16 * num_labels, 2 * num_labels, 2 * num_labels
    ]  # fmt: skip
    assert all(Counter(row.label for row in part) == {label: size for label in range(num_labels)}
               for part, size in ((splits.train, 16), (splits.validation, 2), (splits.test, 2)))  # fmt: skip
    assert splits.record["splits"]["test"]["labels"] == dict.fromkeys(labels, 2)


def test_a_row_takes_little_more_than_its_text(tmp_path):
    """Measured: 433 bytes per row of 60 characters, and 890 when rows were dicts kept until the end."""
    rows = [(f"message {number:,} of a customer with a long story to tell us", number % 4) for number in range(5000)]
    settings = DataSettings(train_file=write_csv(tmp_path / "a.csv", rows))
    classify.load(settings)  # imports and caches
    tracemalloc.start()
    _, splits = classify.load(settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(splits.train) == 4000 and peak < 600 * len(rows)


def test_words_with_commas_spaces_and_any_script_are_labels(tmp_path):
    task, splits = classify.load(DataSettings(train_file=write_csv(tmp_path / "a.csv", rows_of(ODD_LABELS))))
    assert set(task.labels) == set(ODD_LABELS)
    assert {task.labels[row.label] for row in splits.train} == set(ODD_LABELS)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([1.0, 2.0, None], None),
        ([1.5, -0.5], ("-0.5", "1.5")),
        ([True, False], ("false", "true")),
        (["-1", "0", "1"], ("-1", "0", "1")),
        (["b ", " a", "a  c"], ("a", "a c", "b")),
    ],
)
def test_numbers_and_truth_values_are_labels_and_missing_ones_are_refused(tmp_path, values, labels):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"{number} {value}", "label": value} for number in range(12) for value in values]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if labels is None:
        with pytest.raises(Refused, match=r"line 3: no label, as in 12 of 36 rows; label every row"):
            classify.load(DataSettings(train_file=str(path)))
    else:
        assert classify.load(DataSettings(train_file=str(path)))[0].labels == labels


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (float("nan"), None),
        ("  ", None),
        (None, None),
        (3.0, "3"),
        (7, "7"),
        (Decimal("2.00"), "2"),  # of a NUMERIC column in parquet
        (Decimal("0.5"), "0.5"),
        (Decimal("NaN"), None),
    ],
)
def test_a_label_as_a_word(value, word):
    assert label_word(value, "here") == word


def test_a_parquet_file_of_pandas_gives_whole_numbers(tmp_path):
    rows = {"text": [f"text {number}" for number in range(30)], "label": [float(number % 3) for number in range(30)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    assert classify.load(DataSettings(train_file=str(tmp_path / "a.parquet")))[0].labels == ("0", "1", "2")


def test_a_label_with_one_row_is_trained_on(tmp_path):
    rows = [*rows_of(("a", "b"), 20), ("the only one", "rare")]
    task, splits = classify.load(DataSettings(train_file=write_csv(tmp_path / "a.csv", rows)))
    assert [task.labels[row.label] for row in splits.train].count("rare") == 1


def test_duplicates_across_splits_leave_train_and_are_counted(tmp_path):
    rows = rows_of(("a", "b"), 30)
    _, splits = classify.load(DataSettings(train_file=write_csv(tmp_path / "a.csv", [*rows, *rows])))
    texts = [{row.text for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    removed = splits.record["removed_rows"]
    assert removed["train_rows_in_test"] > 0 and removed["train_rows_in_validation"] > 0


def test_labels_named_in_another_order_keep_the_models():
    """Rows are drawn label by label."""
    assert (
        classify.labels_to_choose_from(("b", "a"), ("a", "b"))
        == ("a", "b")
        == classify.labels_to_choose_from(None, ("a", "b"))
    )
    assert (
        classify.labels_to_choose_from(("x", "y"), ("LABEL_0", "LABEL_1"))
        == ("x", "y")
        == classify.labels_to_choose_from(("x", "y"), None)
    )


def test_a_pair_of_columns_is_one_text_and_keeps_its_parts(tmp_path):
    rows = [(f"subject {number}", f"body {number}", "ab"[number % 2]) for number in range(40)]
    path = write_csv(tmp_path / "a.csv", rows, ("subject", "body", "queue"))
    _, splits = classify.load(DataSettings(train_file=path, text_column="subject, body", label_column="queue"))
    first = splits.train[0]
    number = first.id.removeprefix("train-")
    assert first.pair == (f"subject {number}", f"body {number}")
    assert first.text == f"subject: subject {number}\nbody: body {number}"


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (rows_of(("a",)), {}, "the only label is 'a', with nothing to tell apart"),
        ([("x", ""), ("y", "")], {}, "no row has a label: name the column of the labels with --label-column"),
        ([(f"x {n}", f"t {n}") for n in range(50)], {}, "50 different labels in 50 rows.*name another column"),
        (rows_of(("Spam", "spam")), {}, r"'Spam' \(10 rows\) and 'spam' \(10 rows\) differ only in case"),
        (rows_of(("spam", "sp\u200bam")), {}, r"'sp\\u200bam' \(10 rows\) differ only in invisible characters"),
        (rows_of(("a", "x_ci95")), {}, "a label cannot end in ci95"),
        (rows_of("ab"), {"label_column": "queue"}, "the labels, 'queue'; found 'text', 'label': .*--label-column"),
        (rows_of("ab"), {"text_column": "a,b,c"}, "a text is one column, or two with a comma between them"),
        (rows_of("ab"), {"text_column": "text,text"}, "--text-column text,text has text twice: name each column once"),
        (rows_of("ab"), {"text_column": "label"}, "--text-column label is also the column of the labels: name another"),
        (rows_of("ab"), {"text_column": "text, label", "label_column": "label"}, "--text-column label is"),
        (rows_of("ab"), {"label_column": "text"}, "--text-column text is also the column of the labels"),
        (rows_of("ab"), {"split": "80-20"}, "have no split '80-20'|has no split '80-20'"),
    ],
)  # fmt: skip
def test_what_gives_no_labels_is_refused(tmp_path, rows, given, message):
    with pytest.raises(Refused, match=message):
        classify.load(DataSettings(train_file=write_csv(tmp_path / "a.csv", rows), **given))


def test_an_unseen_label_is_named_with_its_line(tmp_path):
    files = {
        "train_file": write_csv(tmp_path / "a.csv", rows_of("ab")),
        "test_file": write_csv(tmp_path / "b.csv", [("x", "a"), ("y", "c")]),
    }
    with pytest.raises(Refused, match=r"b\.csv line 3: unknown label 'c'; the 2 labels are 'a', 'b'"):
        classify.load(DataSettings(**files))


def test_an_evaluation_takes_columns_and_items_of_the_run_and_the_models_labels(tmp_path):
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(60)]
    path = write_csv(tmp_path / "a.csv", rows, ("body", "queue"))
    _, splits = classify.load(DataSettings(train_file=path, text_column="body", label_column="queue"))
    run_split = json.loads(json.dumps(splits.record))
    task, settings = classify.task_to_evaluate(DataSettings(), classify.data_of_model(None, run_split), ("a", "b"))
    assert load_test(task, settings, run_split)[0] == splits.test
    other = write_csv(tmp_path / "b.csv", [("x", "b")], ("body", "queue"))
    task, settings = classify.task_to_evaluate(
        DataSettings(test_file=other), classify.data_of_model(None, run_split), ("a", "b")
    )
    assert [row.label for row in load_test(task, settings, run_split)[0]] == [1]


def test_columns_that_a_run_found_by_itself_are_those_of_other_files(tmp_path):
    """A later file may have columns with more usual names."""
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(60)]
    path = write_csv(tmp_path / "a.csv", rows, ("sentence", "category"))
    _, splits = classify.load(DataSettings(train_file=path))
    run_split = json.loads(json.dumps(splits.record))
    other = write_csv(tmp_path / "b.csv", [("no", "x", "a", "b")], ("text", "sentence", "label", "category"))
    given = DataSettings(test_file=other)
    task, settings = classify.task_to_evaluate(given, classify.data_of_model(None, run_split), ("a", "b"))
    (row,), _ = load_test(task, settings, run_split)
    assert (row.text, row.label) == ("x", 1)
    _, both = classify.load(DataSettings(train_file=path, test_file=other))
    assert [(row.text, row.label) for row in both.test] == [("x", 1)]


def test_a_copied_or_merged_model_knows_its_columns(tmp_path):
    """It lacks its run's split.json, and a common name for a text column must not be taken for its pair of columns."""
    columns = {"text_column": "subject,message", "label_column": "team", "glue": None, "label_separator": None}
    rows = [("a subject", "a message", "b")]
    path = write_csv(tmp_path / "b.csv", rows, ("subject", "message", "team"))
    of_run = classify.data_of_model({"columns": columns}, None)
    task, settings = classify.task_to_evaluate(DataSettings(test_file=path), of_run, ("a", "b"))
    (row,), _ = load_test(task, settings, None)
    assert row.text == "subject: a subject\nmessage: a message" and row.label == 1


def test_a_pair_keeps_the_names_it_was_tuned_with(tmp_path):
    """They are part of the text that a causal model reads: `subject: …`."""
    path = write_csv(tmp_path / "b.csv", [("a subject", "a message", "b")], ("title", "content", "team"))
    of_run = DataSettings(text_column="subject,message", label_column="team")
    for source in (DataSettings(glue="mrpc"), of_run):
        tuned_on = classify.task_of(source).pair_columns
        given = DataSettings(test_file=path, text_column="title,content", label_column="team")
        task, settings = classify.task_to_evaluate(given, source, ("a", "b"))
        (row,), _ = load_test(task, settings, None)
        assert row.text == f"{tuned_on[0]}: a subject\n{tuned_on[1]}: a message"
    with pytest.raises(Refused, match=r"--text-column content: .* tuned on subject and message: name two columns"):
        classify.task_to_evaluate(DataSettings(test_file=path, text_column="content"), of_run, ("a", "b"))
    with pytest.raises(Refused, match=r"--text-column title,content: .* tuned on text: name one column"):
        classify.task_to_evaluate(given, classify.data_of_model({"columns": {}}, None), ("a", "b"))
    assert classify.task_to_evaluate(given, classify.data_of_model(None, None), ("a", "b"))[0].pair_column == "content"


def test_a_label_column_that_is_named_must_be_there(tmp_path):
    """One that the run had may be missing: then the items are unlabelled."""
    path = write_csv(tmp_path / "b.csv", [("x", "b")], ("text", "queue"))
    named = DataSettings(test_file=path, label_column="queu")
    task, settings = classify.task_to_evaluate(named, None, ("a", "b"))
    with pytest.raises(Refused, match=r"no column for the labels, 'queu'"):
        load_test(task, settings, None)
    shots = write_csv(tmp_path / "a.csv", [("x", "b")], ("text", "queu"))
    named = DataSettings(test_file=path, label_column="queu", train_file=shots)
    task, settings = classify.task_to_evaluate(named, None, ("a", "b"))
    assert load_test(task, settings, None)[0][0].label is None, "the column is that of the shots"
    of_run = DataSettings(label_column="team")
    task, settings = classify.task_to_evaluate(DataSettings(test_file=path), of_run, ("a", "b"))
    assert load_test(task, settings, None)[0][0].label is None


@pytest.mark.parametrize("labels", [("spam",), ("spam", "spam"), ("a", "b", "a")])
def test_labels_that_leave_no_choice_are_refused(tmp_path, labels):
    path = write_csv(tmp_path / "b.csv", [("x", "spam")])
    with pytest.raises(Refused, match="wanted two or more different labels"):
        classify.task_to_evaluate(DataSettings(test_file=path), None, labels)


def test_a_lone_row_of_a_label_is_trained_on(tmp_path):
    files = {
        "train_file": write_csv(tmp_path / "a.csv", [*rows_of("ab", 100), ("rare", "c")]),
        "test_file": write_csv(tmp_path / "b.csv", [("x", "a"), ("y", "b")]),
    }
    task, splits = classify.load(DataSettings(**files))
    assert task.labels == ("a", "b", "c")
    assert {row.label for row in splits.train} == {0, 1, 2} and {row.label for row in splits.validation} == {0, 1}


def test_one_word_in_two_unicode_forms_is_one_label(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    rows = [(f"text {n}", (composed, decomposed, "bar")[n % 3]) for n in range(30)]
    task, splits = classify.load(DataSettings(train_file=write_csv(tmp_path / "a.csv", rows)))
    assert task.labels == ("bar", composed)
    assert {row.label for row in splits.train} == {0, 1}
    path = write_csv(tmp_path / "b.csv", [("x", decomposed), ("y", composed)])
    task, settings = classify.task_to_evaluate(DataSettings(test_file=path), None, ("bar", decomposed))
    assert [row.label for row in load_test(task, settings, None)[0]] == [1, 1]


def test_a_model_without_labels_is_asked_for_those_of_the_rows(tmp_path):
    test = write_csv(tmp_path / "b.csv", rows_of(("x", "y"), 3))
    assert classify.task_to_evaluate(DataSettings(test_file=test), None, None)[0].labels == ("x", "y")
    train = write_csv(tmp_path / "a.csv", rows_of(("x", "y", "z")))
    settings = DataSettings(test_file=test, train_file=train)
    assert classify.task_to_evaluate(settings, None, None)[0].labels == ("x", "y", "z")


def test_items_without_labels_for_a_model_without_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(Refused, match=r": name the columns with .*, or the labels with --labels$"):
        classify.task_to_evaluate(DataSettings(test_file=str(path)), None, None)


def test_glue_tasks_know_their_columns_and_labels(tmp_path):
    rows = [(f"one {number}", f"two {number}", number % 2) for number in range(40)]
    path = write_csv(tmp_path / "a.csv", rows, ("sentence1", "sentence2", "label"))
    task, splits = classify.load(DataSettings(train_file=path, glue="mrpc", split="80-10-10"))
    assert task.labels == ("not_equivalent", "equivalent") and splits.train[0].pair[0].startswith("one")
    assert all(classify.GLUE[name].dataset == f"nyu-mll/glue/{name}" for name in classify.GLUE)


def test_hub_classes_keep_their_order(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    columns = {"text": [f"text {number}" for number in range(40)], "label": [number % 2 for number in range(40)]}
    asked = []

    def load_dataset(name, configuration, split, revision):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task, _ = classify.load(DataSettings(dataset="org/set/small", split="80-10-10"))
    assert task.labels == ("z", "a") and asked == [("org/set", "small", "train")]
