"""The DeepSpeed configuration of a run: read, checked against the flags, every "auto" filled in."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from zerotune.errors import Refused, first_line
from zerotune.files import parse_json
from zerotune.records import record_problem
from zerotune.settings.groups import OptimisationSettings

# DeepSpeed's own counts only have to be consistent: zerotune/training/batches.py cuts the steps.
FIXED_DEEPSPEED_KEYS = {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
# Gradients in a bucket if the file does not say: 100 MB in bf16, which should saturate a link between GPUs or nodes.
# ZeRO-1 and 2 have four float32 buckets: 0.75 GiB, against 7.5 GiB at DeepSpeed's default of 500 million.
BUCKET_SIZE = 50_000_000
# The values of --optimizer and --schedule, by DeepSpeed's types, and parameter values that are the same in every run.
OPTIMIZERS = {"AdamW": "adamw"}
SCHEDULES = {"WarmupDecayLR": "linear", "WarmupCosineLR": "cosine", "WarmupLR": "constant"}
OPTIMIZER_PARAMS = {"betas": [0.9, 0.999], "eps": 1e-8, "adam_w_mode": True}
SCHEDULER_PARAMS = {"warmup_min_lr": 0, "warmup_type": "linear"}
Auto = Literal["auto"]


class Bf16(TypedDict, total=False, closed=True):
    """The section bf16; --precision decides, and DeepSpeed's own casts are not used."""

    enabled: bool | Auto


class Fp16(TypedDict, total=False, closed=True):
    """The section fp16; a file that turns it on is refused."""

    enabled: bool | Auto
    auto_cast: bool
    loss_scale: float | Auto
    initial_scale_power: float | Auto
    loss_scale_window: float | Auto
    hysteresis: float | Auto
    min_loss_scale: float | Auto
    consecutive_hysteresis: bool


class Autocast(TypedDict, total=False, closed=True):
    """The section torch_autocast."""

    enabled: bool | Auto
    dtype: Literal["bfloat16", "float16", "torch.bfloat16", "torch.float16"]


class Offload(TypedDict, total=False):
    """The sections offload_optimizer and offload_param: a ratio of 1, into host memory (nvme is refused later)."""

    device: Literal["cpu", "none", "nvme"]
    pin_memory: bool
    ratio: Annotated[float, Ge(1), Le(1)]
    super_offload: Literal[False]  # another process keeps the moments, which checkpoints do not have


class ZeroSection(TypedDict, total=False):
    """Keys of zero_optimization that zerotune relies on; DeepSpeed's own model checks other keys and their types."""

    reduce_bucket_size: Annotated[float, Le(1e10)] | Auto  # this many elements are allocated
    offload_optimizer: Offload | None
    offload_param: Offload | None
    compute_grad_norm: Literal[True]  # every step's norm is logged
    stage3_gather_fp16_weights_on_model_save: bool  # the older name of a key that is always set
    legacy_stage1: Literal[False]
    zenflow: None
    leaf_module: dict[str, Any]
    stage3_module_granularity_threshold: Literal[0]
    # these round weights or gradients, and do not work with autocast
    zero_quantized_weights: Literal[False]
    zero_quantized_nontrainable_weights: Literal[False]
    zero_quantized_gradients: Literal[False]


class DeepSpeedFile(TypedDict, total=False, closed=True):
    """The keys of a DeepSpeed file that zerotune accepts."""

    train_batch_size: int | Auto
    train_micro_batch_size_per_gpu: int | Auto
    gradient_accumulation_steps: int | Auto
    gradient_clipping: float | Auto
    optimizer: dict[str, Any] | Auto | None
    scheduler: dict[str, Any] | Auto | None
    bf16: Bf16
    fp16: Fp16
    torch_autocast: Autocast
    zero_optimization: ZeroSection
    zero_allow_untested_optimizer: bool
    zero_force_ds_cpu_optimizer: bool
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None
    steps_per_print: float | Auto | None
    wall_clock_breakdown: bool
    memory_breakdown: bool
    dump_state: bool


def read_deepspeed_config(path: Path | None) -> dict | None:
    """Return the DeepSpeed configuration of --deepspeed, else of `accelerate launch --use_deepspeed`, else None.

    Raises:
        Refused: the file is missing, is not JSON, or is not a configuration that a run can use.
    """
    if path is not None:
        return _read_file(path)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if "ACCELERATE_CONFIG_DS_FIELDS" in os.environ and "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        return _read_file(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
    choose_deepspeed_accelerator()
    from accelerate import DeepSpeedPlugin

    try:
        config = dict(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, TypeError) as error:
        raise Refused(
            f"DeepSpeed cannot be set up as accelerate launch asks for: {' '.join(str(error).split())}"
        ) from error
    config.pop("steps_per_print", None)
    return config


def _read_file(path: Path) -> dict:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"--deepspeed: no such file: {path} (the shipped ones are in ds_configs/)") from None
    except (OSError, ValueError) as error:
        raise Refused(f"--deepspeed: {path} is not JSON: {error}") from None
    if problem := record_problem(config, DeepSpeedFile):
        raise Refused(
            f"--deepspeed: {path} is not a DeepSpeed configuration that zerotune can use ({problem}): remove that key "
            "or correct it; the files in ds_configs/ are examples"
        )
    return config


