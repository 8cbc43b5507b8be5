"""Attention and dropout on a CPU: the same results as torch's, for short texts in a fraction of the time.

Measured on 2 cores in bf16, 128 texts of 16 tokens, 12 heads, forward and backward with dropout: 9 ms against 15 ms of
`scaled_dot_product_attention`, and 8 ms against 67 ms without dropout; 4 texts of 512 tokens: 158 against 243 ms.
Causal, one thread, 32 query heads of width 64 that share 8 key heads, 32 texts of 16 tokens: 7 against 82 ms; 8 texts
of 128 tokens: 37 against 113 ms.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "zerotune_cpu"
CAUSAL_ATTENTION = "zerotune_cpu_causal"
KERNELS = (ATTENTION, CAUSAL_ATTENTION)  # both replace sdpa
# a softmax over rows that are no multiple of this takes several times as long: vectors hold 16 float32 numbers
_VECTOR = 16
# without dropout, torch's fused kernel is faster for longer texts
_LONGEST = 128
_MASKED = torch.finfo(torch.bfloat16).min
_KEEP_LEVELS = 2**16


def padded_key_mask(batch_size: int, kv_length: int, attention_mask: torch.Tensor | None, **_) -> torch.Tensor:
    """Return the float32 mask [B, 1, 1, keys] to add to scores: 0, or a very low number for padding.

    Keys are padded to a multiple of 16. The arguments are those of transformers' mask functions.
    """
    mask = torch.full((batch_size, 1, 1, kv_length + -kv_length % _VECTOR), _MASKED)
    mask[..., :kv_length] = 0 if attention_mask is None else (~attention_mask)[:, None, None] * _MASKED
    return mask


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return scaled dot-product attention [B, T, heads, dim] of query, key and value [B, heads, T, dim], not causal.

    The softmax is in float32; attention_mask is `padded_key_mask`'s.
    """
    batch, heads, length, width = query.shape
    if not dropout and length > _LONGEST:
        mask = attention_mask[..., :length].to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False, **kwargs)
    num_keys = attention_mask.shape[-1]
    missing = (0, 0, 0, num_keys - length)
    key = functional.pad(key, missing).reshape(batch * heads, num_keys, width)
    value = functional.pad(value, missing).reshape(batch * heads, num_keys, width)
    scores = torch.bmm(query.reshape(batch * heads, length, width), key.transpose(1, 2))
    scores = torch.add(attention_mask, scores.view(batch, heads, length, num_keys), alpha=scaling or width**-0.5)
    weights = drop(scores.softmax(-1).to(query.dtype), dropout)
    mixed = torch.bmm(weights.view(batch * heads, length, num_keys), value)
    return mixed.view(batch, heads, length, width).transpose(1, 2), None


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return a causal model's attention [B, T, heads, dim]: by matrix products for short texts in 16 bits, else sdpa's.

    Key and value heads are not expanded: the queries that share one become rows of one product. The softmax is in
    float32.

    Args:
        query: [B, heads, T, dim].
        key, value: [B, fewer heads, keys, dim].
        attention_mask: sdpa's, bool or to be added, [B, 1, T, keys]; None: causal, without padding.
    """
    batch, heads, length, width = query.shape
    shared, num_keys = key.shape[1:3]
    is_short = 1 < length == num_keys <= _LONGEST
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # as sdpa's forward takes it
    if value.dtype == torch.float32 or not is_short or not is_causal or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    added = _added_to_scores(attention_mask, length)
    missing = (0, 0, 0, added.shape[-1] - length)
    query = query.to(value.dtype).reshape(batch * shared, -1, width)
    key = functional.pad(key.to(value.dtype), missing).reshape(batch * shared, -1, width)
    value = functional.pad(value, missing).reshape(batch * shared, -1, width)
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, shared, -1, length, added.shape[-1])
    scores = torch.add(added, scores, alpha=kwargs.get("scaling") or width**-0.5)
    weights = scores.softmax(-1).to(value.dtype).view(batch * shared, -1, added.shape[-1])
    return torch.bmm(weights, value).view(batch, heads, length, width).transpose(1, 2), None


def _added_to_scores(mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """Return sdpa's mask in float32, to be added to scores [B, key heads, queries of each, T, keys padded to 16s]."""
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    seen = torch.zeros((), dtype=torch.float32)
    added = torch.where(mask, seen, _MASKED) if mask.dtype == torch.bool else mask.float().clamp(min=_MASKED)
    return functional.pad(added, (0, -length % _VECTOR), value=_MASKED)[:, :, None]


def drop(values: torch.Tensor, probability: float) -> torch.Tensor:
    """Zero each value with the probability, rounded to a 65,536th, and scale the rest (Srivastava et al. 2014).

    One draw of the generator decides four values; torch spends at least one on each.
    """
    num_dropped = round(probability * _KEEP_LEVELS)
    if not num_dropped:
        return values
    drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = drawn[: values.numel()].view(values.shape) >= num_dropped - _KEEP_LEVELS // 2
    return values * (keep.to(values.dtype) * (_KEEP_LEVELS / (_KEEP_LEVELS - num_dropped)))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, computed by `drop`."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return drop(values, self.p) if self.training else values


def use_cheap_dropout(model: nn.Module) -> None:
    """Replace the dropout modules of a model on a CPU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))


def join_projections(model: nn.Module) -> None:
    """Compute queries, keys and values of an encoder in one matrix product, which has a third of the overhead.

    The parameters stay as they are, but the three linear layers are no longer called: nothing may wrap them, as LoRA
    and ZeRO-3 do. Only layers like BERT's and DistilBERT's are changed (not ALBERT's).
    """
    if hasattr(model.base_model, "transformer"):
        for layer in model.base_model.transformer.layer:
            attending, names = layer.attention, ("q_lin", "k_lin", "v_lin")
            attending.forward = partial(_attend, attending, names, attending.out_lin)
    else:
        for layer in getattr(getattr(model.base_model, "encoder", None), "layer", ()):  # ModernBERT's are elsewhere
            attending, names = layer.attention.self, ("query", "key", "value")
            attending.forward = partial(_attend, attending, names, nn.Identity())


def _attend(
    module: nn.Module,
    names: tuple[str, str, str],
    output: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    **_,
) -> tuple[torch.Tensor, None]:
    """Return self-attention [B, T, C] of hidden states [B, T, C], as the module of an encoder's layer computes it."""
    batch, length, channels = hidden_states.shape
    projections = [getattr(module, name) for name in names]
    joined = functional.linear(
        hidden_states,
        torch.cat([projection.weight for projection in projections]),
        torch.cat([projection.bias for projection in projections]),
    )
    width = module.attention_head_size
    query, key, value = joined.view(batch, length, 3, -1, width).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = module.dropout.p if module.training else 0.0
    mixed, _ = attention(module, query, key, value, attention_mask, dropout)
    return output(mixed.reshape(batch, length, channels)), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, padded_key_mask)
AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
AttentionMaskInterface.register(CAUSAL_ATTENTION, sdpa_mask)
