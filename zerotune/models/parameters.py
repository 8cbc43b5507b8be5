"""How many weights a model has, which of them train, and where they are: parameters.json and the printed table."""

import copy

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from zerotune.models.heads import TunedModel, is_encoder, is_head_parameter, stock_name
from zerotune.models.pretrained import is_trained_classifier

GROUPS = ("embedding", "attention", "mlp", "norm", "head", "adapter")


def logical_size(parameter) -> int:
    """Number of weights a parameter stands for: whole under ZeRO-3, unpacked in 4 bits."""
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        return quant_state.shape.numel()
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def parameter_table(model) -> dict:
    """{"total", "trainable", "head", "groups": {group: count}} of a stock or peft model, or of a TunedModel.

    Counts are of logical weights: whole under ZeRO-3, unpacked in 4 bits, a tied matrix once, and without the untrained
    copy that peft keeps of a head.
    """
    if isinstance(model, TunedModel):
        model = model.model
    groups = dict.fromkeys(GROUPS, 0)
    total = trainable = 0
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        size = logical_size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
        groups[_group(name, model.config)] += size
    return {"total": total, "trainable": trainable, "head": groups["head"], "groups": groups}


def published_table(config) -> dict:
    """The same table of the checkpoint as published: with its LM head if causal, without a head if an encoder.

    A checkpoint published as a classifier counts with that head. Built on the meta device, without reading a weight.
    """
    if is_encoder(config):
        classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if is_trained_classifier(config) else MODEL_MAPPING
    else:
        classes = MODEL_MAPPING if is_trained_classifier(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.device("meta"):
        table = parameter_table(classes[type(config)](config))
    if is_trained_classifier(config) and not is_encoder(config):
        # Where ZeRO-3 is on, transformers builds these classifiers through zero.Init, which knows no meta device.
        head = config.num_labels * config.hidden_size
        table["groups"]["head"] += head
        for key in ("total", "trainable", "head"):
            table[key] += head
    return table


def classifier_size(config, num_labels: int) -> tuple[int, int]:
    """(weights, weights of its head) of a sequence-classification model, built on the meta device."""
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    with torch.device("meta"):
        table = parameter_table(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config))
    return table["total"], table["head"]


def _group(name: str, config) -> str:
    """By the names that the supported models give their modules."""
    if ".lora_" in name:
        return "adapter"
    if is_head_parameter(name, config) or stock_name(name).startswith(("lm_head.", "pooler.")):
        return "head"
    path = stock_name(name).lower()
    owner = path.rsplit(".", 2)[-2]
    if "norm" in owner:
        return "norm"
    for group, parts in (
        ("embedding", ("embed",)),
        ("attention", ("attn", "attention")),
        ("mlp", ("mlp", "ffn", "intermediate", "output.dense")),
    ):
        if any(part in path for part in parts):
            return group
    raise AssertionError(f"{name} belongs to no group of parameters")


def format_table(before: dict, after: dict) -> str:
    """The two tables side by side, one line per count, groups that are empty in both left out."""
    rows = [("parameters", "published", "this run")]
    rows += [(key, f"{before[key]:,}", f"{after[key]:,}") for key in ("total", "head")]
    share = after["trainable"] / after["total"]
    rows.append(("trainable", "", f"{after['trainable']:,} ({share:.2%})"))
    for group in GROUPS:
        if group != "head" and before["groups"][group] + after["groups"][group]:
            rows.append((f"  {group}", f"{before['groups'][group]:,}", f"{after['groups'][group]:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)
