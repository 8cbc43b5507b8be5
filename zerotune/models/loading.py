"""From a hub id or a folder to a model ready to train: what is refused, which types it has, which groups train."""

import contextlib
import os
import re
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from zerotune.errors import Refused
from zerotune.models import cpu_kernels
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.heads import (
    SequenceClassifier,
    TunedModel,
    head_module_names,
    is_encoder,
    is_head_parameter,
    make_head_float32,
)
from zerotune.models.lora import add_lora, seeded
from zerotune.models.precision import compute_dtype
from zerotune.models.pretrained import check_labels, read_config

# Never quantised: the heads of every model we support, under every task. transformers matches the beginning or the end
# of a path: "pooler" alone would match nothing in BERT, whose layer is bert.pooler.dense.
_NEVER_QUANTISED = ["score", "classifier", "pre_classifier", "pooler.dense", "qa_outputs", "lm_head"]
_LM_HEAD_KEYS = re.compile(
    r"^lm_head\.|^cls\.|^vocab_(transform|layer_norm|projector)\.|(^|\.)pooler\.|position_ids$|inv_freq$"
)


@dataclass(frozen=True)
class ModelSettings:
    """What decides how a model is loaded. precision is already resolved; zero_stage is DeepSpeed's, None without it.

    drop_unpooled: an encoder's last layer goes on with the pooled token alone, which changes no number.
    """

    name: str
    revision: str | None
    method: str
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    attention: str = "auto"
    precision: str = "fp32"
    activation_checkpointing: bool = False
    zero_stage: int | None = None
    seed: int = 0
    drop_unpooled: bool = True


def check_settings(settings: ModelSettings) -> None:
    """Raises Refused for settings that no model can be trained with, before one is read."""
    if settings.method == "qlora" and settings.zero_stage == 3:
        raise Refused(
            "--method qlora cannot be split by ZeRO-3, and need not be: a 7B model in NF4 fits any GPU; "
            "use --deepspeed ds_configs/qlora.json (ZeRO-2) or leave --deepspeed out"
        )
    check_kernel_precision(settings.attention, settings.precision)
    if os.path.isfile(os.path.join(settings.name, "adapter_config.json")):
        raise Refused(
            f"--model must be a whole model: {settings.name} is an adapter; give the model it was trained from"
        )


def load_classifier(settings: ModelSettings, labels: tuple[str, ...], tokenizer) -> SequenceClassifier:
    """The model of the settings with a float32 head for the labels, on the device that from_pretrained chooses.

    Full tuning has float32 parameters throughout (16-bit compute is the caller's autocast). LoRA has its frozen base in
    the settings' precision, except under ZeRO-3, where all must share one type; QLoRA in NF4. Adapters and head are
    float32. Raises Refused for a model or settings that cannot be trained.
    """
    check_settings(settings)
    model, missing = load_stock_model(settings, labels, tokenizer)
    initialise_head(model, missing, settings.seed)
    if settings.method != "full":
        model = add_lora(model, settings)
    return recompute_activations(SequenceClassifier(model, settings.drop_unpooled), settings)


def recompute_activations(tuned: TunedModel, settings: ModelSettings) -> TunedModel:
    """The same model, with activation checkpointing where the settings ask for it."""
    if settings.activation_checkpointing:
        tuned.stock_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tuned


def load_stock_model(settings: ModelSettings, labels: tuple[str, ...], tokenizer, config=None):
    """A stock sequence-classification model with a float32 head, and the names of the head parameters it lacked.

    `config` replaces the checkpoint's own (an adapter's folder knows the labels, its base does not). Raises Refused.
    """
    config = _classifier_config(config or read_config(settings.name, settings.revision), settings, labels, tokenizer)
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return load_with_head(settings, config, model_class, head_module_names(config))


def load_with_head(settings: ModelSettings, config, model_class, heads: tuple[str, ...], key_mapping=None):
    """A stock model with a float32 head, and the names of the head parameters that the checkpoint lacked.

    Args:
        config: of `tuning_config`.
        heads: paths of the head's modules.
        key_mapping: from_pretrained's, patterns of names in the checkpoint to what they are in the model.
    Raises:
        Refused: no weights can be read, or any but the head's are missing.
    """
    with seeded(settings.seed), _head_read_in_float32(model_class, heads):
        model, info = read_weights(settings, config, model_class, key_mapping)
    check_loaded_keys(model, info["missing_keys"], info["unexpected_keys"])
    make_head_float32(model, heads)
    if model.config._attn_implementation == cpu_kernels.ATTENTION:
        cpu_kernels.use_cheap_dropout(model)
        if settings.method == "full" and settings.zero_stage != 3:
            cpu_kernels.join_projections(model)
    return model, info["missing_keys"]


def read_weights(settings: ModelSettings, config, model_class, key_mapping=None) -> tuple:
    """A stock model with weights of `base_dtype` or in NF4, and from_pretrained's loading info.

    Raises:
        Refused: no weights can be read, or some have other shapes.
    """
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                settings.name,
                revision=settings.revision or "main",
                config=config,
                dtype=base_dtype(settings),
                attn_implementation=attention_kernel(settings.attention, config),
                quantization_config=nf4_config(settings.precision) if settings.method == "qlora" else None,
                ignore_mismatched_sizes=True,  # check_shapes refuses them, in one line
                output_loading_info=True,
                key_mapping=key_mapping,
            )
    except (OSError, SafetensorError) as error:
        raise Refused(f"no weights could be read for --model {settings.name}: {str(error).splitlines()[0]}") from error
    check_shapes(settings.name, info["mismatched_keys"])
    keep_nf4_layout(model)
    return model, info


