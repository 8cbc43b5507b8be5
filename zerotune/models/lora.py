"""LoRA on every projection of a model: where it goes, and how many weights it must have."""

import contextlib
import os

import torch

from zerotune.models.heads import SPAN_HEAD, head_module_names, is_encoder, is_head_parameter
from zerotune.models.parameters import logical_size

_SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LORA_TARGETS = {
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    # A pattern, because a bare "dense" would also match the pooler.
    "bert": r".*encoder\.layer\.\d+\."
    r"(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)",
}
_LORA_TARGETS["roberta"] = _LORA_TARGETS["bert"]


@contextlib.contextmanager
def seeded(seed: int):
    """Draws inside come from the seed and move no random state outside. The CPU's generator only, where peft draws."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def add_lora(model, settings, task_type: str = "SEQ_CLS"):
    """A peft model around a stock one: LoRA and a classification or span head train; the rest is frozen.

    settings is a models.ModelSettings; task_type one of peft's, "SEQ_CLS", "QUESTION_ANS" or "CAUSAL_LM". Asserts that
    no target module was missed and that nothing else trains.
    """
    from peft import LoraConfig, get_peft_model

    heads = {"SEQ_CLS": list(head_module_names(model.config)), "QUESTION_ANS": [SPAN_HEAD], "CAUSAL_LM": None}[
        task_type
    ]
    lora = LoraConfig(
        task_type=task_type,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_LORA_TARGETS.get(model.config.model_type, _SEVEN_PROJECTIONS),
        modules_to_save=heads,
        revision=settings.revision,
    )
    with seeded(settings.seed):
        adapted = get_peft_model(model, lora)
    is_folder = os.path.isdir(settings.name)
    lora.base_model_name_or_path = os.path.abspath(settings.name) if is_folder else settings.name
    trainable = {name: logical_size(p) for name, p in adapted.named_parameters() if p.requires_grad}
    adapter = sum(size for name, size in trainable.items() if ".lora_" in name)
    expected = adapter_size(model.config, settings.lora_rank)
    assert adapter == expected, f"LoRA has {adapter} weights, not {expected}: a target module was missed"
    others = {name for name in trainable if ".lora_" not in name}
    assert bool(others) == bool(heads) and all(is_head_parameter(name, model.config) for name in others), sorted(others)
    return adapted


def adapter_size(config, rank: int) -> int:
    """LoRA weights on every projection: rank × (inputs + outputs) of each, over all layers (Hu et al. 2021)."""
    if config.model_type == "distilbert":
        hidden, wide, layers = config.dim, config.hidden_dim, config.n_layers
        shapes = [(hidden, hidden)] * 4 + [(hidden, wide), (wide, hidden)]
    elif is_encoder(config):
        hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        shapes = [(hidden, hidden)] * 4 + [(hidden, wide), (wide, hidden)]
    else:
        hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        queries, keys = width * config.num_attention_heads, width * config.num_key_value_heads
        shapes = [(hidden, queries), (queries, hidden)] + [(hidden, keys)] * 2 + [(hidden, wide)] * 2 + [(wide, hidden)]
    return layers * sum(rank * (inputs + outputs) for inputs, outputs in shapes)
