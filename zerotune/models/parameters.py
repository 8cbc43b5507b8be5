"""How many weights a model has and which of them train: parameters.json, the printed table, the optimizer's groups."""

import copy

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from zerotune.models.adapters import adapter_size
from zerotune.models.families import backbone_class, classifier_class, span_class
from zerotune.models.heads import TunedModel, is_encoder, is_head_parameter, logical_size, stock_name
from zerotune.models.pretrained import is_trained_classifier
from zerotune.settings.groups import ModelSettings

GROUPS = ("embedding", "attention", "mlp", "norm", "head", "adapter")


def parameter_table(model) -> dict:
    """Return {"total", "trainable", "head", "groups": {group: count}} of a stock or peft model, or of a TunedModel.

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
        groups[module_group(name, model.config)] += size
    return {"total": total, "trainable": trainable, "head": groups["head"], "groups": groups}


def published_table(config) -> dict:
    """Return the same table for the checkpoint as published: a causal model with LM head, an encoder without a head.

    A checkpoint published as a classifier counts with that head. The model is built on the meta device: no weight is
    read.
    """
    if is_encoder(config):
        model_class = classifier_class(config) if is_trained_classifier(config) else backbone_class(config)
    elif is_trained_classifier(config):
        model_class = backbone_class(config)
    else:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    table = _table_on_meta(model_class, config)
    if is_trained_classifier(config) and not is_encoder(config):
        # Under ZeRO-3, transformers builds these classifiers through zero.Init, which cannot use the meta device.
        head = config.num_labels * config.hidden_size
        table["groups"]["head"] += head
        for key in ("total", "trainable", "head"):
            table[key] += head
    return table


def model_size(config, head: str, num_labels: int, settings: ModelSettings) -> tuple[int, int]:
    """Return (total, trainable) logical weights of a model with its head and adapters, without reading a weight.

    Args:
        head: "classify", "generate" or "span".
        num_labels: of a classifier.
    """
    if head == "generate":
        total, head_size = published_table(config)["total"], 0
    else:
        config = copy.deepcopy(config)
        config.num_labels = num_labels if head == "classify" else 2
        table = _table_on_meta(classifier_class(config) if head == "classify" else span_class(config), config)
        total, head_size = table["total"], table["head"]
    if settings.method == "full":
        return total, total
    adapter = adapter_size(config, settings.lora_rank)
    return total + adapter, adapter + head_size


def _table_on_meta(model_class, config) -> dict:
    with torch.device("meta"):
        return parameter_table(model_class(config))


def module_group(name: str, config) -> str:
    """Return a parameter's group, by the names that the supported models give their modules."""
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
        ("mlp", ("mlp", "ffn", "intermediate", "output.dense", "encoder.conv")),
    ):
        if any(part in path for part in parts):
            return group
    raise AssertionError(f"{name} belongs to no group of parameters")


def format_table(before: dict, after: dict) -> str:
    """Return the two tables side by side, one line per count, without groups that are empty in both."""
    rows = [("parameters", "base model", "this run")]
    rows += [(key, f"{before[key]:,}", f"{after[key]:,}") for key in ("total", "head")]
    share = after["trainable"] / after["total"]
    rows.append(("trainable", "", f"{after['trainable']:,} ({share:.2%})"))
    for group in GROUPS:
        if group != "head" and before["groups"][group] + after["groups"][group]:
            rows.append((f"  {group}", f"{before['groups'][group]:,}", f"{after['groups'][group]:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def parameter_groups(
    tuned: TunedModel, learning_rate: float, head_learning_rate: float | None, weight_decay: float
) -> list[dict]:
    """Return the trainable parameters for an optimizer, in four groups at most; empty ones are left out.

    Matrices decay; biases and norms (1-d) do not. A classifier's head has its own learning rate.
    """
    groups: dict[tuple[str, str], list] = {}
    for name, parameter in tuned.model.named_parameters():
        if parameter.requires_grad:
            part = "head" if is_head_parameter(name, tuned.config) else "backbone"
            decay = "decay" if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 else "no decay"
            groups.setdefault((part, decay), []).append(parameter)
    rates = {"backbone": learning_rate, "head": head_learning_rate}
    decays = {"decay": weight_decay, "no decay": 0.0}
    return [
        {"name": f"{part}, {decay}", "params": parameters, "lr": rates[part], "weight_decay": decays[decay]}
        for (part, decay), parameters in sorted(groups.items())
    ]
