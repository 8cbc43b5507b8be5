"""A process that has become large gives back what it does not use."""

import os
from pathlib import Path

import pytest

from zerotune import cpu

BLOCK_BYTES, NUM_BLOCKS = 100_000, 2000  # small enough that malloc takes them from its heap


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the kernel's own figures (Linux)")
def test_freed_blocks_go_back_under_pressure_alone(monkeypatch):
    blocks = [b"x" * BLOCK_BYTES for _ in range(NUM_BLOCKS)]
    kept = blocks[::50]  # each pins what lies below it on the heap
    del blocks
    before = resident_bytes()
    monkeypatch.setattr(cpu, "_memory_limit", lambda: 2**50)
    cpu.give_back_memory()
    assert resident_bytes() > before - BLOCK_BYTES * NUM_BLOCKS // 20
    monkeypatch.setattr(cpu, "_memory_limit", lambda: 1)
    cpu.give_back_memory()
    assert resident_bytes() < before - BLOCK_BYTES * NUM_BLOCKS // 2
    assert len(kept) == NUM_BLOCKS // 50


def test_the_limit_is_the_machines_or_the_jobs():
    assert 0 < cpu._memory_limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
