"""Test a plan's arithmetic against figures worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from zerotune.run.plan import (
    CONTEXT_BYTES,
    GIB,
    Sharding,
    describe_memory,
    fits,
    memory_need,
    scoring_memory,
    why_not_fit,
    writing_memory,
)
from zerotune.settings.groups import ModelSettings

GEMMA_2B = SimpleNamespace(
    num_hidden_layers=26, hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256, attn_logit_softcapping=50.0, model_type="gemma2",
)  # fmt: skip
# A billion weights without DeepSpeed, of which all train or ten million do: bytes at points of a step.
BILLION = 1e9
FULL = {
    "table": {"total": BILLION, "trainable": BILLION, "groups": {"attention": 3e8, "mlp": 5e8}},
    "peaks": {
        "backward": {"parameters": 4e9, "gradients": 0.0, "optimizer": 8e9, "activations": 6e9, "temporary": 1e8},
        "update": {"parameters": 4e9, "gradients": 4e9, "optimizer": 8e9, "activations": 0.0, "temporary": 0.0},
    },
}
LORA = {
    "table": {"total": BILLION, "trainable": 1e7, "groups": {"attention": 3e8, "mlp": 5e8}},
    "peaks": {
        "backward": {"parameters": 2e9, "gradients": 4e7, "optimizer": 8e7, "activations": 5e9, "temporary": 0.0}
    },
}


def need(counted=FULL, method="full", optimizer="adamw", stage=0, devices=1, on_gpu=False, whole=False, **zero):
    model = ModelSettings("m", method=method, precision="bf16")
    return memory_need(**counted, largest_layer=1e7, model=model, optimizer=optimizer,
                       sharding=Sharding(stage, devices, zero, whole), on_gpu=on_gpu)  # fmt: skip


def test_the_peak_is_that_of_the_phase_that_holds_most():
    assert need().total == 18.1e9 and need().activations == 6e9
    assert need(stage=1, devices=8, contiguous_gradients=False).activations == 6e9
    assert need(on_gpu=True).total == 18.1e9 + CONTEXT_BYTES


def test_plain_data_parallelism_keeps_its_gradients():
    """The buckets of DistributedDataParallel are there in the backward pass too, where one device has freed them."""
    assert need(devices=8).total == 18.1e9 + 4e9 and need(devices=8).gradients == 4e9


def test_gradients_of_earlier_micro_batches_are_held_beside_the_buckets():
    forward = {"parameters": 4e9, "gradients": 4e9, "optimizer": 8e9, "activations": 6e9, "temporary": 0.0}
    several = {"table": FULL["table"], "peaks": {"forward": forward, **FULL["peaks"]}}
    assert need(several).gradients == 4e9 and need(several, devices=8).gradients == 8e9


def test_each_stage_of_zero_divides_more():
    """Eight devices divide the moments and a float32 copy of the weights; then gradients; then gathered weights."""
    one, two, three = (need(stage=stage, devices=8, contiguous_gradients=False) for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == (8e9 + 4e9) / 8 and one.parameters == two.parameters == 4e9
    assert three.optimizer == 8e9 / 8 and three.parameters == 4e9 / 8
    assert three.temporary == 1e8 + 2 * BILLION, "all of them fit DeepSpeed's most live weights"
    assert three.activations == 6e9 - 2 * 8e8, "autocast's copies are the gathered weights"
    few = need(stage=3, devices=8, contiguous_gradients=False, stage3_max_live_parameters=1e8)
    assert few.temporary == 1e8 + 2e8


def test_gradients_may_be_kept_whole_until_the_last_micro_batch():
    counted = {"table": FULL["table"], "peaks": {"update": FULL["peaks"]["update"]}}
    for stage in (2, 3):
        whole, divided = (need(counted, stage=stage, devices=8, whole=each) for each in (True, False))
        assert (whole.gradients, divided.gradients) == (4e9, 4e9 / 8) and whole.optimizer == divided.optimizer


def test_zero_3_wants_a_frozen_base_in_float32():
    assert need(LORA, "lora", stage=3, devices=8).parameters == (2e9 + 2 * (BILLION - 1e7)) / 8


def test_deepspeeds_buckets_are_of_each_type_that_it_exchanges():
    """For bf16 and float32: two float32 buckets below stage 3, and twice as many if communication overlaps."""
    assert need(stage=2, devices=8).deepspeed_buckets == 5e7 * 4 * 2
    assert need(stage=2, devices=8, overlap_comm=True).deepspeed_buckets == 5e7 * 4 * 2 * 2
    assert need(stage=3, devices=8, overlap_comm=True).deepspeed_buckets == 5e7 * (2 + 4)
    assert need(stage=2, devices=8, reduce_bucket_size=1e6).deepspeed_buckets == 1e6 * 4 * 2
    assert need().deepspeed_buckets == 0


def test_qlora_packs_the_projections_and_unpacks_one_at_a_time():
    lora, qlora = need(LORA, "lora"), need(LORA, "qlora")
    assert lora.parameters - qlora.parameters == pytest.approx(8e8 * (2 - 0.516))
    assert qlora.temporary - lora.temporary == 2 * 1e7


def test_8_bit_moments_take_a_quarter():
    assert need(optimizer="adamw8bit").optimizer == pytest.approx(8e9 / 4, rel=0.02)


def test_what_is_offloaded_takes_nothing():
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    kept = need(stage=3, devices=8, **offload)
    assert kept.optimizer == 0 < kept.parameters
    assert need(stage=3, devices=8, offload_param={"device": "cpu"}).parameters == 0


TABLE_2B = {
    "total": 2_614_341_888,
    "groups": {"attention": 400_000_000, "mlp": 1_600_000_000, "embedding": 614_341_888},
}


def test_scoring_by_hand():
    """In bf16, Gemma-2-2B's 4 key and value heads of 256 in 26 layers take 104 KiB per token of the shared prefix."""
    model = ModelSettings("m", precision="bf16")
    found = scoring_memory(GEMMA_2B, model, TABLE_2B, 1000, [(4, 200), (1, 500)])
    assert found.weights == 2 * 2_614_341_888
    assert found.shared_prefix == 1000 * 26 * 2 * 4 * 256 * 2
    own = 4 * 200 * (3 * 2304 + 8 * 256 + 2 * 9216) * 2
    scores = 4 * 8 * 200 * 200 * (2 + 4)
    assert found.largest_batch == own + 4 * 200 * (2 * 4 * 256 + 2 * 8 * 256) * 2 + scores
    packed = scoring_memory(GEMMA_2B, replace(model, method="qlora"), TABLE_2B, 0, [])
    assert packed.weights == pytest.approx(0.516 * 2e9 + 2 * 614_341_888) and packed.shared_prefix == 0
    assert describe_memory(found) == (
        "memory per device: about 5.03 GiB (weights 4.87, shared prefix 0.10, largest batch 0.06)"
    )


