"""Test the report of a run on texts with any number of labels, and a comparison of two, from fabricated folders."""

import math

import numpy as np
import pytest

from zerotune.files import read_json, write_json, write_json_lines
from zerotune.metrics.label_sets import label_set_metrics
from zerotune.report.comparison import read_comparison, write_comparison
from zerotune.report.label_parts import label_set_parts
from zerotune.report.run_report import print_run_table, write_report

NAMES = ("billing", "returns <i>", "login")


def write_evaluation(folder, share_right, seed=3, num_items=60):
    """Write predictions, right with probability `share_right`, and their metrics. Returns the lines."""
    rng, lines = np.random.default_rng(seed), []
    sets = np.random.default_rng(1).random((num_items, 3)) < (0.5, 0.3, 0.1)
    for number, held in enumerate(sets):
        given = held ^ (rng.random(3) > share_right)
        chosen = np.where(given, 0.6, 0.1 + 0.2 * rng.random(3))
        label, prediction = (np.flatnonzero(each).tolist() for each in (held, given))
        line = {"id": f"test-{number}", "label": label, "prediction": prediction}
        lines.append(line | {"scores": np.log(chosen).tolist()})
    lines[0] |= {"text": "charged <b>twice</b>", "label": [0], "prediction": [0, 1]}
    lines[0]["scores"] = [math.log(0.8), math.log(0.97), math.log(0.01)]
    folder.mkdir(parents=True)
    write_json_lines(folder / "predictions.jsonl", lines)
    metrics = label_set_metrics([each["label"] for each in lines], [each["prediction"] for each in lines], NAMES)
    write_json(folder / "metrics.json", {**metrics, "task": "classify", "setting": "classifier head", "seed": 0})
    return lines


@pytest.fixture
def run(tmp_path):
    write_evaluation(tmp_path / "eval/base", 0.6)
    lines = write_evaluation(tmp_path / "eval/final", 0.95)
    evaluated = {"step": 5, "eval_loss": 0.5, "eval_exact_match": 0.8, "eval_f1_micro": 0.9}
    write_json_lines(tmp_path / "metrics.jsonl", [{"step": 5, "loss": 1.0, "learning_rate": 0.1}, evaluated])
    return tmp_path, lines


def test_the_page_has_a_row_for_each_label_and_the_surest_wrong_decision(run):
    folder, lines = run
    page = write_report(folder, label_set_parts(NAMES)).read_text()
    has, gets = (sum(1 in line[key] for line in lines) for key in ("label", "prediction"))
    both = sum(1 in line["label"] and 1 in line["prediction"] for line in lines)
    row = page.split("tuned, 60 items")[1].split("returns &lt;i&gt;</th>")[1].split("</tr>")[0]
    assert [f'number">{each}</td>' in row for each in (has, gets, both)] == [True] * 3
    assert f"{100 * both / gets:.1f}" in row and "Confusion" not in page
    first = page.split('<ol class="examples"><li>')[1].split("</li>")[0]
    assert "returns &lt;i&gt; with probability 0.9700 · given billing, returns &lt;i&gt;, labelled billing" in first
    assert "charged &lt;b&gt;twice" in first
    assert "exact match went from" in page and "All labels right on the validation split" in page
    assert "F1 on billing" in page and "F1, micro" in page and "hamming loss" in page


def test_calibration_is_that_of_every_decision_about_a_label(run):
    folder, lines = run
    page = write_report(folder, label_set_parts(NAMES)).read_text()
    given, has = ([[number in line[key] for number in range(3)] for line in lines] for key in ("prediction", "label"))
    probabilities = np.exp([line["scores"] for line in lines])
    mean = 100 * np.where(given, probabilities, 1 - probabilities).mean()
    right = 100 * np.equal(given, has).mean()
    said = page.split("tuned: under-confident. Its decisions about a label")[1].split("</li>")[0]
    assert f"mean probability of {mean:.1f}" in said and f"and {right:.1f}" in said


def test_a_missing_label_is_a_wrong_decision_too(tmp_path):
    line = {"id": "a", "label": [2], "prediction": [], "scores": [math.log(0.3), math.log(0.3), math.log(0.25)]}
    folder = tmp_path / "eval/final"
    folder.mkdir(parents=True)
    write_json_lines(folder / "predictions.jsonl", [line])
    metrics = label_set_metrics([(2,)], [()], NAMES) | {"task": "classify", "setting": "classifier head"}
    write_json(folder / "metrics.json", metrics)
    page = write_report(tmp_path, label_set_parts(NAMES)).read_text()
    assert "not login with probability 0.7500 · given no label, labelled login" in page


def test_the_run_table(run, capsys):
    print_run_table(run[0], label_set_parts(NAMES))
    head, base, tuned, pair = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "exact_match" and head.split()[-3:] == ["f1_micro", "f1_macro", "items"]
    assert "60" in base and "60" in tuned and pair.startswith("on the 60 common items: exact_match +")


def test_a_comparison_tests_the_exact_match(run, tmp_path):
    folder, _ = run
    page = write_comparison(
        read_comparison([folder / "eval/base", folder / "eval/final"]), tmp_path / "compare"
    ).read_text()
    record = read_json(tmp_path / "compare/comparison.json")
    scores = [one["metrics"]["exact_match"] for one in record["evaluations"]]
    paired = record["paired"][0]
    assert [paired["accuracy_first"], paired["accuracy_second"]] == pytest.approx(scores)
    assert "exact_match" in page and "McNemar" in page
