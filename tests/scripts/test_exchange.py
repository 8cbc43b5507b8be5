"""Count the bytes that ranks exchange in a step on 2 and 4 processes, and compare with zerotune/run/exchange.py."""

import json

import pytest
from launching import REPOSITORY

from zerotune.run.exchange import Weights, step_exchange
from zerotune.run.plan import Sharding
from zerotune.settings.deepspeed import fill_deepspeed_config, read_deepspeed_config

TRAINED = Weights(linear=16 * 64, other=32 * 16)  # of counting.py's model
NUM_MICRO_BATCHES = 3
BYTES = {"bfloat16": 2, "float32": 4}
# How many times a device in a ring sends (n - 1) / n of a whole tensor.
PARTS = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
# ZeRO-3 divides small weights too, and frees each after its use, as it must with large models.
ALL_DIVIDED = {"stage3_param_persistence_threshold": 0}
NOTHING_KEPT = ALL_DIVIDED | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
SMALL_BUCKETS = {"reduce_bucket_size": 600}
CASES = {
    "plain": (None, {}, "once"),
    "bf16": (None, {}, "once"),
    "zero1": ("zero1", {}, "once"),
    "zero2": ("zero2", {}, "once"),
    "zero2-each": ("zero2", {}, "each"),
    "zero2-small-buckets": ("zero2", SMALL_BUCKETS, "once"),
    "zero3": ("zero3", ALL_DIVIDED, "once"),
    "zero3-each": ("zero3", NOTHING_KEPT, "each"),
    "zero3-small-buckets": ("zero3", NOTHING_KEPT | SMALL_BUCKETS, "once"),
    "offload": ("zero3_offload", NOTHING_KEPT, "once"),
}


def configuration(config, changes):
    read = read_deepspeed_config(REPOSITORY / f"ds_configs/{config}.json")
    return read | {"zero_optimization": read["zero_optimization"] | changes}


@pytest.fixture(scope="module")
def count(workplace):
    """Run counting.py; return what it printed."""

    def run(name, world, precision="bf16"):
        config, changes, how = CASES[name]
        filled = None
        if config:
            filled = fill_deepspeed_config(configuration(config, changes), 1.0, precision)
            filled |= {"train_batch_size": world}
        arguments = [name, json.dumps(filled), precision, NUM_MICRO_BATCHES, how]
        folder = workplace.folder / f"count-{name}-{world}-{precision}"
        ended = workplace.server.start("tests/scripts/counting.py", arguments, folder, world=world).wait()
        assert set(ended.codes) == {0}, ended.text()
        found = json.loads([line for line in ended.text().splitlines() if line.startswith('{"curve')][-1])
        assert found["left"] < 1000, "a freed engine holds neither its 6 KB of weights nor their gradients and moments"
        return found

    return run


def sent_bytes(found, world, operations):
    """Return the bytes of the counted tensors that a device sends."""
    parts = [
        PARTS[name] * BYTES[kind] * size * times for name, kind, size, times in found["sent"] if name in operations
    ]
    return (1 - 1 / world) * sum(parts)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_the_formula_says(count, name, world):
    config, changes, how = CASES[name]
    zero = configuration(config, changes)["zero_optimization"] if config else {}
    sharding = Sharding(zero.get("stage", 0), world, zero, whole_gradients=how == "once")
    expected = step_exchange(TRAINED, TRAINED, 2, sharding, NUM_MICRO_BATCHES, plain=2 if name == "bf16" else 4)
    found = count(name, world)
    reduced = sent_bytes(found, world, ("all_reduce", "reduce_scatter_tensor"))
    gathered = sent_bytes(found, world, ("all_gather_into_tensor",))
    assert (reduced, gathered) == pytest.approx((expected.gradients, expected.weights + expected.updated)), found
    types = {kind for operation, kind, *_ in found["sent"] if operation != "all_gather_into_tensor"}
    assert types == ({"plain": {"float32"}, "bf16": {"bfloat16"}}.get(name) or {"bfloat16", "float32"})


@pytest.fixture(scope="module")
def alone(count):
    return count("plain", 1, "fp32")["curve"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_losses_are_those_of_one_process(count, alone, name):
    found = count(name, 2, "fp32")
    assert found["curve"] == pytest.approx(alone, rel=1e-5)
    assert {kind for _, kind, *_ in found["sent"]} == {"float32"}


@pytest.mark.slow
def test_gradients_in_bf16_change_losses_by_their_rounding(count, alone):
    found = count("bf16", 2, "fp32")["curve"]
    assert found != alone and found == pytest.approx(alone, rel=2e-2)
