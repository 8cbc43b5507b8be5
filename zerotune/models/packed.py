"""Packed rows: the examples of a batch in one row, without padding and without a mask.

    tokens     a a a a b b c c c
    positions  0 1 2 3 0 1 0 1 2
    bounds     0       4   6     9

Positions restart with each example. transformers builds no mask for a kernel that has no mask function, and passes it
the bounds in every layer. So an example sees only its own tokens, and the host never waits for a number from the GPU.

On CUDA the kernel is `torch.nn.attention.varlen`, in 16 bits, or flash-attn's if scores are capped (Gemma-2).
Elsewhere a reference computes one example at a time.
"""

from functools import cache
from inspect import signature

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from zerotune.models.branches import FULL, SLIDING, layer_types
from zerotune.models.families import backbone_class, caps_scores, counts_positions_from_pad
from zerotune.models.heads import has_token_types, is_encoder
from zerotune.settings.groups import ModelSettings

FLASH_ATTN = "flash-attn (pip install --no-build-isolation -e '.[flash]')"
ATTENTION = "varlen"
# Encoders with BERT's layers: full attention by any of transformers' kernels, on a padded batch or a packed row.
_PLAIN_ENCODERS = ("distilbert", "bert", "roberta", "xlm-roberta", "electra")
WIDEST_HEAD = 256  # of flash attention


def packs_rows(settings: ModelSettings, config, trains: bool) -> bool:
    """Return whether a model reads packed rows: with --attention varlen, and by default on a GPU in 16 bits.

    Args:
        trains: whether the model trains; its attention scores then have dropout, if it has any.
    """
    if settings.attention == "varlen":
        return True
    is_default = settings.attention == "auto" and settings.precision != "fp32" and torch.cuda.is_available()
    can = is_default and not (trains and drops_scores(settings, config)) and why_not_packed(config) is None
    return can and kernel_works(caps_scores(config))


def drops_scores(settings: ModelSettings, config) -> bool:
    """Return whether training drops attention scores, which happens only in full tuning of an encoder."""
    rates = (getattr(config, name, 0.0) for name in ("attention_probs_dropout_prob", "attention_dropout"))
    return settings.method == "full" and is_encoder(config) and any(rates)


def why_not_packed(config) -> str | None:
    """Return why a model cannot read packed rows, None where it can."""
    if is_encoder(config):
        if config.model_type not in _PLAIN_ENCODERS:
            return f"{config.model_type} computes its attention differently"
    elif not set(layer_types(config)) <= {FULL, SLIDING}:
        return f"{config.model_type} has layers without attention"
    if not backbone_class(config)._supports_attention_backend:
        return f"{config.model_type} supports no kernel but its own"
    if torch.cuda.is_available():
        if caps_scores(config) and not is_flash_attn_2_available():
            return f"{config.model_type} caps its attention scores, which needs {FLASH_ATTN}"
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if not takes_width(width):
            return f"its heads are {width} wide, and the kernel needs a multiple of 8, at most {WIDEST_HEAD}"
    return None


@cache
def kernel_works(capped: bool = False) -> bool:
    """Return whether this GPU's kernel, or with `capped` the one that caps scores, matches the reference."""
    softcap = 2.0 if capped else None
    try:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, heads, 24, 64, generator=generator) for heads in (4, 2, 2))
        bounds = torch.tensor([0, 9, 24], dtype=torch.int32)
        wanted = _reference(query, key, value, bounds, 64**-0.5, True, 5, softcap)
        on_gpu = (tensor.cuda().to(torch.bfloat16) for tensor in (query, key, value))
        found = _varlen(*on_gpu, bounds.cuda(), 15, 64**-0.5, True, 5, softcap)
        return bool((found.float().cpu() - wanted).abs().max() < 0.05)
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return False


