"""Fused passes: the stock model's logits and gradients in float32, and no worse ones in 16 bits."""

import numpy as np
import pytest
import torch
from tiny_models import CAUSAL, LABELS, tiny_model
from torch.nn import functional

from zerotune.models import fused
from zerotune.models.classifier import load_classifier
from zerotune.models.device import on_device
from zerotune.models.pretrained import load_tokenizer
from zerotune.models.precision import autocast
from zerotune.settings.groups import ModelSettings

CPU = torch.device("cpu")


@pytest.fixture
def on_gpu(monkeypatch):
    """Let passes run on a CPU, operation by operation."""
    monkeypatch.setattr(fused, "on_gpu", lambda states: True)


def model_of(kind, method="full", precision="fp32", recomputes=False):
    settings = ModelSettings(
        tiny_model(kind), None, method, attention="eager", precision=precision, activation_checkpointing=recomputes
    )
    model = load_classifier(settings, LABELS, load_tokenizer(tiny_model(kind), None)).train(recomputes)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would hide the other factor
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def outcome(model, precision="fp32"):
    """Return the logits of three texts of different lengths, and the gradients of a loss on them, in float32."""
    ids = np.random.default_rng(0).integers(4, 14, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [6]])).astype(np.int64)
    model.zero_grad()
    with autocast("cpu", precision):
        logits = model(**on_device({"input_ids": ids, "attention_mask": mask}, CPU))
    functional.cross_entropy(logits.float(), torch.tensor([0, 1, 1])).backward()
    gradients = {name: part.grad.float() for name, part in model.named_parameters() if part.grad is not None}
    return {"logits": logits.detach()} | gradients


@pytest.mark.parametrize("way", ["full", "lora", "checkpointing"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_fused_passes_give_the_stock_models_logits_and_gradients(kind, way, on_gpu):
    model = model_of(kind, "lora" if way == "lora" else "full", recomputes=way == "checkpointing")
    wanted = outcome(model)
    passes = fused.fuse(model)
    found = outcome(model)
    print(kind, way, passes, max((found[n]-wanted[n]).abs().max().item() for n in wanted))
    assert found.keys() == wanted.keys() and len(found) > 3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_fused_passes_round_no_more_than_the_stock_ones(kind, method, on_gpu):
    """Distances are from the same weights in float32; the larger ones count most."""
    model = model_of(kind, method, "bf16")
    stock = outcome(model, "bf16")
    fused.fuse(model)
    found = outcome(model, "bf16")
    exact = outcome(model.float())
    distances = [
        sum((one[name] - exact[name]).square().sum().item() for name in exact if name != "logits") ** 0.5
        for one in (stock, found)
    ]
    print(kind, method, distances, [ (o['logits']-exact['logits']).abs().max().item() for o in (stock,found)])
    assert found.keys() == stock.keys()
    assert distances[1] <= 1.2 * distances[0]
