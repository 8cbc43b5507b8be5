"""A step counted on fake tensors against real steps, against the whole model, and against formulas."""

from dataclasses import replace

import pytest
import torch
from plan_memory import CASES, SMALL, compare
from random_models import SHAPES
from transformers import AutoConfig

from zerotune.models.adapters import adapter_size
from zerotune.models.shapes import shape_config
from zerotune.settings.groups import ModelSettings
from zerotune.training import step_counts
from zerotune.training.step_counts import BatchShape, count_step

BATCH = BatchShape(rows=4, longest=64, tokens=256, is_alone=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape}-{case.method}-{case.precision}")
def test_the_counted_peak_is_within_a_tenth_of_the_measured_one(case):
    torch.manual_seed(0)
    found = compare(case)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)


@pytest.mark.parametrize(
    ("model_type", "head", "method"),
    [
        ("llama", "generate", "full"),
        ("gemma2", "span", "lora"),
        ("gemma3_text", "classify", "lora"),
        ("qwen3", "generate", "lora"),
        ("gemma2", "classify", "full"),
    ],
)
def test_few_layers_give_the_counts_of_all(model_type, head, method, monkeypatch):
    """The peak is exact, except where a phase peaks in its middle instead of at the end of a layer."""
    config = AutoConfig.for_model(model_type, **SMALL | {"num_hidden_layers": 9}, pad_token_id=0, sliding_window=32)
    model = ModelSettings("m", method=method, precision="bf16")
    batch = replace(BATCH, answers=8 if head == "generate" else 0)
    shallow = count_step(config, model, head, 2, batch, on_gpu=True)
    monkeypatch.setattr(step_counts, "_shallow_configs", lambda config: (config, []))
    whole = count_step(config, model, head, 2, batch, on_gpu=True)
    assert (shallow.table, shallow.flops) == (whole.table, whole.flops)
    peaks = [max(sum(kinds.values()) for kinds in counts.peaks.values()) for counts in (shallow, whole)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_a_published_model_by_its_formulas():
    """Full tuning holds 16 bytes a weight (with gradient and moments); a token costs 6 operations a matrix weight."""
    config = shape_config("Llama-3.2-1B")
    batch = BatchShape(rows=16, longest=512, tokens=16 * 512)
    counts = count_step(config, ModelSettings("m", precision="bf16"), "classify", 2, batch, on_gpu=True)
    weights = counts.table["total"]
    assert weights == 1_235_814_400 + 2 * 2048
    update = counts.peaks["update"]
    assert (update["gradients"], update["optimizer"]) == (4 * weights, pytest.approx(8 * weights, rel=1e-6))
    assert update["parameters"] == pytest.approx(4 * weights, rel=1e-6)
    matrices = counts.table["groups"]["attention"] + counts.table["groups"]["mlp"]
    assert counts.flops == pytest.approx(6 * matrices * batch.tokens, rel=0.01)
    lora = count_step(config, ModelSettings("m", method="lora"), "classify", 2, batch, on_gpu=True)
    assert lora.table["groups"]["adapter"] == adapter_size(config, rank=8)


def test_only_the_rows_that_are_used_train():
    config = shape_config("DistilBERT")
    whole, rows = (
        count_step(config, ModelSettings("m"), "classify", 2, BATCH, False, used)
        for used in (None, torch.arange(100).numpy())
    )
    saved = (config.vocab_size - 100) * config.dim
    assert whole.peaks["update"]["gradients"] - rows.peaks["update"]["gradients"] == 4 * saved


def test_of_an_operation_that_is_not_counted_weights_and_moments_are():
    """Mixtral's grouped products need weights of one type, and fake tensors check that."""
    sizes = SMALL | {"num_local_experts": 2}
    config = AutoConfig.for_model("mixtral", **sizes, pad_token_id=0)
    counts = count_step(config, ModelSettings("m", precision="bf16"), "classify", 2, BATCH, on_gpu=True)
    held, total = counts.peaks["update"], counts.table["total"]
    assert counts.flops == 0 == held["activations"]
    assert (held["gradients"], held["optimizer"]) == (4 * total, 8 * total) and held["parameters"] >= 4 * total


def test_what_is_recomputed_is_not_kept():
    config = next(shape for shape in SHAPES if shape.name == "Llama-3.2-1B").config(toy=False)
    plain, recomputed = (
        count_step(
            config, ModelSettings("m", method="lora", activation_checkpointing=on), "classify", 2, BATCH, True
        ).peaks["forward"]["activations"]
        for on in (False, True)
    )
    assert recomputed < plain / 4


def test_the_workspace_of_packed_rows_backward_pass_counts(monkeypatch):
    """Flash attention sums the queries' gradients in float32, with room for 128 more tokens an example."""
    config = AutoConfig.for_model("llama", **SMALL | {"num_hidden_layers": 4}, pad_token_id=0)
    settings = ModelSettings("m", method="lora", precision="bf16", attention="varlen")
    batch = BatchShape(rows=64, longest=8, tokens=512)

    def temporary() -> float:
        peaks = count_step(config, settings, "classify", 2, batch, on_gpu=True).peaks
        return peaks["backward through the layers"]["temporary"]

    counted = temporary()
    monkeypatch.setattr(step_counts, "_workspace", lambda operation, args: 0)
    padding = 4 * 128 * batch.rows * config.hidden_size  # most of it
    assert counted - temporary() > 0.5 * padding
