"""Models on fake tensors, which have shapes and types but no values, so that a model of any size takes no memory.

A CPU build of torch has no fake tensors on "cuda". They are on "cpu", and `fake_gpu` imitates CUDA where it differs:
fused attention, dropout in one kernel, layer norms in float32 under autocast.
"""

import contextlib
import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AttentionInterface

from zerotune.models import packed
from zerotune.models.attention import attention_kernel


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Call the kernel that scaled_dot_product_attention chooses on CUDA in 16 bits: flash only without a mask."""
    del enable_gqa  # the flash kernel shares keys between queries by itself
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    bias = attn_mask
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), -math.inf)
    bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


_cpu_layer_norm = functional.layer_norm


def _layer_norm(values, *args, **kwargs):
    """Call the norm as CUDA's autocast does, in float32."""
    if not torch.is_autocast_enabled("cpu"):
        return _cpu_layer_norm(values, *args, **kwargs)
    wide = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
    with torch.autocast("cpu", enabled=False):
        return _cpu_layer_norm(values.float(), *wide, **kwargs)


def _packed_attention(module, query, key, value, attention_mask, **given):
    """Call the kernel that packed rows use on CUDA."""
    causal = module.is_causal if given.get("is_causal") is None else given["is_causal"]
    bounds, longest = given["cu_seq_lens_q"], given["max_length_q"]
    window = given.get("sliding_window")
    return packed._varlen(query, key, value, bounds, longest, given["scaling"], causal, window), None


def _dropout(values, p=0.5, training=True, inplace=False):
    return torch.ops.aten.native_dropout(values, p, True)[0] if training and p else values


@contextlib.contextmanager
def fake_tensors():
    """Make every tensor fake inside the block.

    `Module.to` does nothing: Accelerate and peft call it, and fake parameters would not survive a move. Gradient norms
    are taken of many tensors at once, as on a GPU.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True),
        mock.patch("torch._subclasses.fake_tensor.log.disabled", True),  # a failing operation also raises
    ):
        yield


@contextlib.contextmanager
def fake_gpu():
    """Make every tensor fake, and let torch call the operations that it would call on CUDA, inside the block.

    peft calls `torch.is_autocast_enabled()` without a device, which would mean CUDA; here it means the CPU.
    """
    is_enabled = torch.is_autocast_enabled
    with (
        fake_tensors(),
        mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention),
        mock.patch.object(functional, "layer_norm", _layer_norm),
        mock.patch.object(functional, "dropout", _dropout),
        mock.patch.dict(AttentionInterface._global_mapping, {packed.ATTENTION: _packed_attention}),
        mock.patch.object(torch, "is_autocast_enabled", lambda device_type="cpu": is_enabled(device_type)),
    ):
        yield


def chosen_attention(settings, config) -> tuple[str, bool]:
    """Return the kernel that --attention selects on a GPU, and whether training packs its rows there.

    Without a GPU here, packed rows are taken to work.
    """
    works = packed.kernel_works if torch.cuda.is_available() else lambda caps_scores: True
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(packed, "kernel_works", works),
    ):
        return attention_kernel(settings.attention, config), packed.packs_rows(settings, config, trains=True)


def _fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)


def make_fake(model: nn.Module, fake_parameter: Callable[[nn.Parameter], nn.Parameter] = _fake_parameter) -> None:
    """Replace the parameters and buffers of a model on "meta" by fake ones, inside `fake_gpu`; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = fake_parameter(parameter)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
