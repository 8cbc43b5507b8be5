"""The memory estimate against figures worked out by hand."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from default_settings import optimisation_settings, run_settings
from transformers import MistralConfig

from zerotune.errors import Refused
from zerotune.run.plan import (
    GIB,
    describe_memory,
    logit_bytes,
    memory_need,
    offloaded,
    scoring_memory,
    why_not_fit,
    writing_memory,
)
from zerotune.settings.groups import DataSettings, Interval, ModelSettings, TrainSettings
from zerotune.training.plan import plan_training

LLAMA_1B = SimpleNamespace(
    num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    model_type="llama",
)  # fmt: skip
GEMMA_2B = SimpleNamespace(
    num_hidden_layers=26, hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256, attn_logit_softcapping=50.0, model_type="gemma2",
)  # fmt: skip
NUM_WEIGHTS = 1_235_818_496
NUM_ADAPTER = 5_640_192  # LoRA of rank 8 and the head


def need(method="full", stage=None, world_size=1, trainable=NUM_WEIGHTS, kept_on_host=frozenset(), **flags):
    recomputes = flags.pop("activation_checkpointing", False)
    optimisation = optimisation_settings(**{"tokens_per_device": 8192} | flags)
    model = ModelSettings("m", None, method, precision="bf16", zero_stage=stage, activation_checkpointing=recomputes)
    return memory_need(NUM_WEIGHTS, trainable, LLAMA_1B, model, optimisation, (world_size, kept_on_host))


def test_full_tuning_takes_18_bytes_a_weight():
    """float32 weight 4, its bf16 copy 2, gradient 4, two moments 8."""
    full = need()
    assert full.weights + full.gradients + full.optimizer == pytest.approx(18 * NUM_WEIGHTS)
    assert full.activations == pytest.approx((31 * 2048 + 8 * 8192) * 16 * 8192)


def test_four_bit_7b_needs_no_recomputation_on_24_gb_but_with_large_micro_batches():
    """README's command. A card is to hold a fifth more than the estimate, and one GiB for the CUDA context."""
    config = MistralConfig(vocab_size=32768, pad_token_id=0)
    model = ModelSettings("m", None, "qlora", precision="bf16")
    total, trainable = 7_110_660_096 + 21_000_000, 21_000_000
    needs = [
        memory_need(total, trainable, config, model, optimisation_settings(tokens_per_device=tokens), (1, frozenset()))
        for tokens in (2048, 8192)
    ]
    assert [1.2 * one.total + GIB < 24e9 for one in needs] == [True, False]


def test_zero3_divides_everything_but_activations():
    one, eight = need(stage=3), need(stage=3, world_size=8)
    assert eight.weights + eight.gradients + eight.optimizer == pytest.approx(
        (one.weights + one.gradients + one.optimizer) / 8
    )
    assert eight.activations == one.activations


def test_lora_keeps_the_frozen_base_in_16_bits_and_qlora_in_4():
    assert need("lora", trainable=NUM_ADAPTER).weights == pytest.approx(2 * NUM_WEIGHTS, rel=0.01)
    assert need("qlora", trainable=NUM_ADAPTER).weights == pytest.approx(0.516 * NUM_WEIGHTS, rel=0.04)


def test_8_bit_moments_and_checkpointing_take_less():
    assert need(optimizer="adamw8bit").optimizer == need().optimizer / 4
    assert need(activation_checkpointing=True).activations < need().activations / 6


def test_a_generators_logits_are_float32_at_answers_only():
    """A fifth of the tokens are answers, each 12 bytes of 128,256 logits; a frozen bf16 head once more in float32."""
    config = SimpleNamespace(vocab_size=128_256, hidden_size=2048)
    logits = 12 * 128_256 * 200
    for method, precision, copy in (("full", "bf16", 0), ("lora", "fp32", 0), ("qlora", "bf16", 4 * 128_256 * 2048)):
        settings = ModelSettings("m", None, method, precision=precision)
        assert logit_bytes(config, settings, 1000, 0.2) == pytest.approx(logits + copy)


def kept_of_a_token(config, method, precision, scored_tokens):
    optimisation = optimisation_settings(tokens_per_device=1)
    model = ModelSettings("m", None, method, precision=precision)
    return memory_need(0, 0, config, model, optimisation, (1, frozenset()), scored_tokens).activations


@pytest.mark.parametrize(
    ("config", "method", "precision", "scored_tokens", "counted"),
    [
        (LLAMA_1B, "lora", "bf16", 0, 116_984),
        (LLAMA_1B, "full", "bf16", 0, 129_160),
        (LLAMA_1B, "lora", "fp32", 0, 184_680),
        (LLAMA_1B, "full", "fp32", 0, 200_840),
        (GEMMA_2B, "lora", "bf16", 300, 169_467),
        (GEMMA_2B, "lora", "bf16", 600, 188_605),
        (GEMMA_2B, "full", "bf16", 384, 211_568),
    ],
)
def test_what_a_layer_keeps_is_what_was_counted(config, method, precision, scored_tokens, counted):
    """Bytes of a token in the saved tensors of two layers less those of one, torch 2.13.0, transformers 5.23.0."""
    found = kept_of_a_token(config, method, precision, scored_tokens) / config.num_hidden_layers
    assert found == pytest.approx(counted, rel=0.02 if precision == "bf16" else 0.05)


