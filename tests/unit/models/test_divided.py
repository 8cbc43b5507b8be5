"""Test which models are divided for evaluation, and the bytes that a device then holds."""

from types import SimpleNamespace

import pytest

from zerotune.models import divided
from zerotune.models.divided import EvaluatedWeights, divided_where_large
from zerotune.models.shapes import shape_config
from zerotune.settings.groups import ModelSettings

GIB = 2**30


@pytest.mark.parametrize(
    ("has_lm_head", "is_whole", "layers", "rest"),
    [
        (True, True, 13.0, 0.5),  # embedding and LM head of 131 million weights each, all in bf16
        (False, False, 13.0, 0.25),  # an adapter's base, loaded without the LM head
        (False, True, 13.0, 0.5),  # tuned with a head: the embedding is in float32
    ],
)
def test_a_7b_model_is_divided_where_it_fills_a_device(has_lm_head, is_whole, layers, rest):
    weights = EvaluatedWeights.of(shape_config("Mistral-7B"), "bf16", has_lm_head, is_whole)
    assert weights.layers / GIB == pytest.approx(layers, abs=0.01)
    assert weights.rest / GIB == pytest.approx(rest, abs=0.01)
    assert not weights.are_divided(8, 24 * GIB) and weights.are_divided(8, 16 * GIB)
    assert not weights.are_divided(1, 2 * GIB)  # there is no other rank to share with
    assert weights.on_each(8, 24 * GIB) == weights.layers + weights.rest
    assert weights.on_each(8, 16 * GIB) == weights.rest + weights.layers / 8 + weights.layers / 32


def test_all_ranks_divide_where_one_has_to(monkeypatch):
    """One rank's device may be smaller than the others; a model in 4 bits is never divided."""
    model, config = ModelSettings("m", precision="bf16"), shape_config("Mistral-7B")
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(divided, "read_record", lambda name, revision: None)
    monkeypatch.setattr("zerotune.models.adapters.adapter_base", lambda name, revision: None)
    monkeypatch.setattr(divided, "device_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(divided, "on_all_ranks", lambda accelerator, mine: [mine, True])
    assert divided_where_large(model, config, True, two).divides_layers
    monkeypatch.setattr(divided, "on_all_ranks", lambda accelerator, mine: [mine, mine])
    assert divided_where_large(model, config, True, two) == model
    monkeypatch.setattr(divided, "device_bytes", lambda: 8 * GIB)
    assert divided_where_large(model, config, True, two).divides_layers
    in_4_bits = ModelSettings("m", method="qlora", precision="bf16")
    assert divided_where_large(in_4_bits, config, True, two) == in_4_bits
    monkeypatch.setattr(divided, "device_bytes", lambda: None)  # a CPU
    assert divided_where_large(model, config, True, two) == model
