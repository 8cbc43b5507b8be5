"""A model too large for one device is evaluated with its layers divided between two processes, with equal scores."""

import numpy as np
import pytest

DIVIDED = "evaluation: the model's layers are divided among 2 devices"
FEW = ("--limit-eval", 30, "--precision", "fp32")
TRAIN = ("--max-steps", 2, "--limit-train", 32, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def start(workplace):
    """Start a script, whole or divided, writing to the folder `name`, and check every rank's status."""

    def start(name, script, *flags, divides):
        folder = workplace.folder / f"{name}-{'divided' if divides else 'whole'}"
        flags = [*FEW, *flags, "--output-dir", folder]
        scripts = ["tests/scripts/small_devices.py", script] if divides else [script]
        job = workplace.server.start(scripts[0], [*scripts[1:], *flags], folder, world=2 if divides else 1)
        ended = job.wait()
        assert set(ended.codes) == {0}, ended.text()
        assert (DIVIDED in ended.text()) == divides
        return ended

    return start


def numbers(record):
    """Return all numbers in a record, in order."""
    if isinstance(record, dict):
        return [number for key in sorted(record) for number in numbers(record[key])]
    if isinstance(record, list):
        return [number for each in record for number in numbers(each)]
    return [record] if isinstance(record, int | float) else []


def assert_same_predictions(one, other, folder=""):
    rows, others = one.read_lines(f"{folder}predictions.jsonl"), other.read_lines("predictions.jsonl")
    assert len(rows) == len(others) == 30
    for row, expected in zip(rows, others, strict=True):
        assert (row["id"], row["prediction"]) == (expected["id"], expected["prediction"])
        np.testing.assert_allclose(numbers(row), numbers(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("eval/sst2.py", ("--shots", 2, "--calibrate", "contextual")),
        ("eval/sst2.py", ("--answer-by", "generation")),
        ("eval/qa.py", ("--sample", "--shots", 1, "--max-new-tokens", 5)),
    ],
)
def test_prompts_have_the_same_scores(script, flags, start, workplace):
    name = f"{script[5:-3]}{flags[0]}{flags[1]}"
    more = ["--model", workplace.model, *flags]
    if script == "eval/sst2.py":
        more += ["--train-file", workplace.train_file, "--test-file", workplace.test_file]
    whole, divided = (start(name, script, *more, divides=divides) for divides in (False, True))
    assert_same_predictions(divided, whole)


@pytest.mark.parametrize(
    ("script", "flags", "precision"),
    [
        ("sst2.py", ("--head", "classify", "--method", "full", "--base-eval", "none"), "fp32"),
        ("sst2.py", ("--head", "generate", "--method", "full", "--base-eval", "full"), "fp32"),
        ("qa.py", ("--head", "span", "--method", "lora", "--base-eval", "none"), "bf16"),  # layers of two types
        ("qa.py", ("--head", "generate", "--method", "full", "--base-eval", "none", "--max-new-tokens", 5), "fp32"),
    ],
)
def test_a_run_under_zero_3_ends_with_the_scores_of_its_final_folder(script, flags, precision, start, workplace):
    data = ("--train-file", workplace.train_file, "--test-file", workplace.test_file)
    more = (*TRAIN, "--model", workplace.model, "--deepspeed", "ds_configs/zero3.json", "--precision", precision)
    more += ("--sample",) if script == "qa.py" else data
    name = f"{script[:-3]}-{flags[1]}"
    run = start(f"run-{name}", f"train/{script}", *more, *flags, divides=True)
    assert run.text().count(DIVIDED) == (2 if flags[5] == "full" else 1)  # also before training
    again = start(f"again-{name}", f"eval/{script}", "--model", run.folder, "--precision", precision, divides=False)
    assert_same_predictions(run, again, "eval/final/")
