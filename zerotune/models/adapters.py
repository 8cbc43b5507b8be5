"""LoRA on every projection of a model: where it goes, how many weights it has, and how a trained adapter is loaded.

In a model with experts only the attention gets adapters: experts are stacked in tensors that LoRA does not reach.
"""

import contextlib
import os
from dataclasses import replace

import torch

from zerotune.errors import Refused
from zerotune.models.boundary import reading
from zerotune.models.families import projection_names, projection_shapes
from zerotune.models.fused import fuse_adapters
from zerotune.models.heads import head_module_names, head_of, is_head_parameter, logical_size, span_module_names
from zerotune.models.model_files import adapter_base, find_file
from zerotune.settings.groups import ModelSettings


@contextlib.contextmanager
def seeded(seed: int):
    """Seed the CPU's generator, from which peft draws, inside the block, and restore its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def add_lora(model, settings: ModelSettings):
    """Return a peft model around a stock one: LoRA and a classification or span head train, the rest is frozen.

    Asserts that no target module was missed and that nothing else trains.
    """
    from peft import LoraConfig, get_peft_model

    task_type, heads = {
        "classify": ("SEQ_CLS", list(head_module_names(model.config))),
        "span": ("QUESTION_ANS", list(span_module_names(model.config))),
        "generate": ("CAUSAL_LM", None),
    }[head_of(model)]
    lora = LoraConfig(
        task_type=task_type,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=projection_names(model),
        modules_to_save=heads,
        revision=settings.revision,
    )
    with seeded(settings.seed):
        adapted = get_peft_model(model, lora)
    is_folder = os.path.isdir(settings.name)
    lora.base_model_name_or_path = os.path.abspath(settings.name) if is_folder else settings.name
    trainable = {name: logical_size(p) for name, p in adapted.named_parameters() if p.requires_grad}
    found = sum(size for name, size in trainable.items() if ".lora_" in name)
    expected = adapter_size(model.config, settings.lora_rank)
    assert found == expected, f"LoRA has {found} weights, not {expected}: a target module was missed"
    others = {name for name in trainable if ".lora_" not in name}
    assert bool(others) == bool(heads) and all(is_head_parameter(name, model.config) for name in others), sorted(others)
    cast_only_outside_autocast(adapted)
    return adapted


def cast_only_outside_autocast(adapted) -> None:
    """Keep peft from casting a projection's input to the adapter's float32 where autocast computes in 16 bits.

    Autocast would cast it back at once: two passes over the activations, a seventh of a LoRA step, for the same bits.
    Outside of autocast a 16-bit input needs the cast. Each forward pass checks which case applies.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in adapted.modules() if isinstance(layer, BaseTunerLayer)]

    def choose(backbone, _) -> None:
        casts = not torch.is_autocast_enabled(next(backbone.parameters()).device.type)
        for layer in layers:
            layer.cast_input_dtype_enabled = casts

    adapted.get_base_model().base_model.register_forward_pre_hook(choose)


def adapter_size(config, rank: int) -> int:
    """Return the number of LoRA weights: rank × (inputs + outputs) of all projections (Hu et al. 2021)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in projection_shapes(config).values())


def base_settings(settings: ModelSettings, record: dict | None) -> tuple[ModelSettings, bool]:
    """Return the settings that load a model's weights for evaluation, and whether an adapter goes on top of them.

    For an adapter they load its base, in NF4 if the adapter was trained on NF4. ZeRO is for training only.

    Args:
        record: the model's task.json; None if it has none.
    """
    base = adapter_base(settings.name, settings.revision)
    name, revision = base or (settings.name, settings.revision)
    in_4bit = settings.method == "qlora" or (record or {}).get("method") == "qlora"
    method = "qlora" if in_4bit else "lora" if base else "full"
    return replace(settings, name=name, revision=revision, method=method, zero_stage=None), base is not None


def load_adapter(model, name: str, revision: str | None):
    """Put the adapter of a folder or hub id on its base, and return the peft model to evaluate or merge.

    Raises:
        Refused: the adapter lacks weights (peft would only warn and keep random ones), or has weights that its
            configuration does not name (peft would ignore them).
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = find_file(name, "adapter_model.safetensors", revision)
    if weights is None:
        raise Refused(f"the adapter {name} has no adapter_model.safetensors; copy the whole folder")
    with reading(
        "the adapter", name, "it lacks weights, or they do not fit adapter_config.json; copy the whole folder"
    ):
        # without a device, every process would read it onto the first GPU
        device = str(next(model.parameters()).device)
        adapted = PeftModel.from_pretrained(model, name, revision=revision, torch_device=device)
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    known = wanted | set(get_peft_model_state_dict(adapted, save_embedding_layers=True))  # peft may save these too
    with safe_open(weights, "pt") as file:
        found = set(file.keys())
    for problem, names in (("lacks weights", wanted - found), ("has weights its config does not name", found - known)):
        if names:
            raise Refused(f"the adapter {name} {problem}: {', '.join(sorted(names)[:4])}; copy the whole folder")
    fuse_adapters(adapted)
    return adapted
