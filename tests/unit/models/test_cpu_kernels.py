"""Attention and dropout on a CPU give what torch gives."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from zerotune.models import cpu_kernels


def attention_inputs(length, width=8):
    generator = torch.Generator().manual_seed(length)
    shape = (3, 2, length, width)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for _ in "qkv"]
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, (length + 1) // 2 :] = False
    return tensors, mask


def results(attend, tensors):
    """Return outputs and the gradients of q, k and v."""
    output = attend(*tensors)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("length", [1, 9, 16, 37, 130])
def test_attention_and_its_gradients_are_those_of_sdpa(length):
    tensors, mask = attention_inputs(length)
    added = cpu_kernels.padded_key_mask(batch_size=3, kv_length=length, attention_mask=mask)

    def ours(query, key, value):
        return cpu_kernels.attention(nn.Module(), query, key, value, added, scaling=8**-0.5)[0]

    def theirs(query, key, value):
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return mixed.transpose(1, 2)

    for found, wanted in zip(results(ours, tensors), results(theirs, tensors), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def causal_inputs(length, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = {"query": (3, 4, length, 16), "key": (3, 2, length, 16), "value": (3, 2, length, 16)}
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes.values()]


def masks(kind, length):
    """Return sdpa's mask of a kind, None for "none"; all are causal."""
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(3, 1, length, length).clone()
    if kind == "none":
        return None
    seen[1, :, :, : length // 3] &= torch.eye(length, dtype=torch.bool)[:, : length // 3]  # padding sees itself
    seen &= torch.ones_like(seen).triu(-4)
    return seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("length", [1, 2, 9, 16, 37, 130])
def test_causal_attention_and_its_gradients_are_those_of_sdpa(length, kind):
    """With keys that heads share, too; in bf16 they are as near to float32 as sdpa's."""
    module, mask = nn.Module(), masks(kind, length)
    module.num_key_value_groups = 2
    attend = AttentionInterface()["sdpa"]

    def distances(kernel):
        found = results(lambda *qkv: kernel(module, *qkv, mask, scaling=0.3)[0], causal_inputs(length, torch.bfloat16))
        return [(one.float() - other).norm().item() for one, other in zip(found, exact, strict=True)]

    def sdpa(module, query, key, value, mask, **kwargs):
        fits = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
        return attend(module, query, key, value, fits, **kwargs)

    rounded = [tensor.detach().float().requires_grad_() for tensor in causal_inputs(length, torch.bfloat16)]
    exact = results(lambda *qkv: sdpa(module, *qkv, mask, scaling=0.3)[0], rounded)
    for ours, theirs, wanted in zip(distances(cpu_kernels.causal_attention), distances(sdpa), exact, strict=True):
        assert ours <= 1.5 * theirs + 0.01 * wanted.norm().item()


@pytest.mark.parametrize("said_by", ["module", "argument"])
def test_a_model_that_is_not_causal_sees_what_follows(said_by):
    module, more = nn.Module(), {}
    module.is_causal, module.num_key_value_groups = said_by == "argument", 2
    if said_by == "argument":
        more = {"is_causal": False}
    inputs = causal_inputs(9, torch.bfloat16)
    found, _ = cpu_kernels.causal_attention(module, *inputs, None, **more)
    wanted, _ = AttentionInterface()["sdpa"](module, *inputs, None, **more)
    assert torch.equal(found, wanted)


def test_attention_with_dropout_keeps_its_mean_and_zeroes_whole_weights():
    (query, key, _), mask = attention_inputs(16, width=16)
    value = torch.eye(16).expand(3, 2, 16, 16)  # so the output is the attention weights
    added = cpu_kernels.padded_key_mask(batch_size=3, kv_length=16, attention_mask=mask)

    def weights(dropout):
        return cpu_kernels.attention(nn.Module(), query, key, value, added, dropout=dropout, scaling=1.0)[0].detach()

    torch.manual_seed(0)
    plain, dropped = weights(0.0), torch.stack([weights(0.25) for _ in range(2000)])
    zeroed = (dropped == 0) & (plain > 0)
    seen = plain > 0
    assert zeroed[:, seen].float().mean().item() == pytest.approx(0.25, abs=0.002)
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.03, rtol=0)


def test_padding_is_never_seen():
    (query, key, value), mask = attention_inputs(9)
    added = cpu_kernels.padded_key_mask(batch_size=3, kv_length=9, attention_mask=mask)
    before = cpu_kernels.attention(nn.Module(), query, key, value, added)[0]
    with torch.no_grad():
        key[1, :, 5:] = 1e4
        value[1, :, 5:] = 1e4
    assert torch.equal(before, cpu_kernels.attention(nn.Module(), query, key, value, added)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_has_the_rate_and_the_mean_of_torchs(dtype, probability):
    torch.manual_seed(1)
    values = torch.ones(1_000_003, dtype=dtype, requires_grad=True)
    dropped = cpu_kernels.drop(values, probability)
    rate = (dropped == 0).float().mean().item()
    assert rate == pytest.approx(probability, abs=4 * (probability / 1_000_003) ** 0.5)
    kept = dropped[dropped != 0].unique()
    assert len(kept) == 1 and kept.item() == pytest.approx(1 / (1 - probability), rel=2e-3)
    (gradient,) = torch.autograd.grad(dropped.sum(), values)
    assert torch.equal(gradient, dropped.detach())


def test_neighbouring_values_are_dropped_independently():
    torch.manual_seed(2)
    dropped = (cpu_kernels.drop(torch.ones(400_000), 0.5) == 0).view(-1, 4).float()
    correlations = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlations.abs().max() < 0.02  # six standard errors


def test_dropout_follows_the_seed_and_the_training_mode():
    dropout, values = cpu_kernels.Dropout(0.3), torch.ones(999)
    torch.manual_seed(3)
    first = dropout(values)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(values))
    assert not torch.equal(first, dropout(values))
    assert torch.equal(dropout.eval()(values), values)
    assert torch.equal(cpu_kernels.drop(values, 0.0), values)


def test_every_dropout_module_is_replaced_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.4).eval(), nn.ReLU()))
    cpu_kernels.use_cheap_dropout(model)
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [type(module) for module in found] == [cpu_kernels.Dropout] * 2
    assert [(module.p, module.training) for module in found] == [(0.2, True), (0.4, False)]
