"""Load a stock model of transformers from settings: its types, kernels and head, and the checks of its files."""

import contextlib
import copy
import os
import re
from dataclasses import replace

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from zerotune.errors import Refused
from zerotune.models import cpu_kernels
from zerotune.models.adapters import add_lora, seeded
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.boundary import device_memory_errors, quiet_transformers, reading
from zerotune.models.families import (
    backbone_class,
    counts_positions_from_pad,
    expert_size,
    head_modules,
    text_part_renaming,
)
from zerotune.models.heads import (
    head_module_names,
    is_encoder,
    make_head_float32,
    span_module_names,
)
from zerotune.models.packed import drops_scores
from zerotune.models.precision import compute_dtype
from zerotune.models.pretrained import check_pad_token, check_window, is_text_part
from zerotune.run.cpu import keep_kernels_for
from zerotune.settings.groups import ModelSettings
from zerotune.terminal import say_when_slow

# Weights of a checkpoint that a model with another head may ignore: LM heads and pretraining heads, the parts beside a
# text part, and buffers.
_OTHER_HEADS = re.compile(
    r"^lm_head\.|^cls\.|^vocab_(transform|layer_norm|projector)\.|(^|\.)pooler\.|position_ids$|inv_freq$"
    r"|^(lm_predictions|mask_predictions|predictions|sop_classifier|decoder|head)\."
    r"|^(discriminator_predictions|generator_predictions|generator_lm_head)\."
    r"|^(model\.)?(vision_tower|multi_modal_projector|visual|mtp)\."
)
_HEADS_ON_CAUSAL_MODELS = re.compile(r"^(score|classifier|qa_outputs|v_head)\.")
_UNUSED = "has weights that this architecture does not use"

# How configs name their dropout rates, and Mixtral its router's noise.
_DROPOUTS = ("dropout", "dropout_prob", "pdrop", "jitter_noise")


def check_settings(settings: ModelSettings) -> None:
    """Refuse settings that no model can be trained with, before one is read."""
    if settings.method == "qlora" and settings.zero_stage == 3:
        raise Refused(
            "--method qlora cannot be split by ZeRO-3, and need not be: a 7B model in NF4 fits any GPU; "
            "use --deepspeed ds_configs/qlora.json (ZeRO-2) or leave --deepspeed out"
        )
    check_kernel_precision(settings.attention, settings.precision)
    if os.path.isfile(os.path.join(settings.name, "adapter_config.json")):
        raise Refused(
            f"--model must be a whole model: {settings.name} is an adapter; give the model it was trained from, or "
            "merge it first: python eval/publish.py RUN --merge FOLDER"
        )


def check_trainable(settings: ModelSettings, config, max_length: int | None) -> None:
    """Refuse a model that cannot be trained with the settings, and texts longer than its positions."""
    attention_kernel(settings.attention, config)
    without_dropout = settings.attention in ("varlen", "flex_attention") and torch.cuda.is_available()
    if without_dropout and drops_scores(settings, config):
        raise Refused(
            f"--attention {settings.attention} has no dropout on a GPU, and full tuning of an encoder needs it: use "
            "--attention auto, or --method lora"
        )
    if settings.attention == "flex_attention" and not torch.cuda.is_available():
        raise Refused("--attention flex_attention trains on a GPU only, and there is none; use --attention auto")
    if getattr(config, "quantization_config", None) is not None:
        raise Refused(
            f"{settings.name} is quantised already and cannot be trained: give the model it was made from; "
            "--method qlora quantises it while it is loaded"
        )
    if max_length is not None:
        check_window(settings.name, config, max_length)
    check_settings(settings)
    if settings.activation_checkpointing and not backbone_class(config).supports_gradient_checkpointing:
        raise Refused(f"--activation-checkpointing is not possible with {config.model_type}: leave it out")
    if settings.method == "qlora" and expert_size(config):
        raise Refused(
            f"--method qlora would leave the experts of {settings.name}, {expert_size(config):,} weights, in 16 bits: "
            "use --method lora, which adapts the attention beside them, or a model without experts"
        )


