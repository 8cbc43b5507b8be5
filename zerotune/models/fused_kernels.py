"""The kernels of fused passes: pure functions of rows, [tokens, ...] each, and the code to compile and check them.

Their arithmetic is in float32 and rounded once, where the stock modules round several times.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn import functional

from zerotune.errors import first_line

NORM, ROTARY, GATE, RESIDUAL = "norm", "rotary embedding", "gated activation", "residual"
LAYER_NORM = "layer norm"
ACTIVATIONS = {"silu": functional.silu, "gelu": partial(functional.gelu, approximate="tanh")}
_BACKEND, _MOST_COMPILATIONS = "inductor", 64


def norm(hidden, weight, offset: float, epsilon: float, dtype: torch.dtype):
    wide = hidden.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * (weight.float() + offset)).to(dtype)


def add_norm(hidden, added, weight, offset: float, epsilon: float, dtype: torch.dtype):
    total = hidden + added
    return norm(total, weight, offset, epsilon, dtype), total


def _norm_backward(gradient, hidden, weight, offset: float, epsilon: float):
    """Return the gradient of a norm's input and the scale of each row, float32 [tokens, dim or 1].

    The formula is that of Zhang & Sennrich 2019, section 4.
    """
    wide = hidden.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    normed, scaled = wide * scale, gradient.float() * (weight.float() + offset)
    return scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)), scale


def norm_gradient(gradient, hidden, weight, offset: float, epsilon: float):
    inner, scale = _norm_backward(gradient, hidden, weight, offset, epsilon)
    return inner.to(hidden.dtype), scale


def norm_total_gradient(gradient, beside, hidden, weight, offset: float, epsilon: float, dtype: torch.dtype):
    """Return the residual stream's gradient, in its own type and in the added tensor's, and the scale of each row."""
    inner, scale = _norm_backward(gradient, hidden, weight, offset, epsilon)
    whole = inner + beside.float()
    own = whole.to(hidden.dtype)
    return own, own if dtype == hidden.dtype else whole.to(dtype), scale


def norm_weight_gradient(gradient, hidden, scale):
    return (gradient.float() * (hidden.float() * scale)).sum(0)


def layer_norm_of_sum(residual, added, keep, scale: float, weight, bias, epsilon: float, dtype: torch.dtype):
    """Return the layer norm of `residual + added` in float32, the same in `dtype`, and the float32 sum.

    Args:
        keep: bool mask of the values of `added` that dropout keeps, which are multiplied by `scale`; None: all.
    """
    wide = added.float()
    total = residual.float() + (wide if keep is None else wide * keep * scale)
    normed, _ = _centred(total, epsilon)
    normed = normed * weight.float() + bias.float()
    return normed, normed.to(dtype), total


def _centred(total, epsilon: float):
    """Return the rows scaled to mean 0 and variance 1, and the factors."""
    centred = total - total.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + epsilon)
    return centred * scale, scale


def layer_norm_gradient(gradient, beside, total, keep, scale: float, weight, epsilon: float, dtype: torch.dtype):
    """Return the gradients of the residual, float32, and of `added`, from the summed gradients of the two outputs.

    The formula is the derivative of Ba et al. 2016, section 3.
    """
    return _layer_norm_gradient(gradient, beside, total, keep, scale, weight, epsilon, dtype)[:2]


def layer_norm_gradients(gradient, beside, total, keep, scale: float, weight, epsilon: float, dtype: torch.dtype):
    """Return the same, and the gradients of the norm's weight and bias, float32."""
    to_residual, to_added, wide, normed = _layer_norm_gradient(
        gradient, beside, total, keep, scale, weight, epsilon, dtype
    )
    return to_residual, to_added, (wide * normed).sum(0), wide.sum(0)


def _layer_norm_gradient(gradient, beside, total, keep, scale, weight, epsilon, dtype):
    wide = gradient.float() if beside is None else gradient.float() + beside.float()
    normed, factor = _centred(total, epsilon)
    scaled = wide * weight.float()
    inner = factor * (scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True))
    return inner, (inner if keep is None else inner * keep * scale).to(dtype), wide, normed