def base_dtype(settings: ModelSettings) -> torch.dtype:
    """The type of everything but head and adapters; in QLoRA, of what is not quantised."""
    keeps_float32 = settings.method == "full" or settings.zero_stage == 3
    return torch.float32 if keeps_float32 else compute_dtype(settings.precision)


def nf4_config(precision: str) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation, the QLoRA paper's setting (Dettmers et al. 2023), heads left out."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(precision),
        llm_int8_skip_modules=_NEVER_QUANTISED,
    )


def keep_nf4_layout(model) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit layer in place at its first evaluation.

    From then on it has rounded scales and no gradient, so that training after an evaluation is wrong without a word,
    and inputs that are no multiple of 64 raise. This keeps the plain path.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _classifier_config(config, settings: ModelSettings, labels, tokenizer):
    check_labels(config, labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.use_cache = False
    return tuning_config(config, settings, tokenizer)


def tuning_config(config, settings: ModelSettings, tokenizer):
    """The config, changed in place, with the tokenizer's pad and without dropout where we have none. Raises Refused."""
    if tokenizer.pad_token_id >= config.vocab_size:
        raise Refused(
            f"the pad token must have an embedding: {tokenizer.pad_token!r} is id {tokenizer.pad_token_id} but "
            f"{settings.name} has {config.vocab_size}; give its tokenizer another pad token"
        )
    config.pad_token_id = tokenizer.pad_token_id
    if settings.method != "full" or not is_encoder(config):
        for key in config.to_dict():
            if key.endswith(("dropout", "dropout_prob")) and isinstance(getattr(config, key), float):
                setattr(config, key, 0.0)
    return config


@contextlib.contextmanager
def _head_read_in_float32(model_class, heads: tuple[str, ...]):
    """A head that the checkpoint has is read in float32 beside a 16-bit or 4-bit base, not rounded on the way."""
    before = model_class._keep_in_fp32_modules_strict
    model_class._keep_in_fp32_modules_strict = set(heads)
    try:
        yield
    finally:
        model_class._keep_in_fp32_modules_strict = before


@contextlib.contextmanager
def quiet_transformers():
    """transformers reports missing and unexpected keys as warnings; check_loaded_keys judges them."""
    verbosity = transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def check_shapes(name: str, mismatched) -> None:
    """Raises Refused where weights have another shape than the config says: (weight, its shape, the config's) each."""
    if not mismatched:
        return
    weight, found, wanted = sorted(mismatched)[0]
    raise Refused(
        f"the weights of {name} do not fit its config.json: {weight} is {list(found)}, wanted {list(wanted)} "
        f"({len(mismatched)} in all); check that the config belongs to the weights"
    )


def check_loaded_keys(model, missing, unexpected) -> None:
    """Missing may be nothing (a trained classifier), the whole head, or the whole head but a pooler that was trained.

    Anything else means that part of the backbone is random. Unexpected keys may only belong to other heads.
    """
    head = {name for name, _ in model.named_parameters() if is_head_parameter(name, model.config)}
    without_pooler = {name for name in head if ".pooler." not in name}
    if set(missing) not in (set(), head, without_pooler):
        names = sorted(set(missing) - head) or sorted(missing)
        raise Refused(_key_message("lacks weights that only a head may lack", names))
    foreign = sorted(key for key in unexpected if not _LM_HEAD_KEYS.search(key))
    if foreign:
        raise Refused(_key_message("has weights that this architecture does not use", foreign))


def _key_message(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"the checkpoint {what}: {shown}; check that its config.json belongs to its weights"


def initialise_head(model, missing, seed: int) -> None:
    """Draws what the checkpoint lacked on the CPU in float32: the same at any precision, device, method and world size.

    Normal with the config's standard deviation, biases 0, as transformers does. Under ZeRO-3 all ranks take part.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for name, parameter in model.named_parameters():
        if name in missing:
            with _gathered(parameter), torch.no_grad():
                drawn = torch.randn(parameter.shape, generator=generator) * deviation
                parameter.copy_(drawn if name.endswith("weight") else torch.zeros_like(drawn))


def _gathered(parameter):
    """A ZeRO-3 parameter whole inside the block, rank 0's value kept; any other parameter as it is."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def parameter_groups(
    tuned: TunedModel, learning_rate: float, head_learning_rate: float | None, weight_decay: float
) -> list[dict]:
    """The trainable parameters for an optimizer, in four groups at most; empty ones are left out.

    Matrices decay; biases and norms (1-d) do not. A classifier's head has its own learning rate.
    """
    groups: dict[str, dict] = {}
    for name, parameter in tuned.model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "head" if is_head_parameter(name, tuned.config) else "backbone"
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        group = groups.setdefault(
            f"{part}, {'decay' if decays else 'no decay'}",
            {
                "params": [],
                "lr": head_learning_rate if part == "head" else learning_rate,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [{"name": name, **groups[name]} for name in sorted(groups)]