def make_trainable(model, settings: ModelSettings):
    """Return a stock model ready to train: with adapters unless the method is full, with checkpointing if asked."""
    tuned = model if settings.method == "full" else add_lora(model, settings)
    if settings.activation_checkpointing:  # after peft, which would change a model that already has it
        # a layer without dropout draws no numbers: the generators' states need not be kept for its second pass
        how = {"use_reentrant": False, "preserve_rng_state": has_dropout(tuned)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return tuned


def has_dropout(module: nn.Module) -> bool:
    """Return whether a model drops anything: by a module, or by a number in its configuration (attention)."""
    names = ("attention_dropout", "attention_probs_dropout_prob", "dropout")
    by_config = any(getattr(module.config, name, 0) for name in names)
    return by_config or any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


def load_with_head(settings: ModelSettings, config, model_class, key_mapping=None):
    """Load a stock model with a float32 head; return it and the names of the head parameters that were missing.

    Missing parameters are drawn by settings.seed.

    Args:
        config: from `tuning_config`.
        key_mapping: from_pretrained's: from patterns of names in the checkpoint to names in the model.
    Raises:
        Refused: no weights can be read, or any but the head's are missing.
    """
    has_both_types = settings.method == "full" and settings.narrow_layers
    wide = _wide_modules(config, model_class) if has_both_types else set()
    with seeded(settings.seed), _read_in_float32(model_class, config, wide):
        model, info = read_weights(settings, config, model_class, key_mapping)
    _check_loaded_keys(model, info["missing_keys"], info["unexpected_keys"])
    if has_both_types:
        for part in model.modules():
            if hasattr(part, "scalar_embed_scale"):  # Gemma's, which loading rounds
                part.embed_scale = torch.tensor(part.scalar_embed_scale, device=part.embed_scale.device)
    make_head_float32(model)
    _draw_missing_head(model, info["missing_keys"], settings.seed)
    use_cpu_kernels(model, settings)
    return model, info["missing_keys"]


def use_cpu_kernels(model, settings: ModelSettings) -> None:
    """Make an encoder with zerotune's own CPU attention use the other CPU kernels too."""
    if model.config._attn_implementation == cpu_kernels.ATTENTION:
        cpu_kernels.use_cheap_dropout(model)
        if settings.method == "full" and settings.zero_stage != 3:
            cpu_kernels.join_projections(model)


def read_weights(settings: ModelSettings, config, model_class, key_mapping=None) -> tuple:
    """Load a stock model with weights of `base_dtype` or in NF4; return it and from_pretrained's loading info.

    Raises:
        Refused: no weights can be read, or some have other shapes.
    """
    if is_text_part(settings.name, settings.revision, config):
        key_mapping = text_part_renaming(model_class)
    slow = say_when_slow(f"loading the weights of {settings.name}")
    files = reading("the weights", f"--model {settings.name}", "copy the model again")
    with files, quiet_transformers(), device_memory_errors(), slow:
        model, info = model_class.from_pretrained(
            settings.name,
            revision=settings.revision or "main",
            config=config,
            dtype=base_dtype(settings),
            device_map={"": settings.device} if settings.device and settings.method != "qlora" else None,
            attn_implementation=attention_kernel(settings.attention, config),
            quantization_config=nf4_config(settings.precision, config) if settings.method == "qlora" else None,
            ignore_mismatched_sizes=True,  # refused below, in one line
            output_loading_info=True,
            key_mapping=key_mapping,
        )
    if mismatched := sorted(info["mismatched_keys"]):
        weight, found, wanted = mismatched[0]
        raise Refused(
            f"the weights of {settings.name} do not fit its config.json: {weight} is {list(found)}, wanted "
            f"{list(wanted)} ({len(mismatched)} in all); check that the config belongs to the weights"
        )
    # in a layer that bitsandbytes has packed, the weight has a class of its own
    packed = [(name, part) for name, part in model.named_modules() if type(part).__module__.startswith("bitsandbytes")]
    unpacked = [name for name, part in packed if type(getattr(part, "weight", None)) is nn.Parameter]
    if unpacked:
        raise Refused(
            f"the config of {settings.name} says that bitsandbytes packed its weights, but {unpacked[0]} is not: "
            "remove quantization_config from config.json; --load-4bit and --method qlora pack weights while loading"
        )
    keep_nf4_layout(model)
    keep_kernels_for(sum(weight.numel() for weight in model.parameters()))
    model.key_mapping = key_mapping  # an adapter's README.md names it
    return model, info


def read_onto(settings: ModelSettings, device: torch.device, evaluates: bool = False) -> ModelSettings:
    """Return settings that read weights onto a GPU one by one, so that no rank holds them all in host memory.

    Under ZeRO-3 DeepSpeed decides where they go. A model whose layers will be divided is read into host memory first.

    Args:
        evaluates: nothing will be trained, so linear layers are read in the type to which autocast would cast them in
            each forward pass: the same numbers in half the memory.
    """
    if device.type != "cuda" or settings.zero_stage == 3:
        return settings
    onto = None if settings.divides_layers else str(device)
    return replace(settings, device=onto, narrow_layers=evaluates and settings.precision != "fp32")


def _wide_modules(config, model_class) -> set[str]:
    """Return the last names of the modules with weights, other than linear layers: embeddings and norms."""
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config))
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    own = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    return own - linear


