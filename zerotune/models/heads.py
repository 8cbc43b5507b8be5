"""Heads: float32 whatever the precision around them; a classifier's is pooled by length, never by pad id."""

import torch
from torch import nn
from torch.nn import functional as F

ENCODERS = ("distilbert", "bert", "roberta")
SPAN_HEAD = "qa_outputs"  # of every model with a span head
_ENCODER_HEADS = {
    "distilbert": ("pre_classifier", "classifier"),
    "bert": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
}


def is_encoder(config) -> bool:
    """Whether the model sees a text both ways and pools its first token."""
    return config.model_type in ENCODERS


def head_module_names(config) -> tuple[str, ...]:
    """Paths of the head's modules in the stock sequence-classification model. BERT's pooler is part of the head."""
    return _ENCODER_HEADS.get(config.model_type, ("score",))


def stock_name(parameter_name: str) -> str:
    """A parameter's name in the stock model, whatever peft has put around it."""
    name = parameter_name.removeprefix("base_model.model.")
    for part in (".original_module", ".modules_to_save.default", ".base_layer"):
        name = name.replace(part, "")
    return name


def is_head_parameter(parameter_name: str, config) -> bool:
    """Whether it belongs to a classification head or to a span head."""
    return stock_name(parameter_name).startswith(tuple(f"{head}." for head in (*head_module_names(config), SPAN_HEAD)))


class Float32Linear(nn.Linear):
    """A linear layer with float32 parameters that computes and answers in float32, also inside autocast.

    It is a class of its own, not an `nn.Linear` with a flag: DeepSpeed's `torch_autocast` reduces the gradients (and
    under ZeRO-3 gathers the weights) of every module whose class is exactly `nn.Linear` in 16 bits.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.weight.dtype == torch.float32, f"the head was cast to {self.weight.dtype}, it must stay float32"
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias)


def _as_float32(linear: nn.Linear) -> Float32Linear:
    layer = Float32Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    # The same Parameter objects: ZeRO-3 keeps its bookkeeping on them. Assigning .data changes the dtype in place.
    for name, parameter in linear.named_parameters():
        parameter.data = parameter.data.float()
        setattr(layer, name, parameter)
    return layer.train(linear.training)


def make_head_float32(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Replaces the linear layers of a stock model's head modules in place. State-dict keys stay the stock ones."""
    for head in heads:
        for path, module in list(model.get_submodule(head).named_modules(prefix=head)):
            if isinstance(module, nn.Linear):
                assert type(module) is nn.Linear, f"the head's {path} was turned into a {type(module).__name__}"
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, _as_float32(module))


class TunedModel(nn.Module):
    """A transformers model, or a peft model around one; what a head computes from it is the subclass's forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self):
        return self.stock_model.config

    @property
    def stock_model(self) -> nn.Module:
        """The transformers model, without peft's wrapper (its layers still hold the adapters)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


class SequenceClassifier(TunedModel):
    """A stock sequence-classification model with pooling by length and float32 logits.

    drop_unpooled: an encoder's last layer goes on with the pooled token alone, which changes no number.
    """

    def __init__(self, model: nn.Module, drop_unpooled: bool = True):
        super().__init__(model)
        if drop_unpooled and is_encoder(self.config):
            drop_unpooled_tokens(self.stock_model.base_model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits [B, num_labels] of a padded batch.

        input_ids and attention_mask are [B, T]; the mask is 1 on a row's tokens, which are contiguous, and 0 on
        padding. Causal models take padding on either side; encoders on the right only. token_type_ids [B, T] go to the
        models that have them (BERT) and mean nothing to the others. A row without tokens gives logits without meaning.
        """
        stock = self.stock_model
        inputs = backbone_inputs(stock.config, input_ids, attention_mask, token_type_ids)
        if is_encoder(stock.config):
            return stock(**inputs).logits
        hidden = stock.base_model(**inputs).last_hidden_state
        return stock.score(hidden[torch.arange(len(hidden), device=hidden.device), last_positions(attention_mask)])


def backbone_inputs(
    config, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None
) -> dict:
    """Arguments of a stock model for a padded batch [B, T]: token types where it has them, positions by length."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if not is_encoder(config):
        return inputs | {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    if token_type_ids is not None and getattr(config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = token_type_ids
    return inputs


def drop_unpooled_tokens(encoder: nn.Module) -> None:
    """In the last layer, after attention, only the first token goes on: nothing else is pooled.

    Exact, and saves two thirds of that layer: a ninth of a six-layer encoder.
    """
    if encoder.config.model_type == "distilbert":
        encoder.transformer.layer[-1].sa_layer_norm.register_forward_hook(
            lambda _, __, output: output[:, :1].contiguous()
        )
    else:
        output = encoder.encoder.layer[-1].attention.output
        output.register_forward_pre_hook(lambda _, inputs: tuple(hidden[:, :1].contiguous() for hidden in inputs))


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index [B] of the last position of each row of a mask [B, T] that is 1; 0 for a row of zeros."""
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * index).argmax(-1)