def use_packed_attention(model: nn.Module) -> None:
    """Let a stock model, and all its parts, read packed rows from now on."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = ATTENTION


def pack(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray | int]:
    """Return the inputs of a batch as one packed row.

    Args:
        inputs: padded on the right: input_ids, attention_mask and, where there are any, token_type_ids, int64 [B, T].
    Returns:
        input_ids, position_ids and token_type_ids, int64 [1, N]; bounds, where the examples begin and the last one
        ends, int32 [B + 1]; longest, the length of the longest example; places, the tokens' flat indices in the padded
        batch, int64 [N]; and the padded batch's attention_mask.
    """
    mask = inputs["attention_mask"]
    places, lengths = np.flatnonzero(mask), mask.sum(axis=1)
    names = [name for name in ("input_ids", "token_type_ids") if name in inputs]
    packed: dict[str, np.ndarray | int] = {name: inputs[name].reshape(-1)[places][None] for name in names}
    packed |= {"position_ids": (places % mask.shape[1])[None], "places": places, "attention_mask": mask}
    return packed | {"bounds": bounds_of(lengths), "longest": int(lengths.max())}


def bounds_of(lengths: np.ndarray) -> np.ndarray:
    """Return where examples of these lengths begin in a row, and where the last one ends: int32 [B + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def backbone_inputs(
    config,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    longest: int | None = None,
    **_,
) -> dict:
    """Return a stock model's arguments for a padded batch [B, T], or for a packed row if bounds are given.

    Token types are kept if the model has them. Padding does not count in a causal model's positions.
    """
    inputs = {"input_ids": input_ids}
    if token_type_ids is not None and has_token_types(config):
        inputs["token_type_ids"] = token_type_ids
    if bounds is not None:
        if is_encoder(config) and counts_positions_from_pad(type(config)):
            position_ids = _positions_from_pad(input_ids, position_ids, config.pad_token_id)
        return inputs | packed_arguments(config, position_ids, bounds, longest)
    if is_encoder(config):
        return inputs | {"attention_mask": _key_mask(config, attention_mask)}
    inputs["attention_mask"] = attention_mask
    return inputs | {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}


def _positions_from_pad(input_ids: torch.Tensor, position_ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Return positions as RoBERTa counts them, [1, N]: from `pad_id` + 1 in each example; the pad itself has `pad_id`.

    The config's pad may be an ordinary token of a tokenizer that pads with another one.
    """
    counted = (input_ids != pad_id).long()
    earlier = counted.cumsum(-1) - counted
    first = torch.arange(input_ids.shape[-1], device=input_ids.device) - position_ids  # of the same example
    return (earlier - earlier.gather(-1, first) + 1) * counted + pad_id


def _key_mask(config, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return an encoder's mask [B, T], or, where transformers would make sdpa's mask, that one: bool [B, 1, T, T].

    transformers would first ask the device whether there is any padding, and the host would wait for the answer.
    """
    if config._attn_implementation != "sdpa" or config.model_type not in _PLAIN_ENCODERS:
        return attention_mask
    return attention_mask.bool()[:, None, None].expand(-1, -1, attention_mask.shape[1], -1)


def packed_arguments(config, position_ids: torch.Tensor, bounds: torch.Tensor, longest: int) -> dict:
    """Return the arguments of a stock model's forward that make a row a packed one.

    Args:
        position_ids: [1, N], as the model counts them.
    """
    own = {"position_ids": position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    own |= {"max_length_q": longest, "max_length_k": longest}
    return own if is_encoder(config) else own | {"use_cache": False}


def attention(  # noqa: PLR0913 - transformers' arguments
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Return the attention [1, N, heads, dim] of a packed row's query, key and value [1, heads, N, dim].

    Args:
        sliding_window: how many tokens a causal model's token sees, itself included; in an encoder, how many per side.
    """
    assert attention_mask is None and cu_seq_lens_q is not None, "the rows of this model are packed"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        assert not dropout, "the kernel drops no scores"
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal, sliding_window, softcap), None
    return _reference(query, key, value, cu_seq_lens_q, scaling, causal, sliding_window, softcap, dropout), None


def _varlen(query, key, value, bounds, longest, scaling, causal, window, softcap=None) -> torch.Tensor:  # noqa: PLR0913
    narrow = value.dtype if value.dtype in (torch.bfloat16, torch.float16) else torch.get_autocast_dtype("cuda")
    # after RoPE queries and keys may be float32 under autocast; [0] instead of squeeze would cost a pass in backward
    query, key, value = (each.squeeze(0).transpose(0, 1).to(narrow) for each in (query, key, value))
    left = -1 if window is None else window - 1 if causal else window
    sides = (left, 0) if causal else (left, left)
    lengths = bounds, bounds, longest, longest
    if softcap is not None:
        from flash_attn import flash_attn_varlen_func

        how = {"softmax_scale": scaling, "causal": causal, "window_size": sides, "softcap": softcap}
        return flash_attn_varlen_func(query, key, value, *lengths, **how)[None]
    from torch.nn.attention.varlen import varlen_attn

    key, value, grouping = group_heads(query, key, value)
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=sides, **grouping)[None]


def takes_width(width: int) -> bool:
    """Return whether torch's kernel for packed rows supports heads of this width."""
    return width <= WIDEST_HEAD and width % 8 == 0


def group_heads(query, key, value) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return keys and values for `varlen_attn`, and its arguments, where several query heads share a key head.

    Args:
        query, key, value: [tokens, heads, dim].
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value, {}
    if "enable_gqa" in signature(varlen_attn).parameters:
        return key, value, {"enable_gqa": True}
    return *(each.repeat_interleave(groups, dim=1) for each in (key, value)), {}  # torch 2.11


def _reference(query, key, value, bounds, scaling, causal, window, softcap=None, dropout=0.0) -> torch.Tensor:  # noqa: PLR0913
    lengths = bounds.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    mixed = []
    for q, k, v in zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True):
        scores = q @ k.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
        hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (distance >= window if causal else distance.abs() > window)
        weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1, dtype=torch.float32)
        mixed.append(functional.dropout(weights.to(v.dtype), dropout, dropout > 0) @ v)
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attention)
