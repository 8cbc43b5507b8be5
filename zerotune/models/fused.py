"""Fused passes: one compiled kernel instead of several for a layer's work between its matrix products.

In a decoder: a norm, with the residual sum before it; the rotary embedding; the gated activation. In an encoder: a
layer norm, with dropout and the residual sum before it. In both: a projection's product, with LoRA's.

A stock module's forward is replaced if the module has the expected parts and gives the same numbers on random inputs,
tested on the CPU without its weights; the family's name does not matter. Other modules stay as they are. Hooks see the
same modules called.
"""

import copy
import sys
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from zerotune.models.families import is_encoder_family
from zerotune.models.fused_functions import AdaptedLinear, Gate, LayerNorm, Norm, Product, Readers, Rotation
from zerotune.models.fused_kernels import (
    ACTIVATIONS,
    GATE,
    LAYER_NORM,
    NORM,
    RESIDUAL,
    ROTARY,
    compile_on,
    norm,
    probe,
    why_kernels_fail,
)
from zerotune.models.precision import compute_dtype
from zerotune.settings.groups import ModelSettings

ADAPTER, PRODUCT = "adapter", "projection"
_LEAST_ON_CPU = 100_000_000  # weights; a smaller model would not win back the compile time
_EPSILONS = ("variance_epsilon", "eps")
# The parts of a decoder layer; in Gemma-2's sandwich, norms follow attention and MLP too.
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def use_fused_passes(
    model: nn.Module, settings: ModelSettings, device: torch.device
) -> tuple[tuple[str, ...], str | None]:
    """Make a stock model and its adapters run fused passes from now on.

    Nothing is fused in fp32, with --compile none, or on a CPU for a model too small to win back the compile time.

    Returns:
        the names of the fused passes; and, if a problem prevents them, one line about it, else None.
    """
    if settings.compile == "none" or settings.precision == "fp32" or _is_too_small(model, device):
        return (), None
    if settings.zero_stage == 3:
        problem = "ZeRO-3 shards the weights"
    else:
        problem = why_kernels_fail(
            device.type, compute_dtype(settings.precision), is_encoder_family(model.config.model_type)
        )
    if problem:
        return (), f"--compile is off: {problem}"
    compile_on(device.type)
    return fuse(model, device.type), None


def _is_too_small(model: nn.Module, device: torch.device) -> bool:
    return device.type == "cpu" and sum(weight.numel() for weight in model.parameters()) < _LEAST_ON_CPU


def fuse(model: nn.Module, device_type: str = "cuda") -> tuple[str, ...]:
    """Replace the forwards of modules wherever the fused ones give the same numbers. Return the passes' names.

    Encoder layers are fused only on a GPU; on a CPU they have kernels of their own (zerotune/models/cpu_kernels.py).
    """
    found = {NORM for module in model.modules() if _fuse_norm(module)}  # first: later passes look for fused norms
    passes = {GATE: _fuse_gate, ROTARY: _fuse_rotary, RESIDUAL: _fuse_residual, LAYER_NORM: _fuse_encoder_layer}
    if device_type == "cpu":
        del passes[LAYER_NORM]
    passes |= {ADAPTER: _fuse_adapter, PRODUCT: _fuse_products}
    found |= {name for module in model.modules() for name, fuse_in in passes.items() if fuse_in(module)}
    if ROTARY in found:
        _mark_angles(model)
    return tuple(sorted(found))


def fuse_adapters(model: nn.Module) -> None:
    """Make a model's adapters add to their layers' products in place, for evaluation. Nothing is compiled."""
    for module in model.modules():
        _fuse_adapter(module)


