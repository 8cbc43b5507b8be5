"""The span head: a linear layer that gives each token a start and an end logit, on any backbone.

The models are transformers' question-answering classes. For some causal models (Llama, Qwen) these expect the backbone
under another name than published checkpoints use, and would leave it random with only a warning; so weights are renamed
while they are read. Gemma has no such class and gets transformers' generic one.
"""

import torch

from zerotune.models.families import span_class
from zerotune.models.heads import TunedModel, is_encoder
from zerotune.models.loading import check_settings, load_with_head, make_trainable, tuning_config
from zerotune.models.packed import backbone_inputs
from zerotune.models.pretrained import read_config
from zerotune.settings.groups import ModelSettings


class SpanModel(TunedModel):
    """A stock model with a span head and float32 logits."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        **packing,
    ) -> torch.Tensor:
        """Return float32 logits [B, T, 2] of start and end, for every token of a padded batch, meaningless on padding.

        The arguments are those of `SequenceClassifier.forward`.
        """
        stock = self.stock_model
        output = stock(**backbone_inputs(stock.config, input_ids, attention_mask, token_type_ids, **packing))
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        if places is None:
            return logits
        padded = logits.new_zeros(attention_mask.numel(), 2).index_copy(0, places, logits[0])
        return padded.view(*attention_mask.shape, 2)


def backbone_renaming(config) -> dict[str, str] | None:
    """Return from_pretrained's key_mapping for a causal checkpoint whose class renames the backbone; else None."""
    prefix = span_class(config).base_model_prefix
    return None if is_encoder(config) or prefix == "model" else {r"^model\.": f"{prefix}."}


def load_span_model(settings: ModelSettings, tokenizer) -> SpanModel:
    """Load a model with a span head, ready to train, on the device that from_pretrained chooses.

    Types are those of `load_classifier`. A checkpoint that has a span head keeps it. Raises Refused for a model or
    settings that cannot be trained.
    """
    check_settings(settings)
    model, _ = load_stock_span_model(settings, tokenizer)
    return SpanModel(make_trainable(model, settings))


def load_stock_span_model(settings: ModelSettings, tokenizer, config=None):
    """Load a stock model with a float32 span head; return it and the names of the head parameters that were missing.

    Args:
        config: replaces the checkpoint's own.
    Raises:
        Refused: the checkpoint lacks more than a head.
    """
    config = config or read_config(settings.name, settings.revision)
    config.num_labels = 2
    config.use_cache = False
    config = tuning_config(config, settings, tokenizer)
    return load_with_head(settings, config, span_class(config), backbone_renaming(config))
