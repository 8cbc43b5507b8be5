"""A causal model with its own LM head and float32 logits: loaded to be tuned, to score answers, or to write them."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from zerotune.errors import Refused
from zerotune.models.adapters import base_settings, load_adapter
from zerotune.models.branches import Places, branch_masks, mask_dtype
from zerotune.models.divided import onto_device
from zerotune.models.heads import TunedModel, float32_linear, wide_linear
from zerotune.models.loading import (
    check_settings,
    check_unused_keys,
    make_trainable,
    read_onto,
    read_weights,
    tuning_config,
)
from zerotune.models.model_files import read_record
from zerotune.models.packed import packed_arguments
from zerotune.models.pretrained import read_config
from zerotune.settings.groups import ModelSettings

# How far below the highest bf16 logit the highest float32 one may lie: both, and the bound itself, are off by at most
# 2^-9 of their size. The second covers the rounding of float32 sums.
_BF16_SLACK, _LEAST_SLACK = 2**-7, 1e-3
# Most logits to hold at a time where only those of targets are needed: 64 MB of float32.
_MOST_LOGITS = 2**24


class TextGenerator(TunedModel):
    """A causal model of `load_causal_model` whose LM head is computed at chosen positions only."""

    def forward(
        self,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        positions: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
        bounds: torch.Tensor | None = None,
        longest: int | None = None,
    ) -> torch.Tensor:
        """Return float32 logits [N, vocabulary] of the token that follows each of N positions of a batch.

        Args:
            input_ids: [B, T], padded on the right: in a causal model no token of a row sees padding, so there is no
                mask.
            rows, columns: the positions, [N] each.
            positions, branches: [B, T] each, of `branches.BranchRows`; for rows with branches that must not see each
                other.
            bounds, longest: from `packed.pack`, for a packed row, which has positions too.
        """
        stock = self.stock_model
        masking = {}
        if branches is not None:
            places = Places(positions, branches)
            masks = branch_masks(stock.config, places, places, mask_dtype(stock, input_ids.device))
            masking = {"position_ids": positions, "attention_mask": masks}
        elif bounds is not None:
            masking = packed_arguments(stock.config, positions, bounds, longest)
        hidden = stock.base_model(input_ids=input_ids, **{"use_cache": False} | masking).last_hidden_state
        return finish_logits(stock.get_output_embeddings()(hidden[rows, columns]), stock.config)


def answer_logits(model, hidden: torch.Tensor, token_ids: list[int] | None = None) -> torch.Tensor:
    """Return float32 logits of hidden states [..., dim]: [..., vocabulary], or [..., len(token_ids)] of some tokens.

    In bf16 two label words would often tie: its numbers near 16 are 0.125 apart.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):  # peft's: an adapter on the head, or a saved copy of it
        logits = head(hidden).float()
        return finish_logits(logits if token_ids is None else logits[..., token_ids], model.config)
    weight = head.weight if token_ids is None else head.weight[token_ids]
    return finish_logits(wide_linear(hidden, weight), model.config)


def likeliest_tokens(model, hidden: torch.Tensor) -> torch.Tensor:
    """Return the token id [N] with the highest float32 logit after each of hidden states [N, dim].

    On a CPU a bf16 head is not cast to float32, which would take longer than the model: a product in bf16, right up to
    rounding, leaves a few candidates, and only these are computed again in float32.
    """
    head = model.get_output_embeddings()
    is_plain = isinstance(head, nn.Linear) and head.bias is None and hidden.device.type == "cpu"
    if not is_plain or not hidden.dtype == head.weight.dtype == torch.bfloat16:
        return head(hidden).argmax(-1)  # `finish_logits` would keep the order
    rough = hidden @ head.weight.T
    highest = rough.amax(-1, keepdim=True)
    rows, tokens = (rough >= highest - _BF16_SLACK * highest.abs() - _LEAST_SLACK).nonzero(as_tuple=True)
    logits = (hidden[rows].float() * head.weight[tokens].float()).sum(-1)
    best = torch.full((len(hidden),), -torch.inf).scatter_reduce(0, rows, logits, "amax")
    is_best = logits == best[rows]
    chosen = torch.full((len(hidden),), len(head.weight))
    return chosen.scatter_reduce(0, rows[is_best], tokens[is_best], "amin")


def answer_log_likelihoods(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the float32 log-probability [N] of each target token [N] after hidden states [N, dim].

    The logits are computed for a part of the vocabulary at a time: with Gemma-3's vocabulary, those of 1,000 tokens
    would take 1 GB, and the head in float32 as much again.
    """
    head, config = model.get_output_embeddings(), model.config
    if not isinstance(head, nn.Linear):  # peft's
        at_once = max(1, _MOST_LOGITS // config.vocab_size)
        parts = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        return torch.cat(
            [-functional.cross_entropy(answer_logits(model, *each[:1]), each[1], reduction="none") for each in parts]
        )
    sums = []
    for weight in head.weight.split(max(1, _MOST_LOGITS // len(hidden))):
        sums.append(finish_logits(wide_linear(hidden, weight), config).logsumexp(-1))
    chosen = finish_logits((hidden.float() * head.weight[targets].float()).sum(-1), config)
    return chosen - torch.stack(sums).logsumexp(0)


def finish_logits(logits: torch.Tensor, config) -> torch.Tensor:
    """Turn an LM head's outputs into the model's logits: Granite divides them, Gemma-2 caps them.

    The soft cap is that of Gemma Team 2024, arXiv:2408.00118, section 2.
    """
    divisor, cap = getattr(config, "logits_scaling", None), getattr(config, "final_logit_softcapping", None)
    if divisor is not None:
        logits = logits / divisor
    return logits if cap is None else cap * torch.tanh(logits / cap)


def load_generator(settings: ModelSettings, tokenizer) -> TextGenerator:
    """Load a causal model, ready to train, on the device that from_pretrained chooses.

    Types are those of `load_classifier`: float32 in full tuning; LoRA has a frozen base in the settings' precision,
    QLoRA in NF4, both with float32 adapters. Raises Refused for a model or settings that cannot be trained.
    """
    check_settings(settings)
    config = tuning_config(read_config(settings.name, settings.revision), settings, tokenizer)
    return TextGenerator(make_trainable(load_causal_model(settings, config), settings))


def load_language_model(settings: ModelSettings, device: torch.device):
    """Load a causal model, or an adapter on its base, onto the device in eval mode.

    Weights have the settings' precision, or NF4 with method "qlora" or an adapter that was trained on NF4.

    Raises:
        Refused: no weights can be read, or some of them are missing.
    """
    base, is_adapter = base_settings(settings, read_record(settings.name, settings.revision))
    if base.method == "full":  # which would give float32 weights
        base = replace(base, method="lora")
    model = load_causal_model(read_onto(base, device), read_config(settings.name, settings.revision))
    if is_adapter:
        model = load_adapter(model, settings.name, settings.revision).get_base_model()
    return (model if base.method == "qlora" else onto_device(model, model, base, device)).eval()


def load_causal_model(settings: ModelSettings, config):
    """Load a stock causal model with float32 logits and weights of `loading.base_dtype`, or in NF4 for "qlora".

    Args:
        config: the checkpoint's own, or a changed copy.
    Raises:
        Refused: no weights can be read, or some of them are missing.
    """
    model, info = read_weights(settings, config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise Refused(
            f"{settings.name} lacks weights of a causal model ({missing}): it can only be evaluated "
            "with the head that it was saved with"
        )
    check_unused_keys(info["unexpected_keys"])
    model.set_output_embeddings(float32_linear(model.get_output_embeddings(), cast_weights=False))
    return model
