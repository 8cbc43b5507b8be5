"""Test names and sizes of parameters, and layers that stay float32."""

import pytest
import torch
from tiny_models import CAUSAL, ENCODERS, tiny_model, tuned_model
from torch import nn

from zerotune.models import fused_functions
from zerotune.models.heads import Float32Linear, float32_linear, head_of, is_head_parameter, logical_size, stock_name


def test_stock_names_are_without_what_peft_adds():
    for name in ("score.modules_to_save.default.weight", "score.original_module.weight", "score.weight"):
        assert stock_name(f"base_model.model.{name}") == "score.weight"
    assert stock_name("base_model.model.model.layers.0.q_proj.base_layer.weight") == "model.layers.0.q_proj.weight"


@pytest.mark.parametrize("head", ["classify", "span", "generate"])
def test_the_head_is_told_from_the_model(head):
    for kind in CAUSAL if head == "generate" else CAUSAL + ENCODERS:
        model, _ = tuned_model(tiny_model(kind), "full", head)
        assert head_of(model.stock_model) == head
        own = [name for name, _ in model.stock_model.named_parameters() if is_head_parameter(name, model.config)]
        assert bool(own) == (head != "generate"), "an LM head is not a new one"


def test_sizes_are_logical():
    whole = nn.Parameter(torch.zeros(0))
    whole.ds_numel = 12
    assert logical_size(whole) == 12 and logical_size(nn.Parameter(torch.zeros(3, 4))) == 12


def test_a_float32_layer_keeps_the_parameters_themselves():
    linear = nn.Linear(3, 2).bfloat16().eval()
    weight, bias = linear.weight, linear.bias
    hidden = torch.randn(4, 3).bfloat16()
    narrow = float32_linear(linear, cast_weights=False)
    assert narrow.weight is weight and narrow.bias is bias and weight.dtype == torch.bfloat16 and not narrow.training
    expected = nn.functional.linear(hidden.float(), weight.float(), bias.float())
    cast = float32_linear(linear)
    assert cast.weight is weight and weight.dtype == torch.float32
    for layer in (narrow, cast):
        assert type(layer) is Float32Linear and torch.equal(layer(hidden), expected)


def test_a_frozen_head_on_a_cpu_gives_float32s_logits_part_by_part(monkeypatch):
    monkeypatch.setattr(fused_functions, "_OUTPUTS_AT_ONCE", 16)  # the last part has two rows
    head = float32_linear(nn.Linear(64, 50, bias=False).bfloat16(), cast_weights=False).requires_grad_(False)
    hidden, upstream = torch.randn(2, 3, 64).bfloat16().requires_grad_(), torch.randn(2, 3, 50)
    exact = nn.functional.linear(hidden.float(), head.weight.float())
    (exact_gradient,) = torch.autograd.grad(exact, hidden, upstream)
    found = head(hidden)
    (gradient,) = torch.autograd.grad(found, hidden, upstream)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    assert (gradient - exact_gradient).norm() < 2**-7 * exact_gradient.norm(), "rounded to 8 bits"


def test_a_frozen_head_in_bf16_multiplies_without_copies_where_the_device_can(monkeypatch):
    """A float32 product stands in for a GPU's product of 16-bit matrices with a float32 result."""
    head = float32_linear(nn.Linear(64, 50, bias=False).bfloat16(), cast_weights=False).requires_grad_(False)
    hidden = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    upstream = torch.randn(2, 3, 50)
    wanted = head(hidden)
    (wanted_gradient,) = torch.autograd.grad(wanted, hidden, upstream)
    monkeypatch.setattr(fused_functions, "can_multiply_wide", lambda states: True)
    products = []

    def product(left, right):
        products.append(left)
        return left.float() @ right.float()

    monkeypatch.setattr(fused_functions, "wide_product", product)
    found = head(hidden)
    (gradient,) = torch.autograd.grad(found, hidden, upstream)
    assert len(products) == 1 and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (gradient - wanted_gradient).norm() < 2**-7 * wanted_gradient.norm(), "rounded to 8 bits"
    head.requires_grad_(True)
    exact = nn.functional.linear(hidden.float(), head.weight.float())
    assert torch.equal(head(hidden), exact) and len(products) == 1, "a weight that trains has a float32 gradient"
    head(hidden.float()), head(hidden.half())
    assert len(products) == 1


def test_a_layer_of_another_class_is_not_taken_for_a_head():
    with pytest.raises(AssertionError, match="turned into a Float32Linear"):
        float32_linear(float32_linear(nn.Linear(3, 2)))
