"""A causal model with its own LM head, loaded for tuning, for scoring answers and for writing them."""

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from zerotune.errors import Refused
from zerotune.models.final_folder import put_adapter_on, read_adapter_config
from zerotune.models.loading import ModelSettings, read_weights
from zerotune.models.pretrained import read_config


class Float32LMHead(nn.Linear):
    """An LM head that computes and answers in float32, whatever the type of its weights and also inside autocast.

    A forward of its own, for ZeRO-3 gathers a module's weights while that runs.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(hidden.float(), self.weight.float(), bias)


def answer_logits(model, hidden: torch.Tensor, token_ids: list[int] | None = None) -> torch.Tensor:
    """Float32 logits of hidden states [..., dim]: [..., vocabulary], or [..., len(token_ids)] of some tokens alone.

    In bf16 two label words often tie: its numbers near 16 lie 0.125 apart.
    """
    weight = model.get_output_embeddings().weight
    logits = functional.linear(hidden.float(), (weight if token_ids is None else weight[token_ids]).float())
    return cap_logits(logits, model.config)


def cap_logits(logits: torch.Tensor, config) -> torch.Tensor:
    """Gemma-2's soft cap of the last logits (Gemma Team 2024, arXiv:2408.00118, section 2); others as they are."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def load_language_model(options, device: torch.device):
    """A causal model in eval mode on the device, with its adapter where it is one, in the precision or in NF4.

    Args:
        options: model, revision, attention, precision, load_4bit (zerotune.evaluation.options.EvalOptions).
    Raises:
        Refused: no weights can be read, or some of them are missing.
    """
    adapter = read_adapter_config(options.model, options.revision)
    # of the methods, these have no float32 base
    settings = ModelSettings(
        name=adapter["base_model_name_or_path"] if adapter else options.model,
        revision=adapter.get("revision") if adapter else options.revision,
        method="qlora" if options.load_4bit else "lora",
        attention=options.attention,
        precision=options.precision,
    )
    model = load_causal_model(settings, read_config(options.model, options.revision))
    if adapter:
        model = put_adapter_on(model, options.model, options.revision).get_base_model()
    return (model if options.load_4bit else model.to(device)).eval()


def load_causal_model(settings: ModelSettings, config):
    """A stock causal model: weights of `models.base_dtype`, with method "qlora" in NF4, and float32 logits.

    Args:
        config: the checkpoint's, perhaps changed (its positions, shapes and dropout are heeded).
    Raises:
        Refused: no weights can be read, or some of them are missing.
    """
    model, info = read_weights(settings, config, AutoModelForCausalLM)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise Refused(
            f"{settings.name} lacks weights of a causal model ({missing}): it can only be evaluated "
            "with the head that it was saved with"
        )
    model.set_output_embeddings(_as_float32(model.get_output_embeddings()))
    return model


def _as_float32(linear: nn.Linear) -> Float32LMHead:
    assert type(linear) is nn.Linear, f"the LM head was turned into a {type(linear).__name__}"
    head = Float32LMHead(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    # The same Parameter objects: they may be tied to the embedding, and ZeRO-3 keeps its bookkeeping on them.
    for name, parameter in linear.named_parameters():
        setattr(head, name, parameter)
    return head.train(linear.training)
