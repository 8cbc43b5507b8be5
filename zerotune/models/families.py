"""Facts about model families, read from transformers' classes and from modules that are built without weights."""

import difflib
import json
import re
from functools import cache

import torch
from torch import nn
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
)
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from zerotune.models.boundary import quiet_transformers

# Families for which tests/unit/models/test_families.py passes: the name in transformers, and an example model.
CAUSAL = {
    "llama": "meta-llama/Llama-3.2-1B",
    "gemma": "google/gemma-2b",
    "gemma2": "google/gemma-2-2b",
    "gemma3_text": "google/gemma-3-1b-pt",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "ministral": "mistralai/Ministral-8B-Instruct-2410",
    "ministral3": "mistralai/Ministral-3-8B-Base-2512",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen2": "Qwen/Qwen2.5-1.5B",
    "qwen3": "Qwen/Qwen3-1.7B-Base",
    "qwen3_5_text": "Qwen/Qwen3.5-27B",
    "smollm3": "HuggingFaceTB/SmolLM3-3B-Base",
    "olmo2": "allenai/OLMo-2-0425-1B",
    "olmo3": "allenai/Olmo-3-1025-7B",
    "granite": "ibm-granite/granite-3.3-2b-base",
    "phi3": "microsoft/Phi-4-mini-instruct",
}
ENCODERS = {
    "distilbert": "distilbert/distilbert-base-uncased",
    "bert": "google-bert/bert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
    "xlm-roberta": "FacebookAI/xlm-roberta-base",
    "electra": "google/electra-base-discriminator",
    "albert": "albert/albert-base-v2",
    "deberta-v2": "microsoft/deberta-v3-base",
    "modernbert": "answerdotai/ModernBERT-base",
}
SUPPORTED = (*CAUSAL, *ENCODERS)
# Models of text and images whose weights `text_part_renaming` finds.
_WITH_TEXT_PART = ("gemma3", "mistral3", "qwen3_5", "llava", "internvl")
# The suggestion where no family has a similar name.
_FIRST_CHOICE = {"causal model": "llama", "encoder": "modernbert"}


def is_encoder_family(model_type: str | None) -> bool:
    """Return whether models of a family attend in both directions: if transformers has a masked-LM class for it."""
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def nearest_family(model_type: str | None) -> str:
    """Return the supported family nearest to another: of the same kind, the newest with the most similar name.

    Digits, and "text", "moe" and "vl", do not count: gemma4 is nearest to gemma3_text.
    """
    kind, families = ("encoder", ENCODERS) if is_encoder_family(model_type) else ("causal model", CAUSAL)
    stems = {_stem(family): family for family in families}  # of equal stems the last, which is the newest
    alike = difflib.get_close_matches(_stem(str(model_type)), stems, n=1, cutoff=0.75)
    return stems[alike[0]] if alike else _FIRST_CHOICE[kind]


def _stem(model_type: str) -> str:
    return re.sub(r"[\d_.-]|text|moe|vl", "", model_type)


# --- classes ---


def backbone_class(config: PretrainedConfig) -> type:
    """Return the class of a model without a head."""
    return MODEL_MAPPING[type(config)]


def classifier_class(config: PretrainedConfig) -> type:
    """Return the class of a backbone with a classification head: transformers' own, else its generic one."""
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return _generic_class(type(config), GenericForSequenceClassification)


def span_class(config: PretrainedConfig) -> type:
    """Return the class of a backbone with a span head: transformers' own, else its generic one."""
    if type(config) in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        return MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)]
    return _generic_class(type(config), GenericForQuestionAnswering)


@cache
def _generic_class(config_class: type, generic: type) -> type:
    backbone = MODEL_MAPPING[config_class]
    name = backbone.__name__.removesuffix("Model") + generic.__name__.removeprefix("Generic")
    return type(name, (generic, backbone.__bases__[0]), {"config_class": config_class})


def generic_part(model_class: type) -> type | None:
    """Return the generic transformers class from which this module made a class; None for transformers' own."""
    generic = model_class.__bases__[0]
    return generic if model_class.__module__ == __name__ else None


# --- modules ---


