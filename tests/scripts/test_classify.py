"""Run train/classify.py and eval/classify.py as processes: the user's own labels and columns, with both heads."""

import csv
import json

import pytest

from zerotune.files import read_json_lines
from zerotune.tasks.sample import sample_tickets

# Commas, spaces, any script, and a label that is a prefix of another.
NAMES = {"account": "log in, password", "billing": "Rechnung Ü", "delivery": "post", "returns": "post office"}


def write_csv(path, rows, header):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def tickets(workplace):
    """Write 240 messages under the user's own column names."""
    rows = [(number, text, NAMES[queue]) for number, (text, queue) in enumerate(sample_tickets(240, 5))]
    return write_csv(workplace.folder / "tickets.csv", rows, ("ticket", "body", "queue"))


def start(workplace, script, name, *flags, world=1, expect=0):
    more = ["--precision", "fp32", "--output-dir", workplace.folder / name, *flags]
    ended = workplace.server.start(script, more, workplace.folder / name, world=world).wait()
    assert set(ended.codes) == {expect}, ended.text()
    return ended


def train(workplace, tickets, name, *flags, **how):
    columns = ["--text-column", "body", "--label-column", "queue"]
    more = ["--model", workplace.model, "--train-file", tickets, *columns, "--epochs", 2, "--learning-rate", 2e-3]
    return start(workplace, "train/classify.py", name, *more, *flags, **how)


@pytest.fixture(scope="module")
def run(workplace, tickets):
    return train(workplace, tickets, "tickets")


def test_a_run_says_and_keeps_its_labels(run):
    assert "4 labels, with their training rows: Rechnung Ü (" in run.text() and '"log in, password" (' in run.text()
    task, config = run.read_json("final/task.json"), run.read_json("final/config.json")
    assert task["task"] == "classify" and sorted(task["labels"]) == sorted(NAMES.values())
    assert [config["id2label"][str(number)] for number in range(4)] == task["labels"]
    split = run.read_json("split.json")
    assert split["rule"] == "80-10-10" and split["settings"]["text_column"] == "body"
    metrics = run.read_json("eval/final/metrics.json")
    assert metrics["accuracy"] > 0.5 and len(metrics["confusion"]) == 4
    assert all(f"accuracy_{label}_ci95" in metrics for label in task["labels"])
    page = (run.folder / "report.html").read_text()
    assert "predicted Rechnung Ü" in page and "Matthews" in page


def test_the_runs_items_and_columns_are_known_to_its_evaluation(workplace, tickets, run):
    done = start(workplace, "eval/classify.py", "tickets-again", "--model", run.folder / "final", world=2)
    same = (run.folder / "eval/final/predictions.jsonl").read_text()
    assert (done.folder / "predictions.jsonl").read_text() == same
    rows = [("the parcel is late",), ("my card was charged twice",)]
    new = write_csv(workplace.folder / "new.csv", rows, ("body",))
    done = start(workplace, "eval/classify.py", "new", "--model", run.folder / "final", "--test-file", new)
    lines = read_json_lines(done.folder / "predictions.jsonl", dict)
    assert len(lines) == 2 and all(line["label"] is None and 0 <= line["prediction"] < 4 for line in lines)
    new = write_csv(workplace.folder / "unseen.csv", [("a text", "legal")], ("body", "queue"))
    refused = start(workplace, "eval/classify.py", "x", "--model", run.folder / "final", "--test-file", new, expect=2)
    assert "unseen.csv line 2: unknown label 'legal'; the 4 labels are" in refused.refusal()


def test_flags_that_the_runs_items_would_ignore_are_refused(workplace, tickets, run):
    model = ["--model", run.folder / "final"]
    for flags, words in (
        (["--multi-label"], "was trained to give a text exactly one label: leave the flag out"),
        (["--train-file", tickets], "name the items to score with --test-file"),
        (["--glue", "cola", "--text-column", "body"], "--glue cola is not the task of the model's run"),
        (["--split-seed", 1], "--split-seed 1 is for drawing a --split or a subset"),
    ):
        refused = start(workplace, "eval/classify.py", "ignored", *model, *flags, expect=2)
        assert words in refused.refusal() and not refused.folder.exists()
    drawn = ["--train-file", tickets, "--split", "80-10-10", "--split-seed", 1]
    done = start(workplace, "eval/classify.py", "drawn", *model, *drawn)
    assert "the model was trained on rows of this file or split" in done.text()


def test_a_generator_writes_the_labels_own_words(workplace, tickets):
    run = train(workplace, tickets, "tickets-generate", "--head", "generate", "--max-steps", 4, "--limit-eval", 12)
    task = run.read_json("final/task.json")
    assert task["prompt"]["label_words"] == task["labels"] and "post office" in task["prompt"]["instruction"]
    flags = ["--model", run.folder / "final", "--limit-eval", 12, "--answer-by", "generation"]
    done = start(workplace, "eval/classify.py", "tickets-written", *flags)
    assert done.read_json("metrics.json")["head"] == "generate"


def test_a_model_as_published_is_asked_for_the_labels_of_the_rows(workplace, tickets):
    flags = ["--model", workplace.model, "--test-file", tickets, "--train-file", tickets, "--limit-eval", 20]
    flags += ["--text-column", "body", "--label-column", "queue"]
    done = start(workplace, "eval/classify.py", "few", *flags, "--shots", 4)
    assert len(done.read_json("metrics.json")["shot_ids"]) == 4
    done = start(workplace, "eval/classify.py", "zero", *flags, "--calibrate", "contextual")
    metrics = done.read_json("metrics.json")
    assert sorted(metrics["label_words"]) == sorted(NAMES.values()) and metrics["instruction"].startswith("Give each")


def test_the_other_scripts_point_here(workplace, tickets):
    rows = [json.dumps({"text": "a text", "label": "spam"})] * 3
    path = workplace.folder / "spam.jsonl"
    path.write_text("\n".join(rows))
    more = ["--model", workplace.model, "--train-file", path]
    refused = start(workplace, "train/imdb.py", "spam", *more, expect=2)
    assert "unknown label 'spam'; wanted 0 (negative) or 1 (positive), or train/classify.py" in refused.refusal()
