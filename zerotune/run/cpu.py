"""Making the most of a CPU: its cores and its memory."""

import ctypes
import functools
import os
import platform
import re
import time
from pathlib import Path

# mallopt's numbers in glibc's malloc.h
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 1, -1, -3
# oneDNN caches a kernel for each shape, 1,024 by default, and compiles one that is not cached (0.5 ms). For a large
# model that time is negligible, while 512 of its kernels took 300 MiB.
KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KERNELS_KEPT, KERNELS_KEPT_BY_LARGE_MODELS = "512", "48"
LARGE_MODEL = 100_000_000  # weights
# A process above this share of the memory limit returns unused memory after each batch. A smaller one does so once in
# SECONDS_BETWEEN_RETURNS, if it is above LARGE_PROCESS_BYTES.
LARGEST_SHARE = 0.25
LARGE_PROCESS_BYTES = 2**30
SECONDS_BETWEEN_RETURNS = 60
_next_return = 0.0


def use_whole_cpu(tiny_model: bool) -> None:
    """Use all cores of a CPU and keep memory from step to step. Call before the first large tensor.

    `accelerate launch` exports OMP_NUM_THREADS=1 on its own, which does not mean that the user wants it. glibc returns
    large blocks to the kernel and faults them in again at every step: keeping them made training of a small encoder
    1.3 × as fast.

    Args:
        tiny_model: use one thread. A second one gains nothing, and if other processes want its core, every small
            operation waits for it (steps were 4.5 times slower beside other work).
    """
    import torch

    os.environ.setdefault(KERNEL_CACHE, KERNELS_KEPT)
    if tiny_model and not threads_were_asked_for():
        torch.set_num_threads(1)
    else:
        use_own_cores()
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MXFAST, 0)  # else freeing a large block first merges all small free ones


def keep_kernels_for(num_weights: int) -> None:
    """Let a large model keep fewer kernels, unless the user has set how many. Call before the first product."""
    if num_weights >= LARGE_MODEL and os.environ.get(KERNEL_CACHE) == KERNELS_KEPT:
        os.environ[KERNEL_CACHE] = KERNELS_KEPT_BY_LARGE_MODELS


def processes_on_node() -> int:
    """Return how many processes of this run the launcher has started on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_own_cores() -> None:
    """Let torch use this process's share of the node's cores, unless the user has set OMP_NUM_THREADS."""
    import torch

    if not threads_were_asked_for():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes_on_node()))


def give_back_memory(at_once: bool = False) -> None:
    """Return freed blocks to the kernel once this process has become large. Call it after each batch on a CPU.

    The memory that `use_whole_cpu` keeps fragments while batches differ in shape: a small encoder that needs 1 GiB of
    blocks was at 5 GiB after 600 steps, and growing. Returning it costs 0.1 s, and needed blocks are faulted in again,
    so this happens once a minute, and after each batch only when memory is short.

    Args:
        at_once: do it now: batches of other shapes follow, or none.
    """
    global _next_return
    libc, pages = _glibc(), Path("/proc/self/statm")
    if libc is None or not pages.exists():
        return
    num_processes = processes_on_node()
    resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    now = time.monotonic()
    is_due = resident > LARGE_PROCESS_BYTES and (at_once or now >= _next_return)
    if is_due or resident > LARGEST_SHARE * memory_limit() / num_processes:
        libc.malloc_trim(0)
        _next_return = now + SECONDS_BETWEEN_RETURNS


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return this process's C library, None if it is not GNU's."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@functools.cache
def memory_limit() -> int:
    """Return the bytes of memory of this machine, or less if one of the job's control groups limits it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _control_groups():
        file = folder / "memory.max"
        if file.exists() and (text := file.read_text().strip()) != "max":
            limits.append(int(text))
    return min(limits)


def free_memory() -> int:
    """Return the bytes of memory left to this machine and the job's control groups; cached files count as free."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")))
    free = [1024 * int(found[1]) if found else memory_limit()]
    for folder in _control_groups():
        limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current")
        cached = re.search(r"^inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
        if limit.isdecimal() and used:
            free.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(0, min(free))


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _control_groups() -> list[Path]:
    """Return the folders of this process's control group and of those around it (cgroup version 2)."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        if line.startswith("0::"):
            group = Path("/sys/fs/cgroup", line.removeprefix("0::/"))
            return [group, *group.parents]
    return []


def threads_were_asked_for() -> bool:
    """Return whether the user set OMP_NUM_THREADS: here and, if there is a launcher, in its environment too."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if not re.search(r"accelerate|torchrun|torch\.distributed", parent_command()):
        return True
    entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in entries)


def parent_command() -> str:
    """Return the command line of the process that started this one, "" if it is unknown."""
    path = Path(f"/proc/{os.getppid()}/cmdline")
    return path.read_bytes().replace(b"\0", b" ").decode(errors="replace") if path.exists() else ""