def test_writing_keeps_keys_and_values_in_all_layers():
    """Each row has a copy of the prefix, which a pass reads and all layers keep, together with the written tokens."""
    model, batches = ModelSettings("m", precision="bf16"), [(4, 200), (1, 500)]
    scoring = scoring_memory(GEMMA_2B, model, TABLE_2B, 100, batches)
    writing = writing_memory(GEMMA_2B, model, TABLE_2B, 100, [(*batch, 60) for batch in batches])
    seen = 4 * 100 * (2 * 4 * 256 + 2 * 8 * 256) * 2 + 4 * 8 * 200 * 100 * (2 + 4)
    kept = 26 * 4 * (100 + 200 + 60) * 2 * 4 * 256 * 2
    assert writing.largest_batch - scoring.largest_batch == seen + kept
    assert (writing.weights, writing.shared_prefix) == (scoring.weights, scoring.shared_prefix)


def test_what_does_not_fit_is_told_with_ways_out():
    full = ModelSettings("m")
    assert why_not_fit(need(), 80 * GIB, full, may_shard=True) is None
    line = why_not_fit(need(), 16 * GIB, full, may_shard=True)
    assert "16.0 GiB" in line and "\n" not in line
    assert line.endswith(
        "use --method lora or qlora, --activation-checkpointing, a smaller --tokens-per-device or more devices with "
        "--deepspeed ds_configs/zero3.json"
    )
    sharded = replace(full, method="lora", activation_checkpointing=True, zero_stage=3)
    line = why_not_fit(need(), 16 * GIB, sharded, may_shard=True)
    assert line.endswith("use --method qlora, a smaller --tokens-per-device or more devices")
    assert "ds_configs" not in why_not_fit(need(), 16 * GIB, full, may_shard=False)
    line = why_not_fit(need(), 16 * GIB, replace(full, method="qlora", activation_checkpointing=True), True)
    assert line.endswith("use a smaller --tokens-per-device")


def test_a_device_is_never_filled_to_the_last_byte():
    assert fits(need(), 18.1e9 / 0.94) and not fits(need(), 18.1e9 / 0.96)


def test_the_parts_are_named():
    line = describe_memory(need(stage=2, devices=8, on_gpu=True))
    assert line.startswith("memory per device: about ") and "DeepSpeed's buckets 0.37, CUDA context 0.50" in line
