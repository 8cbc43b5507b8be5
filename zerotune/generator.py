"""A causal model that learns to write answers: float32 logits at the answers' positions, and nowhere else."""

import torch
from torch import nn
from torch.nn import functional

from zerotune.heads import TunedModel
from zerotune.language_model import cap_logits, load_causal_model
from zerotune.lora import add_lora
from zerotune.models import ModelSettings, check_settings, recompute_activations, tuning_config
from zerotune.pretrained import read_config


class Float32LMHead(nn.Linear):
    """An LM head that computes and answers in float32, whatever the type of its weights and also inside autocast.

    A forward of its own, for ZeRO-3 gathers a module's weights while that runs.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(hidden.float(), self.weight.float(), bias)


class AnswerGenerator(TunedModel):
    """A stock causal model, its LM head in float32 and computed at chosen positions only."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        stock = self.stock_model
        stock.set_output_embeddings(_as_float32(stock.get_output_embeddings()))

    def forward(self, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Float32 logits [N, vocabulary] of the token that follows each of N positions of a batch.

        input_ids are [B, T], padded on the right, where a causal model looks from no token of a row: they need no mask.
        rows and columns, [N] each, are the positions.
        """
        stock = self.stock_model
        hidden = stock.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return cap_logits(stock.get_output_embeddings()(hidden[rows, columns]), stock.config)


def _as_float32(linear: nn.Linear) -> Float32LMHead:
    assert type(linear) is nn.Linear, f"the LM head was turned into a {type(linear).__name__}"
    head = Float32LMHead(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    # The same Parameter objects: they may be tied to the embedding, and ZeRO-3 keeps its bookkeeping on them.
    for name, parameter in linear.named_parameters():
        setattr(head, name, parameter)
    return head.train(linear.training)


def load_generator(settings: ModelSettings, tokenizer) -> AnswerGenerator:
    """The causal model of the settings ready to be tuned, on the device that from_pretrained chooses.

    Types are those of models.load_classifier: float32 in full tuning; of LoRA a frozen base in the settings' precision,
    of QLoRA in NF4, both with float32 adapters. Raises Refused for a model or settings that cannot be trained.
    """
    check_settings(settings)
    config = tuning_config(read_config(settings.name, settings.revision), settings, tokenizer)
    model = load_causal_model(settings, config)
    if settings.method != "full":
        model = add_lora(model, settings, "CAUSAL_LM")
    return recompute_activations(AnswerGenerator(model), settings)
