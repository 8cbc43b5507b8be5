"""Run eval/qa.py --score as a real process: it scores a prediction file without a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zerotune.squad.sample import sample_articles

REPOSITORY = Path(__file__).parents[2]


def score(folder, *arguments):
    command = [sys.executable, REPOSITORY / "eval" / "qa.py", "--output-dir", folder / "out", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.fixture
def files(tmp_path):
    """Write sample questions, and predictions: every second one is right, the others give no answer."""
    value = sample_articles(40, 2)
    questions = [qa for article in value["data"] for block in article["paragraphs"] for qa in block["qas"]]
    predictions = {
        qa["id"]: qa["answers"][0]["text"] if qa["answers"] and number % 2 else ""
        for number, qa in enumerate(questions)
    }
    (tmp_path / "dev.json").write_text(json.dumps(value))
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    return value, questions, predictions


def test_a_file_is_scored_and_written_as_an_evaluation(tmp_path, files):
    _, questions, predictions = files
    result = score(tmp_path, "--score", "predictions.json", "--test-file", "dev.json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    right = sum(bool(predictions[qa["id"]]) or not qa["answers"] for qa in questions)
    num_impossible = sum(not qa["answers"] for qa in questions)
    assert metrics["exact"] == metrics["f1"] == 100 * right / 40
    assert metrics["NoAns_exact"] == 100 and metrics["NoAns_total"] == num_impossible
    assert metrics["total"] == metrics["count"] == 40 and metrics["task"] == "squad"
    assert metrics["rouge1_ci95"][0] < metrics["rouge1"] == pytest.approx(metrics["HasAns_f1"])
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == predictions
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [qa["id"] for qa in questions]
    assert sum(line["exact"] for line in lines) == right
    groups = json.loads((tmp_path / "out" / "breakdown.json").read_text())
    assert all(sum(group["total"] for group in part.values()) == 40 for part in groups.values())
    assert json.loads((tmp_path / "out" / "state.json").read_text())["state"] == "finished"
    assert f"answering no question would score {100 * num_impossible / 40:.2f}" in result.stdout
    again = score(tmp_path, "--score", "predictions.json", "--test-file", "dev.json")
    assert again.returncode == 0 and again.stdout == result.stdout
    other = score(tmp_path, "--score", "predictions.json", "--test-file", "dev.json", "--split-seed", 1)
    assert other.returncode == 2 and "--split-seed was 0, is 1" in other.stderr


def test_unknown_predictions_are_counted_and_missing_ones_refused(tmp_path, files):
    _, questions, predictions = files
    (tmp_path / "more.json").write_text(json.dumps(predictions | {"elsewhere": "x"}))
    result = score(tmp_path, "--score", "more.json", "--test-file", "dev.json")
    assert result.returncode == 0 and "1 predictions are for no question here and do not count" in result.stdout
    (tmp_path / "fewer.json").write_text(json.dumps({questions[0]["id"]: ""}))
    result = score(tmp_path, "--score", "fewer.json", "--test-file", "dev.json", "--output-dir", tmp_path / "fewer")
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(f"refused: fewer.json: no prediction for 39 of 40 questions, {questions[1]['id']!r} first")
    assert not (tmp_path / "fewer").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--score", "absent.json", "--test-file", "dev.json"), "absent.json: no such file"),
        (
            ("--score", "dev.json", "--test-file", "dev.json"),
            "dev.json: the prediction of 'version' is not a string|is not a str",
        ),
        (("--score", "predictions.json", "--test-file", "predictions.json"), "'data' is missing"),
        (
            ("--score", "predictions.json", "--test-file", "dev.json", "--model", "any"),
            "without a model and has no use for --model",
        ),
        (
            ("--score", "predictions.json", "--test-file", "dev.json", "--shots", 4, "--n-best", 7),
            "has no use for --shots, --n-best: drop them",
        ),
        (
            (
                "--score",
                "predictions.json",
                "--test-file",
                "dev.json",
                "--plan",
                "--doc-stride",
                0,
                "--precision",
                "fp16",
            ),
            "has no use for --precision, --doc-stride, --plan: drop them",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(tmp_path, files, arguments, message):
    result = score(tmp_path, *arguments)
    assert result.returncode == 2
    assert any(part in result.stderr.strip().splitlines()[-1] for part in message.split("|"))


def test_no_file_of_a_user_and_no_earlier_score_is_overwritten(tmp_path, files):
    _, _, predictions = files
    (tmp_path / "out").mkdir()
    own = tmp_path / "out" / "predictions.json"
    own.write_text(json.dumps(predictions | {"mine": "kept"}))
    result = score(tmp_path, "--score", own, "--test-file", "dev.json")
    assert result.returncode == 2 and "holds 'predictions.json' but no run.json" in result.stderr
    assert "mine" in json.loads(own.read_text())
    given = ["--score", "predictions.json", "--test-file", "dev.json", "--output-dir", tmp_path / "scores"]
    assert score(tmp_path, *given).returncode == 0
    before = (tmp_path / "scores" / "metrics.json").read_text()
    questions = (tmp_path / "dev.json").read_text()
    (tmp_path / "dev.json").write_text(questions + " ")
    result = score(tmp_path, *given)
    assert result.returncode == 2 and "holds the scores of other predictions or data" in result.stderr
    (tmp_path / "dev.json").write_text(questions)
    (tmp_path / "predictions.json").write_text(json.dumps(dict.fromkeys(predictions, "")))
    result = score(tmp_path, *given)
    assert result.returncode == 2 and "holds the scores of other predictions" in result.stderr
    assert (tmp_path / "scores" / "metrics.json").read_text() == before


def test_no_torch_is_imported():
    modules = "zerotune.squad.score_file, zerotune.squad.settings"
    program = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_a_disk_that_takes_no_more(tmp_path, files):
    command = [sys.executable, REPOSITORY / "eval" / "qa.py", "--output-dir", "out", "--score", "predictions.json"]
    limited = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *map(str, command), "--test-file", "dev.json"]
    result = subprocess.run(limited, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stderr.removeprefix("loading the libraries\n").count("\n") == 1
    assert result.stderr.startswith("refused: file too large: ") and "raise that limit" in result.stderr