def base_dtype(settings: ModelSettings) -> torch.dtype:
    """Return the type of everything but head and adapters; in QLoRA, of the weights that are not quantised."""
    keeps_float32 = (settings.method == "full" and not settings.narrow_layers) or settings.zero_stage == 3
    return torch.float32 if keeps_float32 else compute_dtype(settings.precision)


def nf4_config(precision: str, config) -> BitsAndBytesConfig:
    """Return 4-bit NormalFloat with double quantisation, as in QLoRA (Dettmers et al. 2023), without a model's heads.

    transformers matches the skipped names with the beginning or the end of a path.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(precision),
        llm_int8_skip_modules=[*dict.fromkeys([*head_module_names(config), *span_module_names(config), "lm_head"])],
    )


def keep_nf4_layout(model) -> None:
    """Keep bitsandbytes (0.50) from repacking 4-bit layers in place, at their first evaluation on AVX512-BF16 CPUs.

    A repacked layer has rounded scales and no gradient: training after an evaluation would be silently wrong. It also
    raises for inputs that are no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def tuning_config(config, settings: ModelSettings, tokenizer):
    """Return the config, changed in place, with the tokenizer's pad, and with dropout only in full tuning of encoders.

    Raises:
        Refused: the pad token has no embedding.
    """
    check_pad_token(settings.name, config, tokenizer)
    if not (
        is_encoder(config) and counts_positions_from_pad(type(config))
    ):  # these count positions from their own pad id
        config.pad_token_id = tokenizer.pad_token_id
    return set_dropout(config, settings)


def set_dropout(config, settings: ModelSettings):
    """Return the config, changed in place, with dropout only in full tuning of encoders."""
    if settings.method != "full" or not is_encoder(config):
        for key in config.to_dict():
            if key.endswith(_DROPOUTS) and isinstance(getattr(config, key), float):
                setattr(config, key, 0.0)
    return config


@contextlib.contextmanager
def _read_in_float32(model_class, config, wide: set[str]):
    """Read a checkpoint's head, and `wide` modules, in float32 beside a 16-bit or 4-bit base, without rounding them."""
    before = model_class._keep_in_fp32_modules_strict
    model_class._keep_in_fp32_modules_strict = {*head_module_names(config), *span_module_names(config), *wide}
    try:
        yield
    finally:
        model_class._keep_in_fp32_modules_strict = before


def _check_loaded_keys(model, missing, unexpected) -> None:
    """Refuse a checkpoint that leaves part of the backbone random, or that belongs to another architecture.

    `missing` may be empty (a trained classifier), the whole head, or whole modules of it that include the one that
    gives the logits (a checkpoint may have a pooler, or ModernBERT's first head layer). `unexpected` may only name
    weights of other heads.
    """
    names, missing = [name for name, _ in model.named_parameters()], set(missing)
    parts = [
        {name for name in names if name.startswith(f"{part}.")}
        for part in head_modules(type(model), type(model.config))
    ]
    absent = set().union(*(part for part in parts if part <= missing))
    is_head = missing == absent and (not missing or parts[-1] <= missing)
    wrong = [] if is_head else sorted(missing - set().union(*parts)) or sorted(missing)
    _refuse_keys("lacks weights that only a head may lack", wrong)
    _refuse_keys(_UNUSED, [key for key in unexpected if not _OTHER_HEADS.search(key)])


def check_unused_keys(unexpected) -> None:
    """Refuse a causal checkpoint with weights that its config.json leaves unused, except those of other heads."""
    known = (_OTHER_HEADS, _HEADS_ON_CAUSAL_MODELS)
    _refuse_keys(_UNUSED, [key for key in unexpected if not any(each.search(key) for each in known)])


def _refuse_keys(problem: str, keys: list[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise Refused(f"the checkpoint {problem}: {shown}; check that its config.json belongs to its weights")


def _draw_missing_head(model, missing, seed: int) -> None:
    """Draw the head parameters that the checkpoint lacked: normal with the config's standard deviation, biases 0.

    A norm's weights are 1. All are drawn on the CPU in float32: the same at any precision, device, method and world
    size. Under ZeRO-3 all ranks take part.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for name, parameter in model.named_parameters():
        if name in missing:
            with _gathered(parameter), torch.no_grad():
                drawn = torch.randn(parameter.shape, generator=generator) * deviation
                if not name.endswith("weight"):
                    drawn = torch.zeros_like(drawn)
                elif drawn.ndim == 1:
                    drawn = torch.ones_like(drawn)
                parameter.copy_(drawn)


def _gathered(parameter):
    """Gather a ZeRO-3 parameter inside the block and keep rank 0's value; do nothing for any other parameter."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