def check_deepspeed_config(config: dict, optimisation: OptimisationSettings) -> None:
    """Refuse a configuration whose values contradict the flags, that has no ZeRO stage, or offloads to a disk."""
    for key, flag, value in (
        ("train_batch_size", "--batch-size", optimisation.batch_size),
        ("gradient_clipping", "--max-grad-norm", optimisation.max_grad_norm or 0.0),
    ):
        _check_agreement(key, config.get(key, "auto"), flag, value)
    for key, value in FIXED_DEEPSPEED_KEYS.items():
        found = config.get(key, "auto")
        if found not in ("auto", value):
            raise Refused(
                f'the DeepSpeed file\'s {key} is {found}: zerotune cuts steps by --tokens-per-device; write "auto"'
            )
    rate = ("--learning-rate", optimisation.learning_rate)
    if isinstance(optimizer := config.get("optimizer"), dict):
        _check_type("optimizer", optimizer, OPTIMIZERS, "--optimizer", optimisation.optimizer)
        of_flags = {"lr": rate, "weight_decay": ("--weight-decay", optimisation.weight_decay)}
        _check_params("optimizer", optimizer, of_flags, OPTIMIZER_PARAMS)
    if isinstance(scheduler := config.get("scheduler"), dict):
        _check_type("scheduler", scheduler, SCHEDULES, "--schedule", optimisation.schedule)
        _check_params("scheduler", scheduler, {"warmup_max_lr": rate}, SCHEDULER_PARAMS)
    _check_offload(config.get("zero_optimization", {}))
    if not config.get("zero_optimization", {}).get("stage"):
        raise Refused("DeepSpeed without ZeRO (stage 0) is plain data parallelism: leave --deepspeed out")


def _check_type(name: str, section: dict, types: dict[str, str], flag: str, wanted: str) -> None:
    """Refuse the type of an optimizer or scheduler section; `types` has the flag's value for each known type."""
    found, params = section.get("type"), section.get("params")
    if str(found) in types and isinstance(params, dict) and params and set(map(str, params.values())) == {"auto"}:
        return  # as many tools write it: the flags decide
    if types.get(str(found)) != wanted:
        raise Refused(
            f"the DeepSpeed file's {name} type {found} and {flag} {wanted} disagree: leave the section out, or change "
            "one of them"
        )


def _check_params(name: str, section: dict, of_flags: dict[str, tuple[str, float]], fixed: dict[str, object]) -> None:
    """Refuse parameters of an optimizer or scheduler section that differ from those of the run.

    Args:
        of_flags: the flag and its value, by parameter.
        fixed: parameters that are the same in every run.
    """
    params = section.get("params") or {}
    if not isinstance(params, dict):
        raise Refused(f"the DeepSpeed file's {name} params are {params!r}, wanted a dictionary: correct them")
    for key, value in params.items():
        where = f"{name} {key}"
        if key in of_flags:
            _check_agreement(where, value, *of_flags[key])
        elif value not in ("auto", fixed.get(key, "auto")):
            always = f"zerotune always has {fixed[key]}" if key in fixed else "zerotune derives it from the flags"
            raise Refused(f'the DeepSpeed file\'s {where} is {value}: {always}; write "auto", or leave it out')


def _check_agreement(where: str, found, flag: str, value: float) -> None:
    if found not in ("auto", value):
        raise Refused(
            f'the DeepSpeed file\'s {where} {found} and {flag} {value} disagree: write "auto", or change one of them'
        )


def fill_deepspeed_config(config: dict, max_grad_norm: float | None, precision: str) -> dict:
    """Return a checked configuration with every "auto" and missing value filled in.

    bf16 becomes `torch_autocast` over float32 parameters: DeepSpeed's own bf16 section would cast the head to bf16.

    Raises:
        Refused: DeepSpeed does not know a key or value of zero_optimization.
    """
    config = json.loads(json.dumps(config))
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    zero = config["zero_optimization"]
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # DeepSpeed's default applies, except for buckets
    zero.setdefault("reduce_bucket_size", BUCKET_SIZE)
    zero.pop("stage3_gather_fp16_weights_on_model_save", None)
    _check_zero_section(zero)
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    narrow = {"enabled": precision == "bf16", "dtype": "bfloat16"}
    return {
        **config,
        **FIXED_DEEPSPEED_KEYS,
        "train_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": narrow,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def _check_offload(zero: dict) -> None:
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise Refused(f"the DeepSpeed file's {key} is nvme, which checkpoints cannot read: use cpu")
    for key, section in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
        if zero.get(key):
            raise Refused(f'the DeepSpeed file\'s {key} is deprecated: write "{section}": {{"device": "cpu"}}')


def _check_zero_section(zero: dict) -> None:
    """Refuse keys and values that DeepSpeed does not know, for which it would end with a traceback."""
    choose_deepspeed_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise Refused(f"the DeepSpeed file's {where} is {first['input']!r}: {first['msg']}; correct it") from None
    except (TypeError, AssertionError) as error:
        raise Refused(
            f"the DeepSpeed file's zero_optimization cannot be used ({first_line(error)}): correct it"
        ) from None


def zero_stage(config: dict | None) -> int | None:
    """Return the ZeRO stage of a DeepSpeed configuration, None without one. Raises Refused for an unknown stage."""
    if config is None:
        return None
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise Refused(f"the DeepSpeed file's zero_optimization stage is {stage!r}: wanted 1, 2 or 3")
    return stage


def choose_deepspeed_accelerator() -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
