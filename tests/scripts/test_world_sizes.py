"""A run goes on with another number of processes, and its curve is that of one that was never stopped.

The bounds and their reasons stand in comparing.py. Every combination: tests/benchmarks/world_sizes.py.
"""

import pytest
from comparing import WEIGHTS, assert_same_curve, weight_difference
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
    assert f"(saved by {worlds[-2]} processes, now {worlds[-1]})" in run.text()
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS
    assert run.read_json("run.json")["world"]["num_processes"] == worlds[-1]
