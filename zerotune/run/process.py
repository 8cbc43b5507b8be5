"""A script's process: its rank, its messages, its entries in run.json and its end."""

import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from zerotune.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    BrokenMachine,
    Interrupted,
    Preempted,
    Refused,
)
from zerotune.files import disk_error_number, full_disk_refusal, may_pass, write_json
from zerotune.run.out_of_memory import is_out_of_memory, out_of_memory_refusal
from zerotune.terminal import hide_remarks, make_output_tolerant

RANK_0_SPEAKS = "zerotune: rank 0 speaks"  # a key of the process group's store
SECONDS_FOR_RANK_0 = 3
SECONDS_FOR_A_FIRST_WORD = 2
SECONDS_WITHOUT_A_WORD = 5
_has_spoken = threading.Event()
# Settings of PyTorch's allocator on GPUs: their newer name, their older one, and AMD's.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_Item = TypeVar("_Item")
RECORDED_VERSIONS = (
    "zerotune", "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "tokenizers",
)  # fmt: skip
# Variables that launchers set, and the least value of each.
LAUNCHER_NUMBERS = {
    "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0, "SLURM_RESTART_COUNT": 0,
    "SLURM_STEP_NUM_TASKS": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_GPUS_ON_NODE": 0, "ZEROTUNE_PROCESSES_PER_NODE": 1,
}  # fmt: skip


def check_launcher(environment: Mapping[str, str]) -> None:
    """Refuse launcher variables that are not numbers, or contradict each other, before anything uses them."""
    for name, least in LAUNCHER_NUMBERS.items():
        value = environment.get(name, str(least))
        if value == "" and name.startswith("SLURM_"):
            continue
        if not value.isdecimal() or int(value) < least:
            raise Refused(
                f"{name} is {value!r}, wanted a whole number from {least}: unset it, or let the launcher set it"
            )
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in environment and size in environment and int(environment[rank]) >= int(environment[size]):
            found = f"{rank} {environment[rank]} is not below {size} {environment[size]}"
            raise Refused(f"{found}: let the launcher set both")


def check_names(arguments: Sequence[str]) -> None:
    """Refuse a command or a working folder whose name is not UTF-8: no record could hold it."""
    try:
        for name in (*arguments, os.getcwd()):
            name.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name!a} is not UTF-8: rename the file or folder") from None
    except OSError as error:
        raise Refused(f"the working folder cannot be used ({error.strerror}): change to another one") from None


def started_at() -> float:
    """Return when this process was started, in seconds since the epoch; now, where /proc does not say it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return time.time()


def peak_memory_bytes(device) -> int:
    """Return the most memory that this process has held: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_main_process() -> bool:
    """Return whether this is rank 0, according to the launcher (also before any process group exists)."""
    return os.environ.get("RANK", "0") == "0"


def _tells_the_end() -> bool:
    """Return whether this rank reports how the run ends: rank 0 does, for problems that all ranks have found.

    Before the process group exists, the first rank of each node does. Later another rank does too, if rank 0 has not
    spoken within SECONDS_FOR_RANK_0 and so does not know the problem.
    """
    if not os.environ.get("RANK", "0").isdecimal():
        return True
    if not _in_process_group():
        return is_main_process() or os.environ.get("LOCAL_RANK") == "0"
    distributed = sys.modules["torch"].distributed
    store = distributed.distributed_c10d._get_default_store()
    try:
        if is_main_process():
            store.set(RANK_0_SPEAKS, "")
        else:
            store.wait([RANK_0_SPEAKS], timedelta(seconds=SECONDS_FOR_RANK_0))
    except distributed.DistStoreError:
        return True
    except RuntimeError:
        pass  # the store was rank 0's, which has ended
    return is_main_process()


def say(line: str) -> None:
    """Print on rank 0 only."""
    if is_main_process():
        _has_spoken.set()
        print(line, flush=True)


def say_how_far(
    items: Iterable[_Item], activity: str, unit: str, size: int = 1, total: int | None = None
) -> Iterator[_Item]:
    """Yield the items; say "ACTIVITY: 312,000 UNIT so far" after SECONDS_WITHOUT_A_WORD, then twice that, …

    Args:
        size: units per item.
        total: number of units, if it is known.
    """
    started, wait = time.monotonic(), SECONDS_WITHOUT_A_WORD
    for number, item in enumerate(items):
        if (size > 1 or number % 1000 == 0) and time.monotonic() - started >= wait:
            of_total = f"of {total:,} {unit}" if total is not None else f"{unit} so far"
            say(f"{activity}: {number * size:,} {of_total}")
            wait *= 2
        yield item