def test_a_token_goes_through_several_experts():
    experts = SimpleNamespace(**vars(LLAMA_1B), num_experts_per_tok=2)
    found, one = (kept_of_a_token(config, "lora", "bf16", 0) for config in (experts, LLAMA_1B))
    assert found - one == 16 * 4 * 8192 * 2, "the four tensors of a second gated MLP in each layer, in 16 bits"


def test_what_is_offloaded_takes_nothing():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    kept = offloaded({"zero_optimization": zero})
    assert kept == {"optimizer"} and offloaded(None) == frozenset()
    assert need(stage=3, kept_on_host=kept).optimizer == 0 < need(stage=3, kept_on_host=kept).weights


def test_scoring_by_hand():
    """Gemma-2-2B in bf16: 4 key and value heads of 256 in 26 layers take 104 KiB a token of the shared prefix."""
    model = ModelSettings("m", precision="bf16")
    found = scoring_memory(GEMMA_2B, model, 2_614_341_888, 1000, [(4, 200), (1, 500)])
    assert found.weights == 2 * 2_614_341_888
    assert found.shared_prefix == 1000 * 26 * 2 * 4 * 256 * 2
    own = 4 * 200 * (3 * 2304 + 8 * 256 + 2 * 9216) * 2
    scores = 4 * 8 * 200 * 1200 * (2 + 4)
    assert found.largest_batch == own + 4 * 1200 * (2 * 4 * 256 + 2 * 8 * 256) * 2 + scores
    packed = scoring_memory(GEMMA_2B, replace(model, method="qlora"), 2_614_341_888, 0, [])
    assert packed.weights == pytest.approx(0.516 * 2_614_341_888) and packed.shared_prefix == 0
    assert describe_memory(found) == (
        "memory a device: about 5.11 GiB (weights 4.87, shared prefix 0.10, largest batch 0.14)"
    )


def test_writing_keeps_keys_and_values_in_all_layers():
    model = ModelSettings("m", precision="bf16")
    pair = [scoring_memory, writing_memory]
    scoring, writing = (
        of(GEMMA_2B, model, 1000, 100, [(4, 200, *more), (1, 500, *more)])
        for of, more in zip(pair, ((), (60,)), strict=True)
    )
    assert writing.largest_batch - scoring.largest_batch == 26 * 4 * (100 + 200 + 60) * 2 * 4 * 256 * 2
    assert (writing.weights, writing.shared_prefix) == (scoring.weights, scoring.shared_prefix)


def test_what_does_not_fit_is_told_with_ways_out():
    assert why_not_fit(need(), 80 * GIB, "full") is None
    line = why_not_fit(need(), 16 * GIB, "full")
    assert "16.0 GiB" in line and "--method lora" in line and "\n" not in line


@pytest.mark.parametrize(("head", "words"), [("generate", None), ("classify", "whose fp32 weights take 27 GiB")])
def test_the_final_evaluation_of_full_tuning_has_to_fit_in_its_own_precision(head, words, monkeypatch):
    """Mistral-7B under ZeRO-3 on eight devices of 23.6 GiB: a generator is evaluated in bf16, a head on float32."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, int(23.6 * GIB)))
    config = MistralConfig(vocab_size=32768, pad_token_id=0)
    model = ModelSettings("m", None, "full", precision="bf16", zero_stage=3, activation_checkpointing=True)
    deepspeed = {"zero_optimization": {"stage": 3}}
    optimisation = optimisation_settings(tokens_per_device=4096)
    settings = TrainSettings(
        "sst2", head, model, DataSettings(), optimisation, run_settings("run"), deepspeed=deepspeed
    )
    data = SimpleNamespace(token_ids=np.array([1]), lengths=np.array([100]), answer_share=0.02)
    with pytest.raises(Refused, match=words) if words else nullcontext():
        plan_training(settings, config, data, 2)


@pytest.mark.parametrize(
    ("changes", "deepspeed", "words"),
    [
        ({}, None, "every 10 minutes; a copy of 12.89 GiB in the host memory of a node while one is written"),
        (
            {"checkpoint_every": Interval(steps=500)},
            {"zero_optimization": {"stage": 2}},
            "every 500 steps; a copy of 3.22",
        ),
        ({"scratch_dir": Path("/scratch")}, None, "every 10 minutes, by way of /scratch"),
    ],
)
def test_the_plan_tells_what_a_checkpoint_and_its_copy_take(changes, deepspeed, words, monkeypatch):
    """1.153 billion float32 weights with two moments; under ZeRO two of eight processes are on a node."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("zerotune.training.plan.model_size", lambda *given: (1_153_000_000, 1_153_000_000))
    config = MistralConfig(vocab_size=32768, pad_token_id=0)
    settings = TrainSettings(
        "sst2",
        "classify",
        ModelSettings("m"),
        DataSettings(),
        optimisation_settings(),
        run_settings("run", **changes),
        deepspeed=deepspeed,
    )
    data = SimpleNamespace(token_ids=np.array([1]), lengths=np.array([100]), answer_share=0.02)
    line = plan_training(settings, config, data, 2).splitlines()[-1]
    assert line.startswith(f"checkpoints: up to 12.89 GiB each, {words}")
