"""A run resumes with another number of processes, and has the same curve as a run that was never stopped.

The bounds and their reasons are in comparing.py. tests/benchmarks/world_sizes.py tries every combination.
"""

import pytest
from comparing import BF16_CURVE, WEIGHTS, assert_same_bits, assert_same_curve, killed_at, weight_difference
from moving import deepspeed, move

METHODS = {"full": [], "lora": ["--method", "lora"], "qlora": ["--method", "qlora"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config", "worlds"),
    [
        ("full", None, (2, 1)),
        ("full", "zero1", (1, 2)),
        ("full", "zero2", (4, 2, 4)),
        ("full", "zero3", (2, 1, 2)),
        ("lora", "zero3", (1, 2)),
        ("qlora", "qlora", (2, 1)),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(workplace, method, config, worlds):
    reference = workplace.train_once(method, *METHODS[method])
    run = move(workplace, f"moved-{method}-{config}", [*METHODS[method], *deepspeed(config)], worlds)
    saved_by, now = worlds[-2:]
    assert f"(saved by {saved_by} process{'es' * (saved_by > 1)}, now {now})" in run.text()
    assert "FutureWarning" not in run.text(), run.text()
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS
    assert run.read_json("run.json")["world"]["num_processes"] == worlds[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "config", "worlds"), [("bf16", "zero3", (2, 1)), ("fp16", None, (2, 1)), ("fp16", None, (1, 2))]
)
def test_16_bit_runs_go_on_to_16_bits(workplace, precision, config, worlds):
    """fp16 keeps 3 bits more than bf16. Its loss scale is restored too: a fresh one would skip steps again."""
    reference = workplace.train_once(f"full-{precision}", "--precision", precision)
    flags = ["--precision", precision, *deepspeed(config)]
    run = move(workplace, f"moved-{precision}-{worlds[0]}", flags, worlds)
    assert_same_curve(run, reference, BF16_CURVE)


@pytest.mark.slow
def test_final_is_made_of_a_checkpoint_by_another_number_of_processes(workplace):
    """The best checkpoint is loaded into an engine that has already trained past it."""
    flags = ["--eval-every", 2, "--learning-rate", 3e-3]
    reference = workplace.train("moved-best-undisturbed", *flags)
    # the sixth line is for the evaluation after step 4
    stop = killed_at("open", r"metrics\.jsonl$", 6, "SIGTERM")
    workplace.train("moved-best", *flags, *deepspeed("zero3"), world=2, expect=75, **stop)
    run = workplace.train("moved-best", *flags, *deepspeed("zero3"))
    assert "resumes after step 5 from" in run.text() and "(saved by 2 processes, now 1)" in run.text()
    assert [each.read_json("final/task.json")["best_step"] for each in (run, reference)] == [4, 4]
    assert weight_difference(run, reference) <= WEIGHTS


def test_quantised_moments_go_on_with_their_own_number_of_processes_only(workplace):
    flags = ["--optimizer", "adamw8bit", *deepspeed("zero2")]
    reference = workplace.train_once("8bit-undisturbed", *flags, world=2)
    stop = killed_at("open", r"metrics\.jsonl$", 3, "SIGTERM")
    workplace.train("8bit-moved", *flags, world=2, expect=75, **stop)
    run = workplace.train("8bit-moved", *flags, expect=2)
    assert "was saved by 2 processes and this run has 1: under DeepSpeed, adamw8bit" in run.refusal()
    assert run.read_json("state.json")["state"] == "refused"
    assert_same_bits(workplace.train("8bit-moved", *flags, world=2), reference)
