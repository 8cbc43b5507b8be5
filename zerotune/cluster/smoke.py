"""Checks of a site's devices, network, disks and cache by all ranks of a job; slurm/smoke.sh launches them.

    accelerate launch --module zerotune.cluster.smoke CHECKED

Prints one line per check: "pass", or "FAIL" and how to fix it. Status 1 if one failed; the file CHECKED shows
that all checks were made.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from zerotune.cluster import prefetch
from zerotune.errors import EXIT_BUG, Refused
from zerotune.run import launch
from zerotune.run.process import installed_version, is_main_process, run_script, say

# Large enough that the network's bandwidth counts, not its latency; gloo over Ethernet moves it in a second.
GPU_MIB, CPU_MIB = 256, 16
ROUNDS = 5
# Of a run folder with a few checkpoints of a small model.
LEAST_FREE_GIB = 5


@dataclass(frozen=True)
class Finding:
    """The result of a check: `text` describes the finding, `cure` says how to repair it, None where all is well."""

    check: str
    text: str
    cure: str | None = None

    def line(self) -> str:
        """Return the line to print."""
        verdict = "pass" if self.cure is None else "FAIL"
        return f"{verdict}  {self.check}: {self.text}" + (f"; {self.cure}" if self.cure else "")


def _counted(values: list[str]) -> str:
    return ", ".join(f"{count} × {value}" for value, count in Counter(values).items())


def check_devices(accelerator) -> Finding:
    """Check the device of each rank; it is a failure if SLURM gave a GPU that torch does not see."""
    device = accelerator.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        mine = f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB"
    else:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        mine = f"CPU ({len(os.sched_getaffinity(0))} cores, {pages / 2**30:.0f} GiB)"
    unseen = device.type != "cuda" and launch.unseen_gpus_warning(os.environ) is not None
    found = launch.on_all_ranks(accelerator, (mine, platform.node() if unseen else None))
    blind = sorted({node for _, node in found if node})
    cure = None
    if blind:
        cure = (
            f"SLURM gave GPUs on {', '.join(blind)} and torch {torch.__version__} sees none: load the driver's module "
            "in slurm/hook.sh, install a torch built for its CUDA, or ask for no GPUs"
        )
    return Finding("devices", _counted([text for text, _ in found]), cure)


def check_bf16(accelerator) -> Finding:
    """Check that a product of matrices in bf16 is right."""
    ones = torch.ones(64, 64, device=accelerator.device, dtype=torch.bfloat16)
    right = bool((ones @ ones == 64).all())
    has = accelerator.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    well = all(launch.on_all_ranks(accelerator, right and has))
    cure = None if well else "launch with --precision fp16 (GPUs before Ampere lack bf16) or fp32"
    return Finding("bf16", "computes" if well else "this device lacks it", cure)


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else None


def toolkit() -> str | None:
    """Return the version of the CUDA toolkit on the PATH, with which DeepSpeed and flash-attn compile, or None."""
    if shutil.which("nvcc") is None:
        return None
    found = re.search(r"release (\S+),", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    return found and found.group(1)


def check_versions(accelerator) -> Finding:
    """Check that driver, toolkit and libraries are the same on all nodes."""
    names = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
    mine = [
        f"driver {_driver() or 'none'}",
        f"CUDA of torch {torch.version.cuda or 'none'}",
        f"toolkit {toolkit() or 'none'}",
        f"python {platform.python_version()}",
    ]
    mine += [f"{name} {installed_version(name)}" for name in names]
    mine.append(f"flash-attn {installed_version('flash-attn') or 'not installed (sdpa is used)'}")
    found = launch.on_all_ranks(accelerator, mine)
    differing = sorted({one for rank in found for one in rank} ^ set(found[0]))
    cure = f"the nodes differ ({', '.join(differing)}): use one environment on the shared disk" if differing else None
    return Finding("versions", ", ".join(found[0]), cure)


def check_all_reduce(accelerator) -> Finding:
    """Check that a sum includes all ranks, and measure its speed (bus bandwidth as NCCL's tests count it)."""
    world, device = accelerator.num_processes, accelerator.device
    if world == 1:
        return Finding("all-reduce", "1 rank: nothing to reduce")
    size = (GPU_MIB if device.type == "cuda" else CPU_MIB) * 2**20
    values = torch.full((size // 4,), 1.0, device=device)
    torch.distributed.all_reduce(values)
    right = bool((values == world).all())
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        torch.distributed.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / ROUNDS
    rate = 2 * (world - 1) / world * size / seconds / 1e9
    backend = torch.distributed.get_backend()
    text = (
        f"{world} ranks on {os.environ.get('SLURM_JOB_NUM_NODES', '1')} nodes, {backend}, {rate:.2f} GB/s bus bandwidth"
    )
    cure = None if right else "the sum is wrong: report the node to the site's staff"
    return Finding("all-reduce", text, cure)


def _write_rename_lock(folder: Path, name: str) -> str | None:
    """Write, rename, measure and lock a file. Returns the file system's problem, None if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside, target = folder / f".{name}.new", folder / name
        aside.write_bytes(b"smoke" * 200_000)
        aside.replace(target)
        if target.stat().st_size != 1_000_000:
            return "a file is not what was written"
        with target.open("r+b") as first, target.open("r+b") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return "a second lock on a file is granted"
            except BlockingIOError:
                return None
            finally:
                target.unlink()
    except OSError as error:
        return f"{error.strerror}: {error.filename or folder}"


def check_shared_disk(accelerator, folder: Path) -> Finding:
    """Check that all ranks see rank 0's files, and that its lock also holds on other nodes."""
    path = folder / ".smoke-shared"
    problem, held = None, None
    if is_main_process():
        problem = _write_rename_lock(folder, ".smoke-rank-0")
        if problem is None:
            path.write_text("locked")
            held = path.open("r+")
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    accelerator.wait_for_everyone()
    if not is_main_process():
        problem = _see_lock(path)
    problems = launch.on_all_ranks(accelerator, (platform.node(), problem))
    if held is not None:
        held.close()
        path.unlink()
    bad = sorted({f"{node}: {text}" for node, text in problems if text})
    free = shutil.disk_usage(folder).free / 2**30 if folder.exists() else 0.0
    text = f"{folder.resolve()}, {free:,.0f} GiB free" + (f", {'; '.join(bad)}" if bad else "")
    cure = None
    if bad:
        cure = (
            "put the checkout on a disk that all nodes share; mount Lustre with -o flock, or never start two jobs on "
            "one run folder"
        )
    elif free < LEAST_FREE_GIB:
        cure = f"a run needs room for its checkpoints, at least {LEAST_FREE_GIB} GiB: free some or move the checkout"
    return Finding("shared disk", text, cure)


def _see_lock(path: Path) -> str | None:
    give_up = time.monotonic() + 30  # attributes of a network file system may be a few seconds old
    while not path.exists():
        if time.monotonic() > give_up:
            return f"does not see {path}, which rank 0 has written"
        time.sleep(0.2)
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "the lock of rank 0 is not seen"
    except BlockingIOError:
        return None
    except OSError as error:
        return f"cannot lock: {error.strerror}"


def check_scratch(accelerator, folder: Path) -> Finding:
    """Check that each node can write its own scratch file system."""
    problem = _write_rename_lock(folder, f".smoke-rank-{accelerator.process_index}")
    free = shutil.disk_usage(folder).free / 2**30 if problem is None else 0.0
    found = launch.on_all_ranks(accelerator, (platform.node(), problem, free))
    bad = sorted({f"{node}: {text}" for node, text, _ in found if text})
    text = f"{folder}, {min(free for _, _, free in found):,.0f} GiB free" + (f", {'; '.join(bad)}" if bad else "")
    return Finding("scratch", text, "name a writable folder by ZEROTUNE_SCRATCH in slurm/site.env" if bad else None)


def check_cache(accelerator) -> Finding:
    """Check that all fetched items are there; only the sizes of files are checked, not their hashes."""
    try:
        items = prefetch.listed_items()
        missing = prefetch.missing_items(items)
        problem = "; ".join(f"{item}: {why}" for item, why in missing.items())
        mine = (len(items), problem, " ".join(item.flag for item in missing))
    except Refused as error:
        mine = (0, str(error), "--verify")
    found = launch.on_all_ranks(accelerator, mine)
    bad = sorted({text for _, text, _ in found if text})
    cures = sorted({flags for _, text, flags in found if text})
    offline = "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online"
    text = f"{offline}, {found[0][0]} items in {prefetch.cache_root()}" + (f", {'; '.join(bad)}" if bad else "")
    if not bad:
        return Finding("cache", text, None)
    if any(not problem for _, problem, _ in found):  # other nodes have everything
        return Finding("cache", text, "HF_HOME is not on a disk that all nodes share: name one in slurm/site.env")
    return Finding("cache", text, f"on the login node: bash slurm/prefetch.sh {cures[0]}")


def main(checked: Path) -> None:
    """Run all checks in order; rank 0 prints, and creates the file `checked` at the end."""
    accelerator = launch.start_accelerator(None)
    scratch = Path(os.environ.get("ZEROTUNE_SCRATCH") or os.environ.get("TMPDIR") or "/tmp")
    checks = [
        lambda: check_devices(accelerator),
        lambda: check_bf16(accelerator),
        lambda: check_versions(accelerator),
        lambda: check_all_reduce(accelerator),
        lambda: check_shared_disk(accelerator, Path("runs/slurm")),
        lambda: check_scratch(accelerator, scratch),
        lambda: check_cache(accelerator),
    ]
    num_failed = 0
    for check in checks:
        finding = check()
        num_failed += finding.cure is not None
        say(finding.line())
    if is_main_process():
        checked.touch()
    if num_failed:
        sys.stdout.flush()
        os._exit(EXIT_BUG)  # as run_script ends a process in a group, without a traceback


if __name__ == "__main__":
    run_script(main, Path(sys.argv[1]))