def rotated(states, cos, sin, dtype: torch.dtype):
    """Rotate states [tokens, heads, dim] by angles [tokens, rotated dim] (Su et al. 2021, equation 34)."""
    wide, cos, sin, signs, width = _angles(states, cos, sin)
    turned = wide[..., :width] * cos + wide[..., :width].roll(width // 2, -1) * (sin * signs)
    return _with_rest(turned, wide).to(dtype)


def rotated_gradient(gradient, cos, sin, dtype: torch.dtype):
    wide, cos, sin, signs, width = _angles(gradient, cos, sin)
    turned = wide[..., :width] * cos - (wide[..., :width] * sin).roll(width // 2, -1) * signs
    return _with_rest(turned, wide).to(dtype)


def _angles(states, cos, sin):
    """Return float32 states and angles, the signs of the halves that change places, and the width that is rotated."""
    width = cos.shape[-1]
    signs = torch.where(torch.arange(width, device=states.device) < width // 2, -1.0, 1.0)
    return states.float(), cos.float().unsqueeze(1), sin.float().unsqueeze(1), signs, width


def _with_rest(turned, wide):
    width = turned.shape[-1]
    return turned if width == wide.shape[-1] else torch.cat([turned, wide[..., width:]], dim=-1)


def gated(gate, up, activation: str):
    return (ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype)


def gated_gradient(gradient, gate, up, activation: str):
    wide, opened = gradient.float(), gate.float()
    to_gate = wide * up.float()
    if activation == "silu":
        inner = torch.ops.aten.silu_backward(to_gate, opened)
    else:
        inner = torch.ops.aten.gelu_backward(to_gate, opened, approximate="tanh")
    return inner.to(gate.dtype), (wide * ACTIVATIONS[activation](opened)).to(up.dtype)


_compiling: set[str] = set()  # types of devices whose compiled kernels have passed the check


def compile_on(device_type: str) -> None:
    """Make `run` compile kernels on a type of device from now on."""
    _compiling.add(device_type)


def run(kernel: Callable, *args):
    """Call a kernel: compiled on devices that `compile_on` was called for, else operation by operation."""
    return run_compiled(kernel, *args) if args[0].device.type in _compiling else kernel(*args)


def run_compiled(kernel: Callable, *args):
    """Call a kernel that is compiled once for all numbers of tokens, the first dimension of every matrix."""
    args = contiguous(args)
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(arg, 0)
    # a model needs one compilation for each type, width and constant; a backward pass's thread has its own limit
    if torch._dynamo.config.recompile_limit < _MOST_COMPILATIONS:
        torch._dynamo.config.recompile_limit = _MOST_COMPILATIONS
    return _compiled(kernel)(*args)


def contiguous(args: tuple) -> list:
    """Return the arguments detached and contiguous: other strides would depend on the number of tokens."""
    return [arg.detach().contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]


@cache
def _compiled(kernel: Callable) -> Callable:
    return torch.compile(kernel, dynamic=False, fullgraph=True, backend=_BACKEND)


@cache
@torch.no_grad()
def why_kernels_fail(device_type: str, dtype: torch.dtype, of_encoder: bool = False) -> str | None:
    """Return how compiled kernels differ from the uncompiled functions on a CPU, or fail; None if they agree.

    On a GPU all kernels of a decoder, or of an encoder, are checked; on a CPU, whose compiler is slower and more
    mature, only one.

    Args:
        dtype: the 16-bit type of training: a GPU before Ampere compiles nothing in bf16.
    """
    try:
        samples = [each for each in _samples(dtype) if (each[0] == LAYER_NORM) == of_encoder]
        for name, kernel, args in samples if device_type == "cuda" else samples[:1]:
            wanted = kernel(*args)
            found = run_compiled(
                kernel, *(arg.to(device_type) if isinstance(arg, torch.Tensor) else arg for arg in args)
            )
            pairs = [(wanted, found)] if isinstance(wanted, torch.Tensor) else zip(wanted, found, strict=True)
            for right, given in pairs:
                if not torch.allclose(given.cpu().float(), right.float(), rtol=0.02, atol=0.02):
                    return f"{name} gives other numbers"
    except Exception as error:  # a compiler's errors have no common class
        return f"{type(error).__name__}: {first_line(error)}"[:200]
    return None


def _samples(dtype: torch.dtype):
    """Return each kernel with a name and small inputs of the types that training uses."""
    hidden, narrow, weight = probe(24, 256), probe(24, 256).to(dtype), probe(256)
    states, cos, sin = probe(24, 4, 64).to(dtype), probe(24, 64), probe(24, 64)
    constants, keep = (0.0, 1e-6), hidden > -1
    scale = torch.rsqrt((hidden * hidden).mean(-1, keepdim=True))
    return (
        (NORM, norm, (hidden, weight, *constants, dtype)),
        (NORM, norm_gradient, (narrow, hidden, weight, *constants)),
        (NORM, norm_weight_gradient, (narrow, hidden, scale)),
        (RESIDUAL, add_norm, (hidden, narrow, weight, *constants, dtype)),
        (RESIDUAL, norm_total_gradient, (narrow, hidden, hidden, weight, *constants, dtype)),
        (ROTARY, rotated, (states, cos, sin, dtype)),
        (ROTARY, rotated_gradient, (states, cos, sin, dtype)),
        (LAYER_NORM, layer_norm_of_sum, (hidden, narrow, keep, 1.25, weight, weight, 1e-6, dtype)),
        (LAYER_NORM, layer_norm_gradient, (hidden, narrow, hidden, keep, 1.25, weight, 1e-6, dtype)),
        (LAYER_NORM, layer_norm_gradients, (hidden, narrow, hidden, keep, 1.25, weight, 1e-6, dtype)),
        *((GATE, gated, (narrow, narrow + 1, name)) for name in ACTIVATIONS),
        *((GATE, gated_gradient, (narrow, narrow + 1, narrow - 1, name)) for name in ACTIVATIONS),
    )


def probe(*shape: int) -> torch.Tensor:
    """Return random float32 numbers on the CPU, always the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), device="cpu")
