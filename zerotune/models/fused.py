"""Fused passes: what a decoder does between its matrix products, in one compiled kernel instead of several.

A norm, with the residual's sum before it; the rotary embedding; the gated activation; a projection's product, with
LoRA's. Each is a function of torch's autograd that keeps its inputs alone and computes the rest again in the backward
pass. Its arithmetic is in float32 and rounded once, where the stock modules round several times.

They take the place of the stock modules' forwards by what a module is, never by its name: it has the parts, and gives
the same numbers on a probe, without weights or a device. A module that is not stays as it is. Hooks see the same
modules called.
"""

import copy
import sys
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zerotune.settings.groups import ModelSettings

NORM, ROTARY, GATE, RESIDUAL, ADAPTER = "norm", "rotary embedding", "gated activation", "residual", "adapter"
PRODUCT = "projection"
_ACTIVATIONS = {"silu": functional.silu, "gelu": partial(functional.gelu, approximate="tanh")}
_BACKEND, _MOST_COMPILATIONS = "inductor", 64
_LEAST_ON_CPU = 100_000_000  # weights; a smaller model would not win back what the compiler takes
_OUTPUTS_AT_ONCE = 4096  # of an LM head whose weights a CPU casts to float32
_EPSILONS = ("variance_epsilon", "eps")
# The parts of a decoder layer; in Gemma-2's sandwich, norms follow attention and MLP too.
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def use_fused_passes(
    model: nn.Module, settings: ModelSettings, device: torch.device
) -> tuple[tuple[str, ...], str | None]:
    """Let a stock model, and the adapters in it, run fused passes from now on, in 16 bits unless told not to.

    On a CPU only where the model is large enough that the compiler's time is won back.

    Returns:
        the names of the passes that are fused; and why there are none where there could be, in one line.
    """
    if settings.compile == "none" or settings.precision == "fp32" or _is_too_small(model, device):
        return (), None
    problem = "ZeRO-3 shards the weights" if settings.zero_stage == 3 else kernels_fail(device.type)
    if problem:
        return (), f"--compile is off: {problem}"
    _compiling.add(device.type)
    return fuse(model), None


def _is_too_small(model: nn.Module, device: torch.device) -> bool:
    return device.type == "cpu" and sum(weight.numel() for weight in model.parameters()) < _LEAST_ON_CPU


def fuse(model: nn.Module) -> tuple[str, ...]:
    """Replace the forwards of a model's modules wherever the fused ones give the same numbers. Return their names."""
    found = set()
    for module in model.modules():
        if _fuse_norm(module):
            found.add(NORM)
    for module in model.modules():
        found |= {GATE} if _fuse_gate(module) else set()
        found |= {ROTARY} if _fuse_rotary(module) else set()
        found |= {RESIDUAL} if _fuse_residual(module) else set()
        found |= {ADAPTER} if _fuse_adapter(module) else set()
        found |= {PRODUCT} if _fuse_products(module) else set()
    if ROTARY in found:
        _mark_angles(model)
    return tuple(sorted(found))


def fuse_adapters(model: nn.Module) -> None:
    """Let adapters of a model that is evaluated add to their layers' products in place. Nothing is compiled."""
    for module in model.modules():
        _fuse_adapter(module)


# --- kernels: pure functions of rows, [tokens, ...] each ---


def _norm(hidden, weight, offset: float, epsilon: float, dtype: torch.dtype):
    wide = hidden.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * (weight.float() + offset)).to(dtype)


def _add_norm(hidden, added, weight, offset: float, epsilon: float, dtype: torch.dtype):
    total = hidden + added
    return _norm(total, weight, offset, epsilon, dtype), total


def _norm_backward(gradient, hidden, weight, offset: float, epsilon: float):
    """Return the gradient of a norm's input and the scale of each row, float32 [tokens, dim or 1].

    The formula is that of Zhang & Sennrich 2019, section 4.
    """
    wide = hidden.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    normed, scaled = wide * scale, gradient.float() * (weight.float() + offset)
    return scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)), scale


