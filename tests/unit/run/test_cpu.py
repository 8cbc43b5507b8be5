"""A process that has become large gives back unused memory."""

import os
from pathlib import Path

import pytest

from zerotune.run import cpu

BLOCK_BYTES, NUM_BLOCKS = 100_000, 2000  # small enough that malloc takes them from its heap


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the kernel's own figures (Linux)")
@pytest.mark.parametrize("change", ["pressure", "asked", "minute"])
def test_freed_blocks_go_back_under_pressure_when_asked_or_once_a_minute(change, monkeypatch):
    now = cpu.time.monotonic()
    monkeypatch.setattr(cpu, "memory_limit", lambda: 2**50)
    monkeypatch.setattr(cpu, "LARGE_PROCESS_BYTES", 0)
    monkeypatch.setattr(cpu, "_next_return", now + 60)
    blocks = [b"x" * BLOCK_BYTES for _ in range(NUM_BLOCKS)]
    kept = blocks[::50]  # each pins what lies below it on the heap
    del blocks
    before = resident_bytes()
    cpu.give_back_memory()
    assert resident_bytes() > before - BLOCK_BYTES * NUM_BLOCKS // 20
    if change == "pressure":
        monkeypatch.setattr(cpu, "memory_limit", lambda: 1)
    if change == "minute":
        monkeypatch.setattr(cpu.time, "monotonic", lambda: now + 61)
    cpu.give_back_memory(at_once=change == "asked")
    assert resident_bytes() < before - BLOCK_BYTES * NUM_BLOCKS // 2
    assert len(kept) == NUM_BLOCKS // 50
    assert cpu._next_return > now + 60  # the next one is a minute away


@pytest.mark.parametrize(
    ("asked", "num_weights", "kept"),
    [(None, 270_000_000, "48"), (None, 22_000_000, "512"), ("300", 270_000_000, "300")],
)
def test_a_large_model_keeps_fewer_kernels_unless_the_user_says(asked, num_weights, kept, monkeypatch):
    monkeypatch.setattr(cpu, "_glibc", lambda: None)
    monkeypatch.setattr(cpu, "use_own_cores", lambda: None)
    monkeypatch.setenv(cpu.KERNEL_CACHE, "")
    del os.environ[cpu.KERNEL_CACHE]
    if asked is not None:
        monkeypatch.setenv(cpu.KERNEL_CACHE, asked)
    cpu.use_whole_cpu(tiny_model=False)
    cpu.keep_kernels_for(num_weights)
    assert os.environ[cpu.KERNEL_CACHE] == kept


@pytest.mark.parametrize(("environment", "threads"), [({}, [4]), ({"OMP_NUM_THREADS": "2"}, [])])
def test_the_ranks_of_a_node_share_its_cores(environment, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (environment | {"LOCAL_WORLD_SIZE": "8"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu, "parent_command", lambda: "bash")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(32))
    set_to = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    cpu.use_own_cores()
    assert set_to == threads


def test_the_limit_of_a_group_around_the_jobs_own_counts(monkeypatch):
    files = {
        "/proc/self/cgroup": "0::/job_7/step_0/task_0\n",
        "/sys/fs/cgroup/job_7/step_0/task_0/memory.max": "max\n",
        "/sys/fs/cgroup/job_7/memory.max": f"{2**20}\n",
    }
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert cpu.memory_limit.__wrapped__() == 2**20


def test_the_jobs_groups_leave_what_they_do_not_use_or_only_cache(monkeypatch):
    files = {
        "/proc/self/cgroup": "0::/job_7/task_0\n",
        "/proc/meminfo": "MemTotal: 900 kB\nMemAvailable:     500 kB\n",
        "/sys/fs/cgroup/job_7/task_0/memory.max": "max\n",
        "/sys/fs/cgroup/job_7/memory.max": f"{400 * 1024}\n",
        "/sys/fs/cgroup/job_7/memory.current": f"{350 * 1024}\n",
        "/sys/fs/cgroup/job_7/memory.stat": f"anon 1\ninactive_file {150 * 1024}\nactive_file 7\n",
    }
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert cpu.free_memory() == 200 * 1024
    del files["/proc/self/cgroup"]
    assert cpu.free_memory() == 500 * 1024


def test_the_limit_is_the_machines_or_the_jobs():
    assert 0 < cpu.free_memory() <= cpu.memory_limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
