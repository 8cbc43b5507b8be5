"""A classifier: a linear head on the pooled token of any backbone, with float32 logits."""

from collections.abc import Callable

import torch
from torch import nn

from zerotune.models.families import classifier_class
from zerotune.models.heads import TunedModel, is_encoder
from zerotune.models.loading import check_settings, load_with_head, make_trainable, tuning_config
from zerotune.models.packed import backbone_inputs
from zerotune.models.pretrained import label_columns, read_config
from zerotune.settings.groups import ModelSettings


class SequenceClassifier(TunedModel):
    """A stock sequence-classification model that pools by length, never by pad id.

    Args:
        drop_unpooled: run an encoder's last layer, after its attention, on the pooled token only; logits stay the same.
        labels: the order of the logits; None: the model's own.
    """

    def __init__(self, model: nn.Module, drop_unpooled: bool = True, labels: tuple[str, ...] | None = None):
        super().__init__(model)
        columns = [self.config.label2id[label] for label in labels or ()]
        self._columns = columns if columns != sorted(columns) else None
        self._bounds: torch.Tensor | None = None
        if drop_unpooled and is_encoder(self.config):
            drop_unpooled_tokens(self.stock_model.base_model, self._pooled)

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Select the pooled tokens' hidden states, [B, 1, dim], from all tokens' [B, T, dim] or packed [1, N, dim]."""
        return (hidden[:, :1] if self._bounds is None else hidden[0, self._bounds[:-1].long(), None]).contiguous()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        bounds: torch.Tensor | None = None,
        **packing,
    ) -> torch.Tensor:
        """Return float32 logits [B, num_labels] of a padded batch, meaningless for a row without tokens.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T]; 1 on a row's tokens, which are contiguous, and 0 on padding. Causal models take
                padding on either side, encoders on the right only.
            token_type_ids: [B, T]; ignored by models without token types.
            bounds, packing: from `packed.pack`, for a packed row.
        """
        stock = self.stock_model
        inputs = backbone_inputs(stock.config, input_ids, attention_mask, token_type_ids, bounds, **packing)
        self._bounds = bounds
        if is_encoder(stock.config):
            logits = stock(**inputs).logits
        else:
            hidden = stock.base_model(**inputs).last_hidden_state
            if bounds is None:
                rows = torch.arange(len(hidden), device=hidden.device)
                hidden = hidden[rows, last_positions(attention_mask)]
            else:
                hidden = hidden[0, bounds[1:].long() - 1]
            logits = stock.score(hidden)
        return logits if self._columns is None else logits[:, self._columns]


def drop_unpooled_tokens(encoder: nn.Module, pooled: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Drop all tokens but the first, which is pooled, after the attention of the last layer.

    The result is exact, and two thirds of that layer are saved: a ninth of a six-layer encoder. Only layers like BERT's
    and DistilBERT's are changed, not ALBERT's (one layer, used many times) or ModernBERT's.

    Args:
        pooled: maps the hidden states of all tokens to those of the first ones, [B, 1, dim].
    """
    if hasattr(encoder, "transformer"):
        encoder.transformer.layer[-1].sa_layer_norm.register_forward_hook(lambda _, __, output: pooled(output))
    elif layers := getattr(getattr(encoder, "encoder", None), "layer", ()):
        if len(layers) == 1 and getattr(encoder.encoder, "conv", None) is not None:
            return  # DeBERTa-v2's convolution, beside its first layer, needs all tokens
        output = layers[-1].attention.output
        output.register_forward_pre_hook(lambda _, inputs: tuple(map(pooled, inputs)))


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the index [B] of the last 1 in each row of a mask [B, T]; 0 for a row of zeros."""
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * index).argmax(-1)


def load_classifier(settings: ModelSettings, labels: tuple[str, ...], tokenizer) -> SequenceClassifier:
    """Load a model with a float32 head for the labels, ready to train, on the device that from_pretrained chooses.

    Full tuning has float32 parameters throughout (16-bit compute is the caller's autocast). LoRA keeps its frozen base
    in the settings' precision, or in float32 under ZeRO-3, where all weights must share one type; QLoRA keeps it in
    NF4. Adapters and head are float32. Raises Refused for a model or settings that cannot be trained.
    """
    check_settings(settings)
    model, _ = load_stock_classifier(settings, labels, tokenizer)
    return SequenceClassifier(make_trainable(model, settings), settings.drop_unpooled, labels)


def load_stock_classifier(settings: ModelSettings, labels: tuple[str, ...], tokenizer, config=None):
    """Load a stock model with a float32 head; return it and the names of the head parameters that were missing.

    Args:
        config: replaces the checkpoint's own (an adapter's folder knows the labels, its base does not).
    Raises:
        Refused: the checkpoint lacks more than a head, or was trained for other labels.
    """
    config = config or read_config(settings.name, settings.revision)
    config.label2id = dict(zip(labels, label_columns(config, labels), strict=True))
    config.id2label = {column: label for label, column in config.label2id.items()}
    config.use_cache = False
    config = tuning_config(config, settings, tokenizer)
    return load_with_head(settings, config, classifier_class(config))