def describe_process() -> dict:
    """Return run.json's entries about the command, the versions and the machine."""
    versions = {name: installed_version(name) for name in RECORDED_VERSIONS}
    return {
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()} | versions,
        "git_commit": _git_commit(),
    }


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the checkout's commit, with "-dirty" behind it if tracked files have changed; None outside a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # installed elsewhere, perhaps inside another project's checkout
        return None
    try:
        result = subprocess.run(
            ["git", "-C", checkout, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def _write_state_file(path: Path, reason: str) -> str:
    """Write --state-file. Returns an addition to the refusal's line: "", or why the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"state": "refused", "reason": reason})
    except OSError as error:
        return f" (and --state-file {path} cannot be written: {error.strerror})"
    return ""


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch's allocator on CUDA grow its segments, unless the user has set it. Call before torch is imported.

    Micro-batches differ in shape: segments of fixed sizes fragment, until no tensor fits into the free memory.
    """
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment.update(dict.fromkeys(ALLOCATOR_VARIABLES[:2], "expandable_segments:True"))


def run_script(main, args) -> None:
    """Run a script's main(args) and end the process with one of the documented statuses.

    0: done, 2: refused, 75: preempted and saved, 130: interrupted; anything else is a bug.
    """
    make_output_tolerant()
    hide_remarks()
    let_segments_grow(os.environ)
    threading.Thread(target=_say_what_takes_time, daemon=True).start()
    try:
        check_launcher(os.environ)
        check_names(sys.argv)
        if preset_line := getattr(args, "preset_line", ""):
            say(preset_line)
        main(args)
    except Refused as error:
        _end_process(error.status, _refusal(args, error), sys.stderr)
    except Preempted as error:
        status = EXIT_INTERRUPTED if isinstance(error, Interrupted) else EXIT_PREEMPTED
        _end_process(status, str(error) if is_main_process() else None, sys.stdout)
    except KeyboardInterrupt as error:
        line = f"interrupted{f': {error}' if str(error) else ''}"
        _end_process(EXIT_INTERRUPTED, line if is_main_process() else None, sys.stderr)
    except Exception as error:
        if (refusal := _of_disk_or_memory(error, args)) is not None:
            _end_process(refusal.status, _refusal(args, refusal), sys.stderr)
        if not _in_process_group():
            raise
        traceback.print_exc()
        _end_process(EXIT_BUG)
    else:
        _end_process(0)


def _say_what_takes_time() -> None:
    """Say that the libraries are loading, if a script has said nothing for a while."""
    if not _has_spoken.wait(SECONDS_FOR_A_FIRST_WORD) and is_main_process():
        print("loading the libraries", file=sys.stderr, flush=True)


def _of_disk_or_memory(error: Exception, args) -> Refused | None:
    """Return an error outside of a run folder as that of a disk or of memory; None for a bug."""
    if disk_error_number(error) is not None:
        return Refused(full_disk_refusal(Path(getattr(error, "filename", None) or Path.cwd()), error))
    if may_pass(error):
        return BrokenMachine(f"{error}: start the same command again")
    if is_out_of_memory(error):
        return out_of_memory_refusal(error, getattr(args, "__dict__", {}))  # some scripts have a list of words
    return None


def _refusal(args, error: Refused) -> str | None:
    """Return this rank's line about a refusal, and write it to --state-file; None if another rank reports it.

    A broken machine is no refusal: nothing is written, and a job may try again."""
    line = _of_rank(str(error))
    if isinstance(error, BrokenMachine):
        return f"error: {line}"
    if not _tells_the_end():
        return None
    state_file = getattr(args, "state_file", None)
    return f"refused: {line}" + (_write_state_file(state_file, line) if state_file else "")


def _of_rank(line: str) -> str:
    """Return a message as one line, after the rank and its machine where it is not of rank 0."""
    line = " ".join(line.split())
    return line if is_main_process() else f"rank {os.environ['RANK']} on {platform.node()}: {line}"


def _end_process(status: int, last_line: str | None = None, stream=None) -> None:
    """End this process, after a last line if there is one.

    In a process group it ends at once, without destructors: PyTorch's for a gloo group waits for a thread that may be
    waiting for the GIL, and the rank would hang.
    """
    sys.stdout.flush()  # earlier output comes before the last line
    if last_line:
        print(last_line, file=stream, flush=True)
    if _in_process_group():
        distributed = sys.modules["torch"].distributed
        # all of NCCL's ranks must destroy the group together: a rank that ends by itself would wait forever
        if status in (0, EXIT_PREEMPTED) and distributed.get_backend() == "nccl":
            distributed.destroy_process_group()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _in_process_group() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
