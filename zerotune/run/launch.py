"""From the launcher's environment to an Accelerator: the DeepSpeed configuration, and who sees whom."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from zerotune.errors import Refused
from zerotune.run.cpu import parent_command
from zerotune.run.process import is_main_process

# DeepSpeed's counts of its own: zerotune/training/batches.py cuts the steps, so that they only have to be consistent.
FIXED_DEEPSPEED_KEYS = {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
# How long a rank waits for the others before it gives up: seconds in COLLECTIVE_TIMEOUT, else this.
COLLECTIVE_TIMEOUT = "ZEROTUNE_COLLECTIVE_TIMEOUT"
COLLECTIVE_SECONDS = 7200
DEEPSPEED_SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast")


def read_deepspeed_config(path: Path | None) -> dict | None:
    """The DeepSpeed configuration of --deepspeed, else of `accelerate launch --use_deepspeed`, else None.

    Raises:
        Refused: the file is missing, is not JSON, or is not a configuration.
    """
    if path is not None:
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise Refused(f"--deepspeed: no such file: {path} (the shipped ones lie in ds_configs/)") from None
        except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
            raise Refused(f"--deepspeed: {path} is not JSON: {error}") from None
        _check_sections(config, path)
        return config
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if "ACCELERATE_CONFIG_DS_FIELDS" in os.environ and "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        return read_deepspeed_config(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
    _choose_deepspeed_accelerator()
    from accelerate import DeepSpeedPlugin

    config = dict(DeepSpeedPlugin().deepspeed_config)
    config.pop("steps_per_print", None)
    return config


def _check_sections(config, path: Path) -> None:
    sections = [config] + [config.get(name, {}) for name in DEEPSPEED_SECTIONS if isinstance(config, dict)]
    if not all(isinstance(section, dict) for section in sections):
        raise Refused(
            f"--deepspeed: {path} is no DeepSpeed configuration: it and its sections "
            f"{', '.join(DEEPSPEED_SECTIONS)} are JSON objects; take one of ds_configs/ as a pattern"
        )
    for name in ("bf16", "fp16", "torch_autocast"):
        enabled = config.get(name, {}).get("enabled", "auto")
        if not (isinstance(enabled, bool) or enabled == "auto"):
            raise Refused(f'--deepspeed: {name}.enabled of {path} is {enabled!r}: wanted true, false or "auto"')
    for key in ("offload_optimizer", "offload_param"):
        offload = config.get("zero_optimization", {}).get(key)
        if not isinstance(offload, dict | None):
            raise Refused(f'--deepspeed: {key} of {path} is {offload!r}: wanted {{"device": "cpu"}}')


def fill_deepspeed_config(config: dict, args, precision: str) -> dict:
    """Fill in what is "auto" or missing; refuse numbers that disagree with the flags.

    bf16 becomes `torch_autocast` over float32 parameters, for DeepSpeed's own bf16 section casts the head to bf16.

    Raises:
        Refused: a batch, clipping, optimizer or scheduler key contradicts the flags, or there is no ZeRO in it.
    """
    _check_deepspeed_config(config, args)
    config = json.loads(json.dumps(config))
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    zero = config["zero_optimization"]
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # DeepSpeed's own default
    _check_zero_section(zero)
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    narrow = {"enabled": precision == "bf16", "dtype": "bfloat16"}
    return {
        **config,
        **FIXED_DEEPSPEED_KEYS,
        "train_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
        "gradient_clipping": args.max_grad_norm or 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": narrow,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def _check_deepspeed_config(config: dict, args) -> None:
    cures = {"optimizer": "--optimizer, --learning-rate", "scheduler": "--warmup-ratio, --learning-rate"}
    for section, cure in cures.items():
        if not _is_left_open(config.get(section, "auto")):
            raise Refused(f'the DeepSpeed file has a section "{section}": remove it and use {cure}')
    for key, flag, value in (
        ("train_batch_size", "--batch-size", args.batch_size),
        ("gradient_clipping", "--max-grad-norm", args.max_grad_norm or 0.0),
    ):
        if config.get(key, "auto") not in ("auto", value):
            raise Refused(f"the DeepSpeed file's {key} {config[key]} and {flag} {value} disagree")
    for key, value in FIXED_DEEPSPEED_KEYS.items():
        found = config.get(key, "auto")
        if found not in ("auto", value):
            raise Refused(
                f'the DeepSpeed file\'s {key} is {found}: zerotune cuts a step by --tokens-per-device; write "auto"'
            )
    for key in ("offload_optimizer", "offload_param"):
        if (config.get("zero_optimization", {}).get(key) or {}).get("device") == "nvme":
            raise Refused(f"the DeepSpeed file's {key} goes to nvme, where checkpoints cannot read it: use cpu")
    if not config.get("zero_optimization", {}).get("stage"):
        raise Refused("DeepSpeed without ZeRO (stage 0) is plain data parallelism: leave --deepspeed out")


def _check_zero_section(zero: dict) -> None:
    """Raises Refused for a key or a value that DeepSpeed does not know, which it would say in a traceback."""
    _choose_deepspeed_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise Refused(f"the DeepSpeed file's {where} is {first['input']!r}: {first['msg']}; mend it") from None


def _is_left_open(section) -> bool:
    """Whether a section is "auto", or names our optimizer or schedule and has "auto" in all its places."""
    if not isinstance(section, dict):
        return section in (None, "auto")
    params = section.get("params")
    is_ours = section.get("type") in ("AdamW", "WarmupDecayLR") and isinstance(params, dict) and params
    return bool(is_ours) and all(value == "auto" for value in params.values())


def on_all_ranks(accelerator, value) -> list:
    """A value of every rank, in rank order, on every rank; all ranks take part."""
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def from_rank_0(accelerator, find: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank: file systems may show the ranks different things. All ranks take part."""
    return on_all_ranks(accelerator, find() if is_main_process() else None)[0]


