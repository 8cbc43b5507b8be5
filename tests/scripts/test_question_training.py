"""Run train/qa.py --head generate as a process: the loss falls, with the same curve at any world size and token budget.

The bounds and their reasons are in comparing.py.
"""

import json

import pytest
from comparing import CURVE, WEIGHTS, differences, weight_difference

from zerotune.squad.sample import sample_articles

# Steps of 16 questions on 3 to 5 paragraphs, in micro-batches of one paragraph, of some, and of all.
SINGLE, SOME, ALL = 200, 768, 4096
SERIAL_NORM = 1e-4  # as in test_generate.py


@pytest.fixture(scope="module")
def train(workplace):
    """Run train/qa.py --head generate to its end in float32, once per name, and check every rank's status."""
    files, finished = {}, {}
    for name, num_questions, seed in (("train", 118, 5), ("choose", 24, 6), ("test", 24, 8)):
        files[name] = workplace.folder / f"{name}-generate.json"
        files[name].write_text(json.dumps(sample_articles(num_questions, seed)))

    def run(name, *more, world=1):
        if name not in finished:
            flags = [
                *("--head", "generate", "--model", workplace.model, "--output-dir", workplace.folder / name),
                *("--train-file", files["train"], "--validation-file", files["choose"], "--test-file", files["test"]),
                *("--batch-size", 16, "--epochs", 1, "--log-every", 1, "--learning-rate", 1e-3, "--precision", "fp32"),
                *("--max-new-tokens", 6, "--base-eval", "none", "--tokens-per-device", SOME, *more),
            ]
            job = workplace.server.start("train/qa.py", flags, workplace.folder / name, world)
            finished[name] = job.wait()
            assert set(finished[name].codes) == {0}, finished[name].text()
        return finished[name]

    return run


def test_the_loss_falls_and_written_answers_are_scored(train):
    rows = train("questions-learn", "--epochs", 3, "--learning-rate", 5e-3).evaluations()
    assert rows[2]["eval_loss"] < rows[1]["eval_loss"] < rows[0]["eval_loss"]
    for row in rows:
        assert {"eval_exact", "eval_f1", "eval_HasAns_f1", "eval_NoAns_exact"} < row.keys()
        assert 0 <= row["eval_eos_rate"] <= 1 and 0 <= row["eval_mean_answer_tokens"] <= 6
        assert 0 <= row["eval_abstention_share"] <= 1


@pytest.mark.parametrize("budget", [SINGLE, ALL])
def test_the_token_budget_does_not_change_the_curve(train, budget):
    run, reference = train(f"questions-{budget}", "--tokens-per-device", budget), train("questions")
    assert max(differences(run, reference).values()) <= CURVE
    assert weight_difference(run, reference) <= WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2", "zero3"])
def test_two_processes_give_the_curve_of_one(train, config):
    deepspeed = ["--deepspeed", f"ds_configs/{config}.json"] if config else []
    run, reference = train(f"questions-two-{config}", *deepspeed, world=2), train("questions")
    found = differences(run, reference)
    print(found)  # shown by pytest -rP
    assert found["loss"] <= CURVE and found["grad_norm"] <= (SERIAL_NORM if config else CURVE)
    (ours,), (theirs,) = run.evaluations(), reference.evaluations()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    predictions = [(one.folder / "eval" / "final" / "predictions.json").read_text() for one in (run, reference)]
    assert predictions[0] == predictions[1]
