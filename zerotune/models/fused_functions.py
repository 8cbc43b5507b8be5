"""The autograd functions that fused passes are made of, on rows [tokens, ...].

Each saves little more than its inputs, and recomputes the rest in the backward pass.
"""

from functools import cache

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zerotune.models.fused_kernels import (
    add_norm,
    gated,
    gated_gradient,
    layer_norm_gradient,
    layer_norm_gradients,
    layer_norm_of_sum,
    norm,
    norm_gradient,
    norm_total_gradient,
    norm_weight_gradient,
    rotated,
    rotated_gradient,
    run,
)

_OUTPUTS_AT_ONCE = 4096  # of an LM head, whose weights a CPU casts to float32 in parts


class Readers:
    """The sum of a tensor's gradients from all its readers, whose products add to it in place.

    Autograd would add them up in extra passes. The tensor's producer takes the sum in its backward pass.
    """

    def __init__(self):
        self.sum: torch.Tensor | None = None

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left @ right; rows that `steady` padded are cut off when the sum is taken."""
        if self.sum is None:
            self.sum = left @ right
        else:
            self.sum.addmm_(left, right)

    def take(self, gradient: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
        """Return the sum plus the gradient that came through autograd, and reset it; None if there is neither."""
        total, self.sum = self.sum if self.sum is None else self.sum[:num_rows], None
        return total if gradient is None else gradient if total is None else gradient + total


def steady(rows: torch.Tensor) -> torch.Tensor:
    """Pad rows [tokens, channels] with zero rows to one of a few lengths, for products in bf16 on a CPU.

    oneDNN compiles a product for each new number of rows, which takes about 10 ms and keeps 1 MB, thirty times a
    micro-batch. The lengths are multiples of 32 up to 512, and of a 16th of the next power of two beyond.
    """
    num_rows = len(rows)
    if rows.is_cuda or rows.dtype != torch.bfloat16:
        return rows
    missing = -num_rows % max(32, 2 ** (num_rows.bit_length() - 4))
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right of 16-bit matrices in float32, without rounding it to 16 bits first where the GPU can."""
    if can_multiply_wide(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def can_multiply_wide(states: torch.Tensor) -> bool:
    """Return whether the device multiplies these 16-bit states with a float32 result."""
    return states.is_cuda and states.dtype != torch.float32 and _wide_product_works(states.dtype)


def _product_in_float32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weight.T of 16-bit matrices in float32, part by part: the weight is never cast whole."""
    product, rows = rows.new_empty(len(rows), len(weight), dtype=torch.float32), rows.float()
    for part, columns in zip(weight.split(_OUTPUTS_AT_ONCE), product.split(_OUTPUTS_AT_ONCE, dim=1), strict=True):
        torch.mm(rows, part.float().T, out=columns)
    return product


class WideLinear(torch.autograd.Function):
    """A frozen 16-bit LM head, [..., dim] to float32 [..., outputs]: a 16-bit product accumulated in float32.

    A product of two 16-bit numbers is exact in float32: the logits are those of the matrices cast to float32, up to the
    order of the sum. A CPU does cast them. The gradient is rounded to 16 bits, like every other layer's.
    """

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(weight)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = wide_product(rows, weight.T) if can_multiply_wide(rows) else _product_in_float32(rows, weight)
        return logits.view(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


@cache
def _wide_product_works(dtype: torch.dtype) -> bool:
    try:
        ones = torch.ones(16, 16, dtype=dtype, device="cuda")
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == 16).all())
    except (NotImplementedError, RuntimeError, TypeError):
        return False


class Norm(torch.autograd.Function):
    """RMS norm of `hidden + added` (of `hidden` if `added` is None), [tokens, dim], and the sum itself."""

    @staticmethod
    def forward(ctx, hidden, added, weight, offset, epsilon, dtype, readers):
        ctx.set_materialize_grads(False)
        ctx.readers = readers
        if added is None:
            normed, total = run(norm, hidden, weight, offset, epsilon, dtype), hidden.view_as(hidden)
        else:
            normed, total = run(add_norm, hidden, added, weight, offset, epsilon, dtype)
        ctx.save_for_backward(hidden if added is None else total, weight)
        ctx.constants, ctx.added_dtype = (offset, epsilon), None if added is None else added.dtype
        ctx.hidden_dtype = hidden.dtype
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, beside):
        total, weight = ctx.saved_tensors
        gradient = ctx.readers.take(gradient, len(total))
        if gradient is None:
            return beside, None if ctx.added_dtype is None else beside, None, None, None, None, None
        dtype, to_added = ctx.added_dtype or total.dtype, None
        if beside is None and dtype == total.dtype:
            own, scale = run(norm_gradient, gradient, total, weight, *ctx.constants)
            to_added = own
        else:
            beside = torch.zeros_like(total) if beside is None else beside
            own, to_added, scale = run(norm_total_gradient, gradient, beside, total, weight, *ctx.constants, dtype)
        to_weight = None
        if ctx.needs_input_grad[2]:
            to_weight = run(norm_weight_gradient, gradient, total, scale).to(weight.dtype)
        own = own.to(ctx.hidden_dtype)
        return own, None if ctx.added_dtype is None else to_added, to_weight, None, None, None, None


class LayerNorm(torch.autograd.Function):
    """Layer norm of `residual + dropout(added)`, [tokens, dim]: in float32, and in `dtype` for products.

    The second is None if `dtype` is.
    """

    @staticmethod
    def forward(ctx, residual, added, rate, weight, bias, epsilon, dtype, readers):  # noqa: PLR0913
        ctx.set_materialize_grads(False)
        keep = torch.empty(added.shape, dtype=torch.bool, device=added.device).bernoulli_(1 - rate) if rate else None
        ctx.scale, ctx.epsilon, ctx.added_dtype, ctx.readers = 1 / (1 - rate), epsilon, added.dtype, readers
        normed, narrow, total = run(
            layer_norm_of_sum, residual, added, keep, ctx.scale, weight, bias, epsilon, dtype or torch.float32
        )
        ctx.save_for_backward(total, keep, weight)
        return normed, narrow if dtype else None

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        total, keep, weight = ctx.saved_tensors
        to_normed, to_narrow = gradients[0], ctx.readers.take(gradients[1], len(total))
        found = [each for each in (to_normed, to_narrow) if each is not None]
        if not found:
            return (None,) * 8
        gradient, beside = found[0], found[1] if len(found) == 2 else None
        kernel = layer_norm_gradients if ctx.needs_input_grad[3] else layer_norm_gradient
        to_residual, to_added, *to_weights = run(
            kernel, gradient, beside, total, keep, ctx.scale, weight, ctx.epsilon, ctx.added_dtype
        )
        return to_residual, to_added, None, *(to_weights or (None, None)), None, None, None


class Rotation(torch.autograd.Function):
    """Rotary embedding of states [tokens, heads, dim] by angles [tokens, rotated dim], which have no gradient."""

    @staticmethod
    def forward(ctx, states, cos, sin, dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        return run(rotated, states, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return run(rotated_gradient, gradient, *ctx.saved_tensors, ctx.dtype), None, None, None


class Gate(torch.autograd.Function):
    """activation(gate) × up, of [tokens, dim] each."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return run(gated, gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *run(gated_gradient, gradient, *ctx.saved_tensors, ctx.activation), None


class Product(torch.autograd.Function):
    """A linear layer on rows [tokens, inputs]; the weight's gradient is float32, like the weight."""

    @staticmethod
    def forward(ctx, rows, weight, bias, readers):
        ctx.readers, ctx.weight_dtype = readers, weight.dtype
        narrow = weight.to(rows.dtype)
        ctx.save_for_backward(rows, narrow)
        bias = None if bias is None else bias.to(rows.dtype)
        return functional.linear(steady(rows), narrow, bias)[: len(rows)]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        num_rows, rows, gradient = len(rows), steady(rows), steady(gradient.to(rows.dtype))
        to_rows = to_weight = to_bias = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                readers = ctx.readers or Readers()
                readers.add_product(gradient, weight)
                to_rows = None if ctx.readers else readers.take(None, num_rows)
            if ctx.needs_input_grad[1]:
                to_weight = wide_product(gradient.T, rows).to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                to_bias = gradient.sum(0, dtype=torch.float32).to(ctx.weight_dtype)
        return to_rows, to_weight, to_bias, None


class AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with LoRA, on rows [tokens, inputs]: the small products add to the large one in place."""

    @staticmethod
    def forward(ctx, rows, down, up, scaling, base, readers):
        ctx.readers = readers
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        padded = steady(rows)
        result, inner = base(padded), padded @ down.T
        result.addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, down, up)
        ctx.scaling, ctx.base = scaling, base
        return result[: len(rows)]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, inner, down, up = ctx.saved_tensors
        num_rows, rows, gradient = len(rows), steady(rows), steady(gradient.to(rows.dtype))
        with torch.autocast(gradient.device.type, enabled=False):
            to_inner = (gradient @ up).mul_(ctx.scaling)
            to_up = wide_product(gradient.T, inner).mul_(ctx.scaling)
            to_down = wide_product(to_inner.T, rows)
            to_rows = None
            if ctx.needs_input_grad[0]:
                readers = ctx.readers or Readers()
                readers.add_product(gradient, _frozen_weight(ctx.base, rows.dtype))
                readers.add_product(to_inner, down)
                to_rows = None if ctx.readers else readers.take(None, num_rows)
        return to_rows, to_down, to_up, None, None, None


def _frozen_weight(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weight [outputs, inputs], dequantised if it is in 4 bits."""
    if type(base) is nn.Linear:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight, base.weight.quant_state).to(dtype)