def _narrow(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast multiplies, None without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _twin(module: nn.Module, **parts) -> nn.Module:
    """Copy a module, with `parts` as its only weights and in place of its submodules of the same names."""
    twin = copy.copy(module)
    twin._parameters = {name: part for name, part in parts.items() if isinstance(part, nn.Parameter)}
    twin._modules = module._modules | {name: part for name, part in parts.items() if name not in twin._parameters}
    return twin


def _same(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> bool:
    """Return whether two functions give the same float32 numbers on a CPU, up to rounding; an error means no."""
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
    epsilon, weight, hidden = getattr(module, names[0]), nn.Parameter(probe(8)), probe(3, 8)
    twin = _twin(module, weight=weight)
    for offset in (0.0, 1.0):
        ours = partial(norm, hidden, weight, offset, epsilon, torch.float32)
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
        keeps_type: whether the stock norm returns its input's type, not the wider one of input and weight.
    """
    if hidden_states.ndim == 4 and not hidden_states.is_contiguous() and hidden_states.transpose(1, 2).is_contiguous():
        # a transposed view, with heads before tokens
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
    readers = Readers()
    normed, total = Norm.apply(rows, added, weight, offset, epsilon, dtype, readers)
    normed = normed.view(hidden_states.shape)
    if getattr(module, "feeds_products", False) and normed.requires_grad:
        normed.rows, normed.readers = normed.view(rows.shape), readers  # for projections that get this very tensor
    return (normed, total.view(hidden_states.shape)) if with_total else normed


def _fuse_gate(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    joined = {"gate_up_proj", "down_proj"} <= parts
    if not (joined or {"gate_proj", "up_proj", "down_proj"} <= parts) or not _is_stock(module):
        return False
    action = next((getattr(module, name) for name in ("act_fn", "activation_fn") if hasattr(module, name)), None)
    inputs = probe(3, 8)
    stubs = {"gate_proj": lambda x: 2 * x, "up_proj": lambda x: 3 - x, "down_proj": torch.sin}
    stubs = {"gate_up_proj": lambda x: torch.cat([2 * x, 3 - x], -1), "down_proj": torch.sin} if joined else stubs
    twin = _twin(module, **stubs)
    for name, activation in ACTIVATIONS.items():
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
    return module.down_proj(Gate.apply(*rows, activation).view(gate.shape))


def _fuse_rotary(module: nn.Module) -> bool:
    """Replace the function that rotates queries and keys, in a family's module of transformers.

    Other models of the family are not affected: for angles that `_mark_angles` has not marked, the new function calls
    the stock one.
    """
    source = sys.modules.get(type(module).__module__)
    stock = getattr(source, "apply_rotary_pos_emb", None)
    if stock is None or not (hasattr(module, "q_proj") or hasattr(module, "qkv_proj")):
        return False
    if isinstance(stock, partial) and stock.func is _rotate:
        return True
    query, key, cos, sin = probe(2, 4, 3, 8), probe(2, 2, 3, 8), probe(2, 3, 8), probe(2, 3, 8) + 1

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
    """Mark the rotary angles that a model computes as those of a model with fused passes."""

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

    Under autocast they are rounded here, instead of in the attention, to the type in which it multiplies.
    """
    batch, _, length, _ = query.shape
    angles = [each.expand(batch, *each.shape[1:]).reshape(batch * length, -1) for each in (cos, sin)]
    rotated = []
    for states in (query, key):
        own = states.dtype if keeps_type else torch.promote_types(states.dtype, cos.dtype)
        rows = states.transpose(1, 2).reshape(batch * length, states.shape[1], -1)
        turned = Rotation.apply(rows, *angles, _narrow(states.device) or own)
        rotated.append(turned.view(batch, length, *turned.shape[1:]).transpose(1, 2))
    return tuple(rotated)


def _fuse_residual(layer: nn.Module) -> bool:
    """Replace the forward of a decoder layer that has the usual form and fused norms.

    The layer's class becomes a subclass, whose forward transformers wraps for activation checkpointing like the stock
    one's. A norm whose output only feeds matrix products writes it in the type in which autocast multiplies.
    """
    parts = dict(layer.named_children())
    sandwich = {*_SANDWICH} <= parts.keys()
    wanted = (*_PARTS, *(_SANDWICH if sandwich else ()))
    others = [part for name, part in parts.items() if name not in wanted]
    if not {*wanted} <= parts.keys() or not all(isinstance(part, nn.Dropout) and not part.p for part in others):
        return False
    norms = [part for name, part in parts.items() if name.endswith("norm")]
    are_fused = all(getattr(each.forward, "func", None) is _norm_forward for each in norms)
    if not are_fused or not _is_stock(layer) or hasattr(layer, "fuses_residual"):
        return False
    steps = {name: _Stub(2.0 + place, name == "self_attn") for place, name in enumerate(wanted)}
    twin, hidden = _twin(layer, **steps), probe(1, 3, 8)
    if not _same(partial(_layer_forward, twin, hidden), partial(type(layer).forward, twin, hidden)):
        return False
    layer.__class__ = _fused_layer(type(layer), _layer_forward)
    for before, reader in (("input_layernorm", "self_attn"), (wanted[4] if sandwich else wanted[2], "mlp")):
        parts[before].feeds_products = parts[reader].fuses_products = _multiplies_only(parts[reader])
    return True


class _Stub:
    """A stand-in for a part of a layer, which takes the arguments of a fused norm, an attention or an MLP."""

    def __init__(self, factor: float, is_attention: bool):
        self.factor, self.is_attention = factor, is_attention

    def __call__(self, hidden_states, added=None, with_total=False, **_):
        total = hidden_states if added is None else hidden_states + added
        mixed = torch.sin(self.factor * total)
        return (mixed, None) if self.is_attention else (mixed, total) if with_total else mixed


def _multiplies_only(module: nn.Module) -> bool:
    """Return whether all matrices in a module belong to linear layers, which cast their input."""
    owners = [part for part in module.modules() if any(p.ndim > 1 for p in part.parameters(recurse=False))]
    return all(isinstance(part, nn.Linear) or getattr(part.forward, "func", None) is _norm_forward for part in owners)


@cache
def _fused_layer(kind: type, forward: Callable) -> type:
    own = {"forward": forward, "fuses_residual": True, "__module__": kind.__module__}
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


def _fuse_encoder_layer(layer: nn.Module) -> bool:
    """Fuse the layer norms after attention and MLP of a BERT or DistilBERT layer, and mark its linear layers."""
    parts = dict(layer.named_children())
    if {"attention", "intermediate", "output"} <= parts.keys():
        found = [part for part in layer.modules() if _fuse_output(part)]
    else:
        found = _fuse_distilbert(layer, parts)
    for part in layer.modules() if found else ():
        part.fuses_products = not isinstance(part, nn.ModuleDict)  # a ModuleDict holds peft's LoRA matrices
    return bool(found)


def _fuse_output(module: nn.Module) -> bool:
    """Replace the forward of a BERT output module: linear layer, dropout, residual sum, layer norm."""
    parts = dict(module.named_children())
    if parts.keys() != {"dense", "LayerNorm", "dropout"} or not _is_stock(module) or not _takes_sum(parts["LayerNorm"]):
        return False
    hidden, residual = probe(3, 8), probe(3, 8) + 1
    twin = _twin(module, dense=torch.sin, LayerNorm=torch.cos, dropout=lambda x: 3 * x)
    if not _same(
        lambda: torch.cos(3 * torch.sin(hidden) + residual), lambda: type(module).forward(twin, hidden, residual)
    ):
        return False
    _take_sum(parts["LayerNorm"])
    module.forward = partial(_output_forward, module)
    return True


def _output_forward(module: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    dropout = module.dropout
    rate = dropout.p if dropout.training else 0.0
    return module.LayerNorm(input_tensor, added=module.dense(hidden_states), rate=rate)


def _fuse_distilbert(layer: nn.Module, parts: dict[str, nn.Module]) -> bool:
    names = ("attention", "sa_layer_norm", "ffn", "output_layer_norm")
    norms = [part for name, part in parts.items() if name.endswith("layer_norm")]
    if parts.keys() != {*names} or not _is_stock(layer) or not all(map(_takes_sum, norms)):
        return False
    steps = {name: _Stub(2.0 + place, name == "attention") for place, name in enumerate(names)}
    twin, hidden = _twin(layer, **steps), probe(1, 3, 8)
    if not _same(partial(_distilbert_forward, twin, hidden), partial(type(layer).forward, twin, hidden)):
        return False
    for each in norms:
        _take_sum(each)
    layer.__class__ = _fused_layer(type(layer), _distilbert_forward)
    return True


def _distilbert_forward(layer: nn.Module, hidden_states: torch.Tensor, attention_mask=None, **given) -> torch.Tensor:
    mixed, _ = layer.attention(hidden_states, attention_mask=attention_mask, **given)
    normed = layer.sa_layer_norm(hidden_states, added=mixed)
    return layer.output_layer_norm(normed, added=layer.ffn(normed))


def _takes_sum(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm and module.bias is not None and _is_stock(module)


def _take_sum(module: nn.LayerNorm) -> None:
    module.forward = partial(_layer_norm_forward, module)


def _layer_norm_forward(
    module: nn.LayerNorm, hidden_states: torch.Tensor, added: torch.Tensor, rate: float = 0.0
) -> torch.Tensor:
    """Return the norm of `hidden_states + dropout(added)`, [..., dim].

    Under autocast it is float32, like the stock norm's, and carries a 16-bit copy for projections that get this very
    tensor.
    """
    rows, added = (each.reshape(-1, each.shape[-1]) for each in (hidden_states, added))
    dtype, readers = _narrow(rows.device), Readers()
    normed, narrow = LayerNorm.apply(rows, added, rate, module.weight, module.bias, module.eps, dtype, readers)
    normed = normed.view(hidden_states.shape)
    if narrow is not None and normed.requires_grad:
        normed.rows, normed.readers = narrow, readers
    return normed


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
    """Return the layer's output; everything but plain LoRA goes through peft's own forward."""
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
    rows, readers = _rows_of(inputs, dtype)
    result = AdaptedLinear.apply(rows, down.weight, up.weight, module.scaling[name], base, readers)
    return result.view(*inputs.shape[:-1], -1)


def _rows_of(inputs: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Readers | None]:
    """Return inputs [..., dim] as rows in a product's type, and the Readers that sum their gradient, if any."""
    rows = getattr(inputs, "rows", None)
    if rows is not None and rows.dtype == dtype:
        return rows, inputs.readers
    return inputs.reshape(-1, inputs.shape[-1]).to(dtype), None


def _fuse_products(module: nn.Module) -> bool:
    """Replace the forwards of an attention's or MLP's linear layers that train."""
    if not getattr(module, "fuses_products", False):
        return False
    found = [child for child in module.children() if type(child) is nn.Linear and child.weight.requires_grad]
    found = [child for child in found if _is_stock(child)]
    for child in found:
        child.forward = partial(_product_forward, child)
    return bool(found)


def _product_forward(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():  # autocast keeps the narrow copy of a weight for all tokens that are written
        return nn.Linear.forward(module, inputs)
    dtype = _narrow(inputs.device) or inputs.dtype
    rows, readers = _rows_of(inputs, dtype)
    result = Product.apply(rows, module.weight, module.bias, readers)
    return result.view(*inputs.shape[:-1], -1)