@cache
def head_modules(model_class: type, config_class: type) -> tuple[str, ...]:
    """Return the paths of the head's modules in a stock model; the last one gives the logits.

    A pooler inside the backbone (BERT's, ALBERT's) belongs to the head.
    """
    # Under ZeRO-3, transformers builds the generic classes through zero.Init, which cannot use the meta device.
    if issubclass(model_class, GenericForSequenceClassification):
        return ("score",)
    if issubclass(model_class, GenericForQuestionAnswering):
        return ("qa_outputs",)
    with torch.device("meta"), quiet_transformers():
        model = model_class(config_class(num_hidden_layers=1))
    backbone = model.base_model_prefix
    pooler = [f"{backbone}.pooler"] if getattr(model.base_model, "pooler", None) is not None else []
    own = [name for name, part in model.named_children() if name != backbone and any(True for _ in part.parameters())]
    return (*pooler, *own)


def caps_scores(config) -> bool:
    """Return whether a model caps its attention scores, as Gemma-2 does (Gemma Team 2024, arXiv:2408.00118)."""
    return getattr(config, "attn_logit_softcapping", None) is not None


@cache
def counts_positions_from_pad(config_class: type) -> bool:
    """Return whether a model's positions begin after the pad id, as RoBERTa's do."""
    with torch.device("meta"), quiet_transformers():
        embeddings = getattr(MODEL_MAPPING[config_class](config_class(num_hidden_layers=1)), "embeddings", None)
    return getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None) is not None


def projection_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each linear layer in the backbone's repeated layers, by its path in the backbone."""
    return dict(_layer_shapes(type(config), config.to_json_string())[0])


def expert_size(config: PretrainedConfig) -> int:
    """Return the number of weights in experts, which are stacked in tensors that neither LoRA nor NF4 reaches."""
    return _layer_shapes(type(config), config.to_json_string())[1]


@cache
def _layer_shapes(config_class: type, content: str) -> tuple[tuple, int]:
    with torch.device("meta"), quiet_transformers():
        backbone = MODEL_MAPPING[config_class](config_class(**json.loads(content)))
    shapes = [(path, (layer.in_features, layer.out_features)) for path, layer in projections(backbone).items()]
    stacked = [parameter.numel() for name, parameter in backbone.named_parameters() if ".experts." in name]
    return tuple(shapes), sum(stacked)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model's repeated layers, by path: attention and MLP, no head, no embedding."""
    return {path: layer for path, layer in _linear_layers(model).items() if _in_layer(path) != path}


def projection_names(model: nn.Module) -> list[str]:
    """Return path endings that match the projections of a stock model and no other linear layer.

    An ending is a name (q_proj), or the path inside the layer if a linear layer elsewhere has the same name (dense).
    """
    paths, inside = _linear_layers(model), projections(model)
    others = {path.rpartition(".")[2] for path in paths.keys() - inside.keys()}
    names = {path: path.rpartition(".")[2] for path in inside}
    return sorted({_in_layer(path) if name in others else name for path, name in names.items()})


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _in_layer(path: str) -> str:
    """Return the part of a path after its last number: "mlp.up_proj" for "layers.3.mlp.up_proj"."""
    parts = path.split(".")
    first = max((place + 1 for place, part in enumerate(parts) if part.isdecimal()), default=0)
    return ".".join(parts[first:])


# --- models of text and images ---


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """Return the text part's config of a model of text and images, if only that part is supported; else the config."""
    part = getattr(config, "text_config", None)
    if config.model_type not in _WITH_TEXT_PART or part is None or part.model_type not in CAUSAL:
        return config
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(part, name, None) is None:
            setattr(part, name, getattr(config, name, None))
    part.dtype = part.dtype or config.dtype
    part.tie_word_embeddings = config.tie_word_embeddings  # the whole model's value decides which weights exist
    part.name_or_path, part.architectures = config.name_or_path, config.architectures
    part.id2label, part.label2id = config.id2label, config.label2id
    if getattr(config, "quantization_config", None) is not None:
        part.quantization_config = config.quantization_config
    return part


def text_part_renaming(model_class: type) -> dict[str, str]:
    """Return from_pretrained's key_mapping from the weights of a model of text and images to its text part's."""
    return {
        r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:model\.)?": f"{model_class.base_model_prefix}.",
    }
