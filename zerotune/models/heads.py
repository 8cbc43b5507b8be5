"""The common parts of all heads: float32 layers, the names of their parameters, the base class of their models."""

import torch
from torch import nn
from torch.nn import functional

from zerotune.models.families import classifier_class, head_modules, is_encoder_family, span_class
from zerotune.models.fused_functions import WideLinear, can_multiply_wide


def is_encoder(config) -> bool:
    """Return whether the model attends in both directions; its classifier pools the first token, or all of them."""
    return is_encoder_family(config.model_type)


def has_token_types(config) -> bool:
    """Return whether the model tells the two texts of a pair apart by the types of their tokens."""
    return getattr(config, "type_vocab_size", 1) > 1


def head_module_names(config) -> tuple[str, ...]:
    """Return the paths of the head's modules in a stock sequence-classification model; BERT's pooler is one."""
    return head_modules(classifier_class(config), type(config))


def span_module_names(config) -> tuple[str, ...]:
    """Return the paths of the head's modules in a stock question-answering model: qa_outputs, except in ModernBERT."""
    return head_modules(span_class(config), type(config))


def head_of(stock: nn.Module) -> str:
    """Return the head of a stock model: "classify", "span" or "generate"."""
    if type(stock).__name__.endswith("ForQuestionAnswering"):
        return "span"
    return "classify" if stock.get_output_embeddings() is None else "generate"


def stock_name(parameter_name: str) -> str:
    """Return a parameter's name in the stock model, without the parts that peft adds."""
    name = parameter_name.removeprefix("base_model.model.")
    for part in (".original_module", ".modules_to_save.default", ".base_layer"):
        name = name.replace(part, "")
    return name


def is_head_parameter(parameter_name: str, config) -> bool:
    """Return whether a parameter belongs to a classification head or to a span head."""
    heads = (*head_module_names(config), *span_module_names(config))
    return stock_name(parameter_name).startswith(tuple(f"{head}." for head in heads))


def logical_size(parameter) -> int:
    """Return the number of weights in a parameter: unsharded under ZeRO-3, unpacked in 4 bits."""
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        return quant_state.shape.numel()
    return getattr(parameter, "ds_numel", None) or parameter.numel()


class Float32Linear(nn.Linear):
    """A linear layer that computes and returns float32, also inside autocast.

    It is its own class, not an `nn.Linear` with a flag: DeepSpeed's `torch_autocast` reduces the gradients (and
    under ZeRO-3 gathers the weights) of every module whose class is exactly `nn.Linear` in 16 bits. It has a forward of
    its own because ZeRO-3 gathers a module's weights while its forward runs.

    Attributes:
        weights_are_float32: false for an LM head, whose weights have the type of the base.
    """

    weights_are_float32 = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.weights_are_float32:
            assert self.weight.dtype == torch.float32, f"the head was cast to {self.weight.dtype}, it must stay float32"
        return wide_linear(hidden, self.weight, self.bias)


def wide_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return a linear layer's outputs in float32, also inside autocast, without rounding its factors.

    Weights that do not train are never copied whole, and a GPU multiplies 16 bits by 16 bits directly, in a tenth of
    the time.
    """
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        trains = weight.requires_grad and torch.is_grad_enabled()
        is_narrow = hidden.dtype == weight.dtype != torch.float32 and bias is None
        if is_narrow and not trains and (hidden.device.type == "cpu" or can_multiply_wide(hidden)):
            return WideLinear.apply(hidden, weight)
        return functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def float32_linear(linear: nn.Linear, cast_weights: bool = True) -> Float32Linear:
    """Return a layer around another's parameters, which are cast to float32 in place if `cast_weights`."""
    assert type(linear) is nn.Linear, f"a head was turned into a {type(linear).__name__}"
    layer = Float32Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    layer.weights_are_float32 = cast_weights
    # The same Parameter objects: they may be tied to the embedding, and ZeRO-3 keeps its bookkeeping on them.
    for name, parameter in linear.named_parameters():
        if cast_weights:
            parameter.data = parameter.data.float()  # changes the dtype in place
        setattr(layer, name, parameter)
    return layer.train(linear.training)


def make_head_float32(model: nn.Module) -> None:
    """Replace the linear layers of a stock model's new head in place. State-dict keys stay the stock ones."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_head_parameter(f"{path}.weight", model.config):
            model.set_submodule(path, float32_linear(module))


class TunedModel(nn.Module):
    """A transformers model, or a peft model around one; a subclass's forward computes a head's logits."""

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
