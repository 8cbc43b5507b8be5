"""Set up an Accelerator from the launcher's environment, and exchange values between the ranks."""

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from zerotune.errors import BrokenMachine, Refused, first_line
from zerotune.run.build_lock import survive_killed_builds
from zerotune.run.cpu import parent_command, processes_on_node, use_whole_cpu
from zerotune.run.process import is_main_process, say
from zerotune.settings.deepspeed import BUCKET_SIZE, choose_deepspeed_accelerator

# The variable that sets how many seconds a rank waits for the others before it gives up, and its default.
COLLECTIVE_TIMEOUT = "ZEROTUNE_COLLECTIVE_TIMEOUT"
COLLECTIVE_SECONDS = 7200


def on_all_ranks(accelerator, value) -> list:
    """Gather a value of every rank, in rank order, on every rank; all ranks take part."""
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def from_rank_0(accelerator, act: Callable[[], Any]) -> Any:
    """Call act() on rank 0 alone and return its value on every rank; all ranks take part.

    Raises:
        Refused: on all ranks, if the call raises it.
        BrokenMachine: on the other ranks, if the call raises that or OSError, which rank 0 raises.
    """
    found = failure = None
    if is_main_process():
        try:
            found = act()
        except (Refused, OSError) as error:
            failure = error
    is_refusal = isinstance(failure, Refused) and not isinstance(failure, BrokenMachine)
    shared, problem, is_refusal = on_all_ranks(accelerator, (found, failure and str(failure), is_refusal))[0]
    if problem is not None:
        raise failure or (Refused if is_refusal else BrokenMachine)(problem)
    return shared


def use_own_device(tiny_model: bool) -> None:
    """Choose this process's GPU, or without one use the whole CPU. Call it before the first tensor.

    Until a GPU is chosen, all processes of a node use the first one, where each would keep half a GiB for its context.

    Args:
        tiny_model: as for `use_whole_cpu`.
    Raises:
        Refused: this node has more processes than GPUs, and two would share one.
    """
    import torch

    if torch.cuda.is_available():
        launched, seen = processes_on_node(), torch.cuda.device_count()
        if launched > seen:
            raise Refused(
                f"{launched} processes were launched on {platform.node()}, and torch sees {seen} GPUs there: launch "
                f"{seen} (a process can use one MIG slice), or correct CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    else:
        use_whole_cpu(tiny_model)


def device_name(device) -> str:
    """Return the kind of device that a rank computes on, for run.json."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'' if threads == 1 else 's'}"


def start_accelerator(deepspeed_config: dict | None):
    """Join the process group, and check that the processes that were launched see each other.

    Args:
        deepspeed_config: filled in, or None for plain data parallelism.
    Raises:
        Refused: a process does not see the others that were launched, or FSDP was asked for.
        BrokenMachine: not all processes have joined in time.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise Refused(
            "FSDP is not supported: launch with --deepspeed ds_configs/zero3.json, which shards the same things"
        )
    import torch

    choose_deepspeed_accelerator()
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

    buckets = {"bucket_cap_mb": BUCKET_SIZE * 4 // 2**20, "gradient_as_bucket_view": True}
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, **buckets)]
    on_cpu = not torch.cuda.is_available()
    if on_cpu and (line := unseen_gpus_warning(os.environ)):
        say(line)
    if deepspeed_config is not None:
        _find_build_tools()
        survive_killed_builds()
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
    try:
        accelerator = Accelerator(
            mixed_precision="no", cpu=on_cpu and plugin is None, deepspeed_plugin=plugin, kwargs_handlers=handlers
        )
    except torch.distributed.DistError as error:
        raise BrokenMachine(_who_was_waited_for(os.environ, error)) from error
    check_world(accelerator.num_processes, os.environ, parent_command())
    # heads and --precision fp32 rely on exact float32, never TF32, which Accelerate and the environment could set
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return accelerator


def collective_timeout(environment: Mapping[str, str]) -> timedelta:
    """Return how long a rank waits for the others. Raises Refused where the environment gives no number of seconds."""
    wanted = environment.get(COLLECTIVE_TIMEOUT) or str(COLLECTIVE_SECONDS)
    if not wanted.isdecimal() or int(wanted) == 0:
        raise Refused(f"{COLLECTIVE_TIMEOUT} is {wanted!r}, wanted a whole number of seconds, at least 1: correct it")
    return timedelta(seconds=int(wanted))


def unseen_gpus_warning(environment: Mapping[str, str]) -> str | None:
    """Return a warning if SLURM gave this process GPUs and torch sees none of them."""
    given = environment.get("SLURM_GPUS_ON_NODE") or "0"
    if given == "0":
        return None
    return (
        f"WARNING: SLURM gave this job {given} GPUs on {platform.node()} and torch sees none, so it runs on the CPU: "
        "check nvidia-smi there, the modules or container of slurm/hook.sh, and torch's CUDA"
    )


def check_world(num_processes: int, environment: dict, launcher_command: str) -> None:
    """Refuse a launch in which this process does not see the others: each would train alone on all the data.

    Args:
        num_processes: in the process group.
        environment: os.environ.
        launcher_command: command line of the parent process, "" when unknown.
    """
    launched = int(environment.get("WORLD_SIZE", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
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


def _who_was_waited_for(environment: Mapping[str, str], error: Exception) -> str:
    """Return the message of a rank that has not found the others."""
    place = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    seconds = collective_timeout(environment).total_seconds()
    return (
        f"not all {environment.get('WORLD_SIZE', '1')} processes of this run have met at {place} within "
        f"{seconds:.0f} s ({first_line(error)}): see whether the others have started and can reach it; "
        f"{COLLECTIVE_TIMEOUT} sets the seconds"
    )


def _find_build_tools() -> None:
    """Put this Python's folder on the PATH: DeepSpeed compiles an op with ninja, which pip installs there."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _become_own_world_when_alone() -> None:
    """Set up a world of one for `python train/sst2.py --deepspeed FILE` without a launcher, as DeepSpeed needs it."""
    import socket

    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
