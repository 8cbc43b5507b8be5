"""Run train/imdb.py and eval/imdb.py as processes: the run's folder, several prompts, and refusals."""

import csv
import json

import numpy as np
import pytest

from zerotune.tasks.imdb import IMDB
from zerotune.tasks.sample import sample_reviews

PROMPTS = ["--shots", 2, "--prompt-seeds", 3, "--calibrate", "contextual", "--tokens-per-device", 2000]


@pytest.fixture(scope="module")
def reviews(workplace):
    """Write 120 reviews with markup in one csv, with the columns of Kaggle's copy."""
    path = workplace.folder / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "sentiment"])
        writer.writerows((text, ("negative", "positive")[label]) for text, label in sample_reviews(120, 3))
    return path


@pytest.fixture(scope="module")
def run(workplace, reviews):
    """Finish a run on a 70/10/20 split, with reviews cut to head and tail."""
    flags = ["--model", workplace.model, "--train-file", reviews, "--max-length", 60, "--truncation", "head-and-tail"]
    flags += ["--epochs", 1, "--precision", "fp32", "--output-dir", workplace.folder / "imdb"]
    ended = workplace.server.start("train/imdb.py", flags, workplace.folder / "imdb").wait()
    assert ended.codes == (0,), ended.text()
    return ended


def evaluate(workplace, name, *flags, world=1, expect=0):
    more = ["--precision", "fp32", "--output-dir", workplace.folder / name, *flags]
    ended = workplace.server.start("eval/imdb.py", more, workplace.folder / name, world=world).wait()
    assert set(ended.codes) == {expect}, ended.text()
    return ended


def test_a_run_says_its_split_and_its_truncation(run):
    splits = run.read_json("split.json")
    assert splits["task"] == "imdb" and splits["rule"] == "70-10-20"
    assert [splits["splits"][name]["count"] for name in ("train", "validation", "test")] == [84, 12, 24]
    task = run.read_json("final/task.json")
    assert (task["task"], task["max_length"], task["truncation"]) == ("imdb", 60, "head-and-tail")
    assert run.read_json("eval/final/metrics.json")["num_truncated"] > 12
    assert run.read_json("state.json")["state"] == "finished"
    assert "cut to 60 tokens" in run.text()


def test_a_final_folder_is_evaluated_as_in_its_run(workplace, run):
    done = evaluate(workplace, "imdb-again", "--model", run.folder / "final", world=2)
    same = (run.folder / "eval/final/predictions.jsonl").read_text()
    assert (done.folder / "predictions.jsonl").read_text() == same
    assert done.read_json("metrics.json")["truncation"] == "head-and-tail"


def test_prompts_differ_in_shots_and_wording_and_share_the_model(workplace, run):
    flags = ["--model", workplace.model, "--train-file", workplace.folder / "reviews.csv", "--split", "70-10-20"]
    done = evaluate(workplace, "imdb-seeds", *flags, *PROMPTS)
    summary = done.read_json("summary.json")
    each = [done.read_json(f"seed-{number}/metrics.json") for number in range(3)]
    assert [one["prompt"] for one in each] == [wording.template for wording in IMDB.wordings[:3]]
    assert len({tuple(one["shot_ids"]) for one in each}) == 3
    for name in ("accuracy", "precision", "recall", "f1", "uncalibrated_accuracy", "uncalibrated_recall"):
        values = [one[name] for one in each]
        assert summary[name]["mean"] == pytest.approx(np.mean(values))
        assert summary[name]["sd"] == pytest.approx(np.std(values, ddof=1))
        assert summary[name]["range"] == [min(values), max(values)]
    assert [one["accuracy"] for one in summary["seeds"]] == [one["accuracy"] for one in each]
    plain = evaluate(workplace, "imdb-plain", *flags, "--shots", 2, "--tokens-per-device", 2000)
    assert plain.read_json("metrics.json")["accuracy"] == each[0]["uncalibrated_accuracy"], "seed 0 is the plain prompt"
    again = evaluate(workplace, "imdb-seeds-two", *flags, *PROMPTS, world=2)
    assert again.read_json("summary.json") == summary
    for number in range(3):
        ids = [json.loads(line)["id"] for line in (again.folder / f"seed-{number}/predictions.jsonl").open()]
        assert len(ids) == len(set(ids)) == 24


def test_long_prompts_are_cut_counted_and_said(workplace, run):
    """The shots have at least 100 tokens each, so eight of them are cut to half of a window of 512."""
    flags = ["--model", workplace.model, "--train-file", workplace.folder / "reviews.csv", "--split", "70-10-20"]
    done = evaluate(workplace, "imdb-long", *flags, "--shots", 8)
    metrics = done.read_json("metrics.json")
    assert metrics["num_shots_truncated"] == 8 and metrics["num_shared_tokens"] > 256
    assert "prompt: 8 of 8 shots cut in the middle, to half of the window" in done.text()
    assert "memory per device: about" in done.text()
    refused = evaluate(workplace, "imdb-too-long", *flags, "--shots", 30, expect=2)
    assert "--shots 30 do not fit" in refused.refusal() and "use fewer --shots" in refused.refusal()
    assert not (refused.folder / "metrics.json").exists()


def test_prompt_seeds_that_vary_nothing_are_refused(workplace, run):
    test = ["--test-file", workplace.folder / "reviews.csv"]
    refused = evaluate(workplace, "no-seeds", "--model", workplace.model, *test, "--prompt-seeds", 6, expect=2)
    assert "only the wording can vary, and imdb has 5" in refused.refusal() and not refused.folder.exists()
    refused = evaluate(workplace, "no-seeds", "--model", run.folder / "final", *test, "--prompt-seeds", 2, expect=2)
    assert "no use for --prompt-seeds" in refused.refusal() and not refused.folder.exists()