def device_name(device) -> str:
    """What kind of device a rank computes on, for run.json."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def zero_stage(config: dict | None) -> int | None:
    """ZeRO stage of a DeepSpeed configuration, None without one. Raises Refused for a stage that there is not."""
    if config is None:
        return None
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise Refused(f"the DeepSpeed file's zero_optimization stage is {stage!r}: wanted 1, 2 or 3")
    return stage


def start_accelerator(deepspeed_config: dict | None):
    """Join the process group, and check that the processes that were launched see each other.

    Args:
        deepspeed_config: filled in, or None for plain data parallelism.
    Raises:
        Refused: a process is alone though several were launched, or FSDP or another plugin was asked for.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise Refused(
            "FSDP is not supported: launch with --deepspeed ds_configs/zero3.json, which shards the same things"
        )
    import torch

    _choose_deepspeed_accelerator()
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    on_cpu = not torch.cuda.is_available()
    if deepspeed_config is not None:
        _find_build_tools()
        _become_own_world_when_alone()
    if deepspeed_config is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # rank 0 writes and hashes final/ and plain checkpoints while the others wait; without a backend, DeepSpeed on
        # CPU gives every process "rank 0 of 1"
        backend = {"backend": "gloo"} if on_cpu else {}
        handlers.append(InitProcessGroupKwargs(timeout=collective_timeout(os.environ), **backend))
    plugin = None
    if deepspeed_config is not None:
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config)
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    accelerator = Accelerator(
        mixed_precision="no", cpu=on_cpu and plugin is None, deepspeed_plugin=plugin, kwargs_handlers=handlers
    )
    check_world(accelerator.num_processes, os.environ, parent_command())
    return accelerator


def collective_timeout(environment: Mapping[str, str]) -> timedelta:
    """How long a rank waits for the others. Raises Refused where the environment's wish is no number of seconds."""
    wanted = environment.get(COLLECTIVE_TIMEOUT) or str(COLLECTIVE_SECONDS)
    if not wanted.isdecimal() or int(wanted) == 0:
        raise Refused(f"{COLLECTIVE_TIMEOUT} is {wanted!r}: a whole number of seconds, at least 1, is wanted")
    return timedelta(seconds=int(wanted))


def check_world(num_processes: int, environment: dict, launcher_command: str) -> None:
    """Refuse a launch in which this process does not see the others: each would train alone on all the data.

    Args:
        num_processes: what the process group says.
        environment: os.environ.
        launcher_command: command line of the parent process, "" when unknown.
    """
    launched = int(environment.get("WORLD_SIZE", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    wanted = re.search(r"launch\b.*--num[_-]processes[ =](\d+)", launcher_command)
    if launched != num_processes:
        raise Refused(
            f"{launched} processes were launched and this one sees {num_processes}: check backend and rendezvous"
        )
    if num_processes == 1 and "WORLD_SIZE" not in environment and tasks > 1:
        raise Refused(
            f"srun started {tasks} tasks and each is alone: start one accelerate launch or torchrun on each node"
        )
    if wanted and int(wanted[1]) != num_processes:
        raise Refused(
            f"accelerate launch was asked for {wanted[1]} processes and started {num_processes}: on a CPU use "
            f"torchrun --nproc_per_node {wanted[1]}, or add --use_deepspeed"
        )


def _choose_deepspeed_accelerator() -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _find_build_tools() -> None:
    """DeepSpeed compiles an op with ninja, which pip puts beside this Python, not on every PATH."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _become_own_world_when_alone() -> None:
    """`python train/sst2.py --deepspeed FILE` without a launcher is a world of one; DeepSpeed needs to be told."""
    import socket

    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
