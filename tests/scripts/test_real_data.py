"""Repeat script tests with published weights and rows, if they are next to the repository."""

import gzip
from itertools import islice

import numpy as np
import pytest
from brute_force import BruteForce
from comparing import OFTEN, WEIGHTS, assert_same_bits, assert_same_curve, killed_at, weight_difference
from launching import REPOSITORY

from zerotune.settings.groups import DataSettings
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import load_test

SHARED = REPOSITORY.parent / "shared"
MODEL = SHARED / "models" / "stories260K"
TRAIN, VALIDATION = (SHARED / "data" / "sst2" / f"{name}.tsv.gz" for name in ("train", "validation"))
NUM_VALIDATION = 872  # rows, as published

needs_shared = pytest.mark.skipif(
    not all(path.exists() for path in (MODEL, TRAIN, VALIDATION)),
    reason="needs the real stories260K and SST-2 in ../shared/models and ../shared/data",
)
pytestmark = [pytest.mark.slow, needs_shared]


@pytest.fixture(scope="module")
def some_rows(workplace):
    """Write the first 2,000 train rows; splitting all 67,349 would take most of a short run's time."""
    path = workplace.folder / "real-train.tsv"
    with gzip.open(TRAIN, "rt", encoding="utf-8") as file:
        path.write_text("".join(islice(file, 2001)))
    return path


def flags(train_file, *more):
    """Return flags for a few steps of the real model on real rows; only --test-file is reported."""
    real = ["--model", MODEL, "--train-file", train_file, "--test-file", VALIDATION, "--max-length", 200]
    return [*real, "--limit-train", 200, "--tokens-per-device", 256, *OFTEN, *more]


@pytest.mark.parametrize(("method", "config"), [("full", "zero3"), ("qlora", "qlora")])
def test_two_processes_give_the_curve_of_one(workplace, some_rows, method, config):
    reference = workplace.train_once(f"real-{method}", *flags(some_rows, "--method", method))
    ds = ["--deepspeed", f"ds_configs/{config}.json"]
    run = workplace.train(f"real-two-{method}", *flags(some_rows, "--method", method, *ds), world=2)
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS


def test_a_killed_run_goes_on_to_the_same_bits(workplace, some_rows):
    reference = workplace.train_once("real-full", *flags(some_rows, "--method", "full"))
    workplace.train("real-killed", *flags(some_rows), expect=-9, **killed_at("os.rename", r"\.writing-step-00000006$"))
    assert_same_bits(workplace.train("real-killed", *flags(some_rows)), reference)


def test_the_whole_validation_set_is_scored_before_and_after(workplace):
    run = workplace.train("real-whole", *flags(TRAIN, "--base-eval", "full", "--limit-eval", 5000, "--max-steps", 2))
    for name, setting in (("base", "zero-shot prompt"), ("final", "classifier head")):
        metrics = run.read_json(f"eval/{name}/metrics.json")
        assert metrics["count"] == NUM_VALIDATION and metrics["setting"] == setting
        lines = run.read_lines(f"eval/{name}/predictions.jsonl")
        assert len({line["id"] for line in lines}) == NUM_VALIDATION
        assert metrics["accuracy"] == np.mean([line["label"] == line["prediction"] for line in lines])


def test_a_generator_in_4_bits_learns(workplace, some_rows):
    """Test NF4 on a CPU, from training to the reloaded adapter's scores; label words have several tokens."""
    more = ["--head", "generate", "--method", "qlora", "--learning-rate", 3e-3, "--max-steps", 24, "--limit-train", 192]
    run = workplace.train("real-generate", *flags(some_rows, *more, "--base-eval", "subset"))
    losses = [row["eval_loss"] for row in run.evaluations()]
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    base, final = (run.read_json(f"eval/{name}/metrics.json") for name in ("base", "final"))
    assert (final["setting"], final["method"], final["count"]) == ("tuned generator", "qlora", base["count"])


def test_label_words_of_several_tokens_score_as_the_slow_way_says(workplace):
    slow = BruteForce(MODEL)
    assert len(slow.tokenizer(" positive", add_special_tokens=False)["input_ids"]) > 1
    done = workplace.evaluate("real-prompt", "--model", MODEL, "--test-file", VALIDATION, "--limit-eval", 24)
    examples, _ = load_test(SST2, DataSettings(test_file=str(VALIDATION)), None)
    texts = {example.id: example.text for example in examples}
    lines = done.read_lines("predictions.jsonl")
    wanted = [slow.scores(texts[line["id"]]) for line in lines]
    # The scores reach -14 here; float32 keeps 7 digits of even larger sums.
    np.testing.assert_allclose([line["scores"] for line in lines], wanted, rtol=1e-5, atol=2e-5)
