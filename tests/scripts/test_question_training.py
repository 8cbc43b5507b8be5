"""Questions that share paragraphs, trained as a process: the loss falls, and two processes have the curve of one.

The bounds and their reasons stand in comparing.py.
"""

import numpy as np
import pytest
from comparing import CURVE, differences
from tiny_models import character_model

SERIAL_NORM = 1e-4  # as in test_generate.py


@pytest.fixture(scope="module")
def train(workplace):
    """Run train_questions.py to its end, once for each name, and check every rank's exit status."""
    model, finished = workplace.folder / "question-characters", {}
    character_model(model)

    def run(name, *more, world=1):
        if name not in finished:
            folder = workplace.folder / name
            flags = ["--model", model, "--output-dir", folder, *more]
            finished[name] = workplace.server.start("tests/scripts/train_questions.py", flags, folder, world).wait()
            assert set(finished[name].codes) == {0}, finished[name].text()
        return finished[name]

    return run


def evaluations(run):
    return [row for row in run.read_lines("metrics.jsonl") if "eval_loss" in row]


def test_the_loss_falls_and_written_answers_are_scored(train):
    rows = evaluations(train("questions-learn", "--epochs", 3))
    assert rows[2]["eval_loss"] < rows[1]["eval_loss"] < rows[0]["eval_loss"] < np.log(260)
    for row in rows:
        assert {"eval_exact", "eval_f1", "eval_HasAns_f1", "eval_NoAns_exact"} < row.keys()
        assert 0 <= row["eval_eos_rate"] <= 1 and 0 <= row["eval_mean_answer_tokens"] <= 6
        assert 0 <= row["eval_abstention_share"] <= 1


@pytest.mark.parametrize("more", [["--tokens-per-device", 1200], ["--tokens-per-device", 6000]])
def test_the_token_budget_does_not_change_the_curve(train, more):
    run, reference = train(f"questions-{more[1]}", *more), train("questions")
    assert max(differences(run, reference).values()) <= CURVE


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2", "zero3"])
def test_two_processes_give_the_curve_of_one(train, config):
    deepspeed = ["--deepspeed", f"ds_configs/{config}.json"] if config else []
    run, reference = train(f"questions-two-{config}", *deepspeed, world=2), train("questions")
    found = differences(run, reference)
    print(found)  # shown by pytest -rP
    assert found["loss"] <= CURVE and found["grad_norm"] <= (SERIAL_NORM if config else CURVE)
    (ours,), (theirs,) = evaluations(run), evaluations(reference)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
