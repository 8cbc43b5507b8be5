"""Check by hand what devices send each other; tests/scripts/test_exchange.py counts it."""

import pytest

from zerotune.run.exchange import Exchange, Weights, efficiency, exchanged_weights, step_exchange
from zerotune.run.plan import Sharding

# Two billion trained weights, half of them in linear layers, of two (TRAINED) or ten billion (FROZEN) in all; bf16.
TRAINED = Weights(1e9, 1e9)
FROZEN = Weights(9e9, 1e9)


def sent(stage, devices=4, whole=True, num_micro_batches=3, everything=TRAINED, plain=4, **zero):
    return step_exchange(TRAINED, everything, 2, Sharding(stage, devices, zero, whole), num_micro_batches, plain)


def test_gradients_without_deepspeed_travel_twice_whole():
    assert sent(0).total == 2 * 0.75 * 4 * 2e9 and sent(0, plain=2).total == sent(0).total / 2
    assert sent(0, devices=1).total == 0


def test_zero_1_and_2_send_bf16_and_gather_float32():
    once = sent(2)
    assert once == sent(1) and (once.gradients, once.updated) == (2 * 0.75 * (2e9 + 4e9), 0.75 * 4 * 2e9)
    each = sent(2, whole=False)
    assert (each.gradients, each.updated, each.times) == (3 * once.gradients, once.updated, 3)
    assert sent(1, whole=False) == once, "ZeRO-1 keeps whole gradients anyway"


def test_zero_3_gathers_all_weights_for_two_passes_but_those_that_are_kept():
    found = sent(3, everything=FROZEN)
    assert found.gradients == 0.75 * (2e9 + 4e9) and found.updated == 0
    kept = 1e9 / FROZEN.total  # DeepSpeed's stage3_max_live_parameters
    assert found.weights == pytest.approx(3 * (2 - kept) * 0.75 * (18e9 + 4e9))
    nothing = sent(3, everything=FROZEN, stage3_max_reuse_distance=0)
    assert nothing.weights == pytest.approx(3 * 2 * 0.75 * (18e9 + 4e9))


def test_what_is_sent_in_which_type_follows_from_the_method():
    groups = {"attention": 30, "mlp": 50, "head": 2, "embedding": 18}
    full = exchanged_weights({"total": 100, "trainable": 100, "groups": groups}, "full")
    assert full == (Weights(80, 20), Weights(80, 20))
    lora = exchanged_weights({"total": 100, "trainable": 7, "groups": groups}, "lora")
    assert lora == (Weights(5, 2), Weights(80, 20))


@pytest.mark.parametrize(
    ("exchange", "overlaps", "waited"),
    [
        # two micro-batches compute for a second, of which each backward pass takes a third; 1 GB/s
        (Exchange(0.3e9), True, 0.0),
        (Exchange(1e9), True, 2 / 3),
        (Exchange(1e9), False, 1.0),
        (Exchange(1e9, times=2), True, 1 / 3),
        (Exchange(0.3e9, updated=0.2e9), True, 0.2),
        (Exchange(0.5e9, weights=1e9), True, 0.5),
    ],
)
def test_devices_wait_for_what_is_not_sent_while_they_compute(exchange, overlaps, waited):
    assert efficiency(exchange, 1.0, 2, 1e9, overlaps) == pytest.approx(1 / (1 + waited))