def _norm_gradient(gradient, hidden, weight, offset: float, epsilon: float):
    inner, scale = _norm_backward(gradient, hidden, weight, offset, epsilon)
    return inner.to(hidden.dtype), scale


def _norm_total_gradient(gradient, beside, hidden, weight, offset: float, epsilon: float, dtype: torch.dtype):
    """Return the gradient of the residual's stream, in its own type and in that of what was added, and the scales."""
    inner, scale = _norm_backward(gradient, hidden, weight, offset, epsilon)
    whole = inner + beside.float()
    own = whole.to(hidden.dtype)
    return own, own if dtype == hidden.dtype else whole.to(dtype), scale


def _norm_weight_gradient(gradient, hidden, scale):
    return (gradient.float() * (hidden.float() * scale)).sum(0)


def _rotated(states, cos, sin, dtype: torch.dtype):
    """Rotate states [tokens, heads, dim] by angles [tokens, rotated dim] (Su et al. 2021, equation 34)."""
    wide, cos, sin, signs, width = _angles(states, cos, sin)
    turned = wide[..., :width] * cos + wide[..., :width].roll(width // 2, -1) * (sin * signs)
    return _with_rest(turned, wide).to(dtype)


def _rotated_gradient(gradient, cos, sin, dtype: torch.dtype):
    wide, cos, sin, signs, width = _angles(gradient, cos, sin)
    turned = wide[..., :width] * cos - (wide[..., :width] * sin).roll(width // 2, -1) * signs
    return _with_rest(turned, wide).to(dtype)


def _angles(states, cos, sin):
    """Return float32 states and angles, the signs with which halves change places, and the width that is rotated."""
    width = cos.shape[-1]
    signs = torch.where(torch.arange(width, device=states.device) < width // 2, -1.0, 1.0)
    return states.float(), cos.float().unsqueeze(1), sin.float().unsqueeze(1), signs, width


def _with_rest(turned, wide):
    width = turned.shape[-1]
    return turned if width == wide.shape[-1] else torch.cat([turned, wide[..., width:]], dim=-1)


def _gated(gate, up, activation: str):
    return (_ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype)


def _gated_gradient(gradient, gate, up, activation: str):
    wide, opened = gradient.float(), gate.float()
    to_gate = wide * up.float()
    if activation == "silu":
        inner = torch.ops.aten.silu_backward(to_gate, opened)
    else:
        inner = torch.ops.aten.gelu_backward(to_gate, opened, approximate="tanh")
    return inner.to(gate.dtype), (wide * _ACTIVATIONS[activation](opened)).to(up.dtype)


_compiling: set[str] = set()  # types of devices whose compiled kernels were found to be right


def run(kernel: Callable, *args):
    """Call a kernel: compiled where `use_fused_passes` found that it can be; else operation by operation."""
    return run_compiled(kernel, *args) if args[0].device.type in _compiling else kernel(*args)


def run_compiled(kernel: Callable, *args):
    """Call a kernel that is compiled once for all numbers of tokens, the first size of every matrix."""
    args = contiguous(args)
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(arg, 0)
    # one compilation for each type, width and constant of a model; the limit is another one in a backward pass's thread
    if torch._dynamo.config.recompile_limit < _MOST_COMPILATIONS:
        torch._dynamo.config.recompile_limit = _MOST_COMPILATIONS
    return _compiled(kernel)(*args)


def contiguous(args: tuple) -> list:
    """Return arguments as a kernel is compiled for: other strides depend on the number of tokens."""
    return [arg.detach().contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]


@cache
def _compiled(kernel: Callable) -> Callable:
    return torch.compile(kernel, dynamic=False, fullgraph=True, backend=_BACKEND)


# --- functions of autograd ---


class _Readers:
    """The sum of the gradients that the readers of one tensor have for it, which their products add up in place.

    Autograd would add them in passes of their own. The tensor's producer takes the sum in its backward pass.
    """

    def __init__(self):
        self.sum: torch.Tensor | None = None

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left @ right; more rows than the tensor has, of `steady`, are left out when the sum is taken."""
        if self.sum is None:
            self.sum = left @ right
        else:
            self.sum.addmm_(left, right)

    def take(self, gradient: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
        """Return the sum, with the gradient that came through autograd, and forget it; None where there is neither."""
        total, self.sum = self.sum if self.sum is None else self.sum[:num_rows], None
        return total if gradient is None else gradient if total is None else gradient + total


def steady(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [tokens, channels] with zeros below up to one of few numbers of rows, for products in bf16 on a CPU.

    oneDNN compiles a product for each number of rows anew, which takes about 10 ms and keeps 1 MB, thirty times a
    micro-batch. The numbers are multiples of 32 up to 512, and of a 16th of the next power of two beyond.
    """
    num_rows = len(rows)
    if rows.is_cuda or rows.dtype != torch.bfloat16:
        return rows
    missing = -num_rows % max(32, 2 ** (num_rows.bit_length() - 4))
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right of 16-bit matrices in float32, without rounding it to 16 bits first where the GPU can."""
    if can_multiply_wide(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def can_multiply_wide(states: torch.Tensor) -> bool:
    """Return whether the device multiplies states of this type, of 16 bits, and answers in float32."""
    return states.is_cuda and states.dtype != torch.float32 and _wide_product_works()


def _product_in_float32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weight.T of 16-bit matrices in float32, by parts of the weights: none is cast whole."""
    product, rows = rows.new_empty(len(rows), len(weight), dtype=torch.float32), rows.float()
    for part, columns in zip(weight.split(_OUTPUTS_AT_ONCE), product.split(_OUTPUTS_AT_ONCE, dim=1), strict=True):
        torch.mm(rows, part.float().T, out=columns)
    return product


class WideLinear(torch.autograd.Function):
    """A frozen 16-bit LM head, [..., dim] to float32 [..., outputs]: a product in 16 bits that adds up in float32.

    A product of two 16-bit numbers is exact in float32: the logits are those of the matrices cast to float32, up to the
    order of the sum. A CPU casts them. The gradient is rounded to 16 bits, as that of every other layer.
    """

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(weight)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = _wide_product(rows, weight.T) if can_multiply_wide(rows) else _product_in_float32(rows, weight)
        return logits.view(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


@cache
def _wide_product_works() -> bool:
    try:
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == 16).all())
    except (NotImplementedError, RuntimeError, TypeError):
        return False


class _Norm(torch.autograd.Function):
    """RMS norm of `hidden + added` (or `hidden` alone, with None), [tokens, dim], and the sum itself."""

    @staticmethod
    def forward(ctx, hidden, added, weight, offset, epsilon, dtype, readers):
        ctx.set_materialize_grads(False)
        ctx.readers = readers
        if added is None:
            normed, total = run(_norm, hidden, weight, offset, epsilon, dtype), hidden.view_as(hidden)
        else:
            normed, total = run(_add_norm, hidden, added, weight, offset, epsilon, dtype)
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
            own, scale = run(_norm_gradient, gradient, total, weight, *ctx.constants)
            to_added = own
        else:
            beside = torch.zeros_like(total) if beside is None else beside
            own, to_added, scale = run(_norm_total_gradient, gradient, beside, total, weight, *ctx.constants, dtype)
        to_weight = None
        if ctx.needs_input_grad[2]:
            to_weight = run(_norm_weight_gradient, gradient, total, scale).to(weight.dtype)
        own = own.to(ctx.hidden_dtype)
        return own, None if ctx.added_dtype is None else to_added, to_weight, None, None, None, None


class _Rotation(torch.autograd.Function):
    """Rotary embedding of states [tokens, heads, dim] by angles [tokens, rotated dim], which have no gradient."""

    @staticmethod
    def forward(ctx, states, cos, sin, dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        return run(_rotated, states, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return run(_rotated_gradient, gradient, *ctx.saved_tensors, ctx.dtype), None, None, None


class _Gate(torch.autograd.Function):
    """activation(gate) × up, of [tokens, dim] each."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return run(_gated, gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *run(_gated_gradient, gradient, *ctx.saved_tensors, ctx.activation), None


class _Product(torch.autograd.Function):
    """A linear layer of rows [tokens, inputs], whose weight's gradient is float32 as the weight is."""

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
                readers = ctx.readers or _Readers()
                readers.add_product(gradient, weight)
                to_rows = None if ctx.readers else readers.take(None, num_rows)
            if ctx.needs_input_grad[1]:
                to_weight = _wide_product(gradient.T, rows).to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                to_bias = gradient.sum(0, dtype=torch.float32).to(ctx.weight_dtype)
        return to_rows, to_weight, to_bias, None


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with LoRA, of rows [tokens, inputs]: the small products add to the large one's in place."""

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
            to_up = _wide_product(gradient.T, inner).mul_(ctx.scaling)
            to_down = _wide_product(to_inner.T, rows)
            to_rows = None
            if ctx.needs_input_grad[0]:
                readers = ctx.readers or _Readers()
                readers.add_product(gradient, _frozen_weight(ctx.base, rows.dtype))
                readers.add_product(to_inner, down)
                to_rows = None if ctx.readers else readers.take(None, num_rows)
        return to_rows, to_down, to_up, None, None, None


def _frozen_weight(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weight [outputs, inputs], out of its 4 bits if it has them."""
    if type(base) is nn.Linear:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight, base.weight.quant_state).to(dtype)


# --- modules ---


def _narrow(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast multiplies, None without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _twin(module: nn.Module, **parts) -> nn.Module:
    """Return a module with the same settings and methods but without hooks and weights, and other parts."""
    twin = copy.copy(module)
    twin._parameters = {name: part for name, part in parts.items() if isinstance(part, nn.Parameter)}
    twin._modules = module._modules | {name: part for name, part in parts.items() if name not in twin._parameters}
    return twin


def _probe(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), device="cpu")


def _same(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> bool:
    """Return whether two functions give the same float32 numbers on a CPU, up to rounding; an error is a difference."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return torch.allclose(one(), other(), rtol=1e-5, atol=1e-5)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def _is_stock(module: nn.Module) -> bool:
    return "forward" not in module.__dict__


def _fuse_norm(module: nn.Module) -> bool:
    names = [name for name in _EPSILONS if isinstance(getattr(module, name, None), float)]
    if [*module._parameters] != ["weight"] or module._modules or not names or not _is_stock(module):
        return False
    epsilon, weight, hidden = getattr(module, names[0]), nn.Parameter(_probe(8)), _probe(3, 8)
    twin = _twin(module, weight=weight)
    for offset in (0.0, 1.0):
        ours = partial(_norm, hidden, weight, offset, epsilon, torch.float32)
        if _same(ours, lambda: type(module).forward(twin, hidden)):
            with torch.no_grad():
                keeps_type = type(module).forward(twin, hidden.bfloat16()).dtype == torch.bfloat16
            module.forward = partial(_norm_forward, module, offset, epsilon, keeps_type)
            return True
    return False


def _norm_forward(
    module: nn.Module,
    offset: float,
    epsilon: float,
    keeps_type: bool,
    hidden_states: torch.Tensor,
    added: torch.Tensor | None = None,
    with_total: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of `hidden_states + added`, [..., dim], and with_total also that sum.

    Args:
        keeps_type: the stock norm has its input's type, not the wider one of input and weight.
    """
    if hidden_states.ndim == 4 and not hidden_states.is_contiguous() and hidden_states.transpose(1, 2).is_contiguous():
        # heads before tokens
        shaped = partial(_norm_forward, module, offset, epsilon, keeps_type)
        return shaped(hidden_states.transpose(1, 2)).transpose(1, 2)
    weight, total_dtype = module.weight, hidden_states.dtype
    if added is not None:
        total_dtype = torch.result_type(hidden_states, added)
        added = added.reshape(-1, added.shape[-1])
    dtype = total_dtype if keeps_type else torch.promote_types(total_dtype, weight.dtype)
    if getattr(module, "feeds_products", False):
        dtype = _narrow(hidden_states.device) or dtype
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    readers = _Readers()
    normed, total = _Norm.apply(rows, added, weight, offset, epsilon, dtype, readers)
    normed = normed.view(hidden_states.shape)
    if getattr(module, "feeds_products", False) and normed.requires_grad:
        normed.readers = readers  # for the projections that get this very tensor
    return (normed, total.view(hidden_states.shape)) if with_total else normed


def _fuse_gate(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    joined = {"gate_up_proj", "down_proj"} <= parts
    if not (joined or {"gate_proj", "up_proj", "down_proj"} <= parts) or not _is_stock(module):
        return False
    action = next((getattr(module, name) for name in ("act_fn", "activation_fn") if hasattr(module, name)), None)
    inputs = _probe(3, 8)
    stubs = {"gate_proj": lambda x: 2 * x, "up_proj": lambda x: 3 - x, "down_proj": torch.sin}
    stubs = {"gate_up_proj": lambda x: torch.cat([2 * x, 3 - x], -1), "down_proj": torch.sin} if joined else stubs
    twin = _twin(module, **stubs)
    for name, activation in _ACTIVATIONS.items():
        if action is None or not _same(partial(action, inputs), partial(activation, inputs)):
            continue
        if _same(partial(_gated_probe, activation, inputs), partial(type(module).forward, twin, inputs)):
            module.forward = partial(_gate_forward, module, name, joined)
            return True
    return False


def _gated_probe(activation: Callable, inputs: torch.Tensor) -> torch.Tensor:
    return torch.sin(activation(2 * inputs) * (3 - inputs))


def _gate_forward(module: nn.Module, activation: str, joined: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    if joined:
        gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    rows = (states.reshape(-1, states.shape[-1]) for states in (gate, up))
    return module.down_proj(_Gate.apply(*rows, activation).view(gate.shape))


def _fuse_rotary(module: nn.Module) -> bool:
    """Replace the function by which a family's attention rotates queries and keys, in its module of transformers.

    Other models of the family keep the stock function: it is called for angles that are not marked (`_mark_angles`).
    """
    source = sys.modules.get(type(module).__module__)
    stock = getattr(source, "apply_rotary_pos_emb", None)
    if stock is None or not (hasattr(module, "q_proj") or hasattr(module, "qkv_proj")):
        return False
    if isinstance(stock, partial) and stock.func is _rotate:
        return True
    query, key, cos, sin = _probe(2, 4, 3, 8), _probe(2, 2, 3, 8), _probe(2, 3, 8), _probe(2, 3, 8) + 1

    def joined(rotate: Callable) -> torch.Tensor:
        return torch.cat([part.flatten() for part in rotate(query, key, cos, sin)])

    try:
        keeps_type = stock(query.bfloat16(), key.bfloat16(), cos, sin)[0].dtype == torch.bfloat16
    except (RuntimeError, TypeError, ValueError):
        return False
    ours = partial(_rotate, stock, keeps_type)
    if not _same(lambda: joined(partial(_rotate_both, keeps_type)), lambda: joined(stock)):
        return False
    source.apply_rotary_pos_emb = ours
    return True


def _mark_angles(model: nn.Module) -> None:
    """Let the angles that a model computes say that they are those of a model with fused passes."""

    def mark(module: nn.Module, inputs: tuple, angles: tuple[torch.Tensor, torch.Tensor]) -> None:
        for each in angles:
            each.of_fused_model = True

    for module in model.modules():
        if any(name.endswith("inv_freq") for name in module._buffers):
            module.register_forward_hook(mark)


def _rotate(stock: Callable, keeps_type: bool, query, key, cos, sin, *more, **named):
    plain = hasattr(cos, "of_fused_model") and not more and not named and not cos.requires_grad
    return _rotate_both(keeps_type, query, key, cos, sin) if plain else stock(query, key, cos, sin, *more, **named)


def _rotate_both(keeps_type: bool, query, key, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys [B, heads, T, dim] by angles [B or 1, T, rotated dim].

    Under autocast they get the type in which attention multiplies, and are rounded to it here instead of there.
    """
    batch, _, length, _ = query.shape
    angles = [each.expand(batch, *each.shape[1:]).reshape(batch * length, -1) for each in (cos, sin)]
    rotated = []
    for states in (query, key):
        own = states.dtype if keeps_type else torch.promote_types(states.dtype, cos.dtype)
        rows = states.transpose(1, 2).reshape(batch * length, states.shape[1], -1)
        turned = _Rotation.apply(rows, *angles, _narrow(states.device) or own)
        rotated.append(turned.view(batch, length, *turned.shape[1:]).transpose(1, 2))
    return tuple(rotated)


def _fuse_residual(layer: nn.Module) -> bool:
    """Replace a decoder layer's forward where it is the usual one, of norms that are fused.

    It becomes one of a subclass, whose forward transformers wraps for activation checkpointing as it does the stock
    one's. A norm whose output is multiplied only writes the type in which autocast multiplies.
    """
    parts = dict(layer.named_children())
    sandwich = {*_SANDWICH} <= parts.keys()
    wanted = (*_PARTS, *(_SANDWICH if sandwich else ()))
    others = [part for name, part in parts.items() if name not in wanted]
    if not {*wanted} <= parts.keys() or not all(isinstance(part, nn.Dropout) and not part.p for part in others):
        return False
    norms = [part for name, part in parts.items() if name.endswith("norm")]
    are_fused = all(getattr(norm.forward, "func", None) is _norm_forward for norm in norms)
    if not are_fused or not _is_stock(layer) or hasattr(layer, "fuses_residual"):
        return False
    steps = {name: _Stub(2.0 + place, name == "self_attn") for place, name in enumerate(wanted)}
    twin, hidden = _twin(layer, **steps), _probe(1, 3, 8)
    if not _same(partial(_layer_forward, twin, hidden), partial(type(layer).forward, twin, hidden)):
        return False
    layer.__class__ = _fused_layer(type(layer))
    for norm, reader in (("input_layernorm", "self_attn"), (wanted[4] if sandwich else wanted[2], "mlp")):
        parts[norm].feeds_products = parts[reader].fuses_products = _multiplies_only(parts[reader])
    return True


class _Stub:
    """Stands for a part of a layer: takes what a fused norm, attention or an MLP takes."""

    def __init__(self, factor: float, is_attention: bool):
        self.factor, self.is_attention = factor, is_attention

    def __call__(self, hidden_states, added=None, with_total=False, **_):
        total = hidden_states if added is None else hidden_states + added
        mixed = torch.sin(self.factor * total)
        return (mixed, None) if self.is_attention else (mixed, total) if with_total else mixed


def _multiplies_only(module: nn.Module) -> bool:
    """Return whether all matrices in a module are those of linear layers, which cast their input."""
    owners = [part for part in module.modules() if any(p.ndim > 1 for p in part.parameters(recurse=False))]
    return all(isinstance(part, nn.Linear) or getattr(part.forward, "func", None) is _norm_forward for part in owners)


@cache
def _fused_layer(kind: type) -> type:
    own = {"forward": _layer_forward, "fuses_residual": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)


def _layer_forward(layer: nn.Module, hidden_states: torch.Tensor, **given) -> torch.Tensor:
    sandwich = hasattr(layer, _SANDWICH[0])
    normed, residual = layer.input_layernorm(hidden_states, with_total=True)
    mixed, _ = layer.self_attn(hidden_states=normed, **given)
    if sandwich:
        mixed = layer.post_attention_layernorm(mixed)
    before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
    normed, residual = before_mlp(residual, mixed, with_total=True)
    mixed = layer.mlp(normed)
    return residual + (layer.post_feedforward_layernorm(mixed) if sandwich else mixed)


def _fuse_adapter(module: nn.Module) -> bool:
    """Replace the forward of peft's LoRA around a frozen linear layer, plain or in 4 bits."""
    base = getattr(module, "base_layer", None)
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")) or base is None:
        return False
    is_linear = type(base) is nn.Linear or type(base).__name__ == "Linear4bit"
    if not is_linear or base.weight.requires_grad or not _is_stock(module):
        return False
    module.forward = partial(_adapter_forward, module)
    return True


def _adapter_forward(module: nn.Module, inputs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Return the layer's output, by peft's own forward wherever something but plain LoRA is asked for."""
    names, dtype = module.active_adapters, _narrow(inputs.device) or inputs.dtype
    plain = not (args or kwargs or module.disable_adapters or module.merged or module.lora_variant) and len(names) == 1
    if not plain or names[0] not in module.lora_A:
        return type(module).forward(module, inputs, *args, **kwargs)
    (name,), base = names, module.base_layer
    down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    drops = module.training and getattr(dropout, "p", 0.0) > 0
    keeps_type = dtype != torch.float32 or down.weight.dtype == torch.float32
    if drops or not keeps_type or down.bias is not None or up.bias is not None:
        return type(module).forward(module, inputs)
    rows = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    readers = _readers_of(inputs, dtype)
    result = _AdaptedLinear.apply(rows, down.weight, up.weight, module.scaling[name], base, readers)
    return result.view(*inputs.shape[:-1], -1)


def _readers_of(inputs: torch.Tensor, dtype: torch.dtype) -> _Readers | None:
    return getattr(inputs, "readers", None) if inputs.dtype == dtype else None


def _fuse_products(module: nn.Module) -> bool:
    """Replace the forward of the linear layers of an attention or MLP that train."""
    if not getattr(module, "fuses_products", False):
        return False
    found = [child for child in module.children() if type(child) is nn.Linear and child.weight.requires_grad]
    found = [child for child in found if _is_stock(child)]
    for child in found:
        child.forward = partial(_product_forward, child)
    return bool(found)


def _product_forward(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    dtype = _narrow(inputs.device) or inputs.dtype
    rows = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    result = _Product.apply(rows, module.weight, module.bias, _readers_of(inputs, dtype))
    return result.view(*inputs.shape[:-1], -1)


# --- the kernels of this machine ---


@cache
@torch.no_grad()
def kernels_fail(device_type: str) -> str | None:
    """Return what is wrong with compiled kernels beside the same functions as they are on a CPU, None if nothing is.

    All kernels of a GPU are looked at; of a CPU, whose compiler is slower and less new, one.
    """
    try:
        for name, kernel, args in _samples() if device_type == "cuda" else _samples()[:1]:
            wanted = kernel(*args)
            found = run_compiled(
                kernel, *(arg.to(device_type) if isinstance(arg, torch.Tensor) else arg for arg in args)
            )
            pairs = [(wanted, found)] if isinstance(wanted, torch.Tensor) else zip(wanted, found, strict=True)
            for right, given in pairs:
                if not torch.allclose(given.cpu().float(), right.float(), rtol=0.02, atol=0.02):
                    return f"{name} gives other numbers"
    except Exception as error:  # what a compiler raises has no common class
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    return None


def _samples():
    """Return each kernel with a name and small inputs, of the types that training has."""
    hidden, narrow, weight = _probe(24, 256), _probe(24, 256).bfloat16(), _probe(256)
    states, cos, sin = _probe(24, 4, 64).bfloat16(), _probe(24, 64), _probe(24, 64)
    constants = (0.0, 1e-6)
    scale = torch.rsqrt((hidden * hidden).mean(-1, keepdim=True))
    return (
        (NORM, _norm, (hidden, weight, *constants, torch.bfloat16)),
        (NORM, _norm_gradient, (narrow, hidden, weight, *constants)),
        (NORM, _norm_weight_gradient, (narrow, hidden, scale)),
        (RESIDUAL, _add_norm, (hidden, narrow, weight, *constants, torch.bfloat16)),
        (RESIDUAL, _norm_total_gradient, (narrow, hidden, hidden, weight, *constants, torch.bfloat16)),
        (ROTARY, _rotated, (states, cos, sin, torch.bfloat16)),
        (ROTARY, _rotated_gradient, (states, cos, sin, torch.bfloat16)),
        *((GATE, _gated, (narrow, narrow + 1, name)) for name in _ACTIVATIONS),
        *((GATE, _gated_gradient, (narrow, narrow + 1, narrow - 1, name)) for name in _ACTIVATIONS),
    )
