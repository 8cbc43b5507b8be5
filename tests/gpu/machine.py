"""Measure the device's own rates, where a step's time goes, and the seconds to save and load a checkpoint."""

import subprocess
import tempfile
import time
from pathlib import Path

import torch
from bench import Bench, Setup
from library_step import load_checkpoint, optimizer_step, save_checkpoint
from random_models import Shape
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "aten::nonzero")
PROFILED_STEPS = 2
SHOWN_KERNELS = 20


def device_rates(bench: Bench) -> dict:
    """Return the best rates of a large bf16 product of random matrices and a large copy, counting reads and writes."""
    size = bench.count(8192, 256)
    left, right = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(bench.count(2**30, 2**20), device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    matmul_s = _fastest(bench, lambda: torch.matmul(left, right))
    copy_s = _fastest(bench, lambda: target.copy_(source))
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "toy": bench.toy,
        "cuda": torch.version.cuda,
        "driver": _driver() if on_gpu else None,
        "matmul_flops": 2 * size**3 / matmul_s,
        "copy_bytes_per_s": 4 * source.numel() / copy_s,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout.strip()


def _fastest(bench: Bench, run) -> float:
    times = []
    for _ in range(23):
        bench.wait()
        started = time.perf_counter()
        run()
        bench.wait()
        times.append(time.perf_counter() - started)
    return min(times[3:])


def profile_steps(bench: Bench, setup: Setup, tokens: int) -> dict:
    """Return the kernels that take the most time in a step, their number, and the host's waits."""
    tokens = bench.tokens(tokens)
    built = bench.built(setup)
    data, steps = bench.rows(setup, built.flops, tokens, None)
    steps = sorted(steps, key=data.num_tokens)
    middle = steps[(len(steps) - PROFILED_STEPS) // 2 :][:PROFILED_STEPS]
    for step in middle:
        optimizer_step(built.engine, data, step, tokens)
    bench.wait()
    started = time.perf_counter()
    for step in middle:
        optimizer_step(built.engine, data, step, tokens)
    bench.wait()
    seconds = (time.perf_counter() - started) / len(middle)
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiled:
        for step in middle:
            optimizer_step(built.engine, data, step, tokens)
        bench.wait()
    events = profiled.key_averages()
    kernels = [one for one in events if not _is_range(one) and (one.device_type == DeviceType.CUDA or not on_gpu)]
    micros = lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total  # noqa: E731
    kernels.sort(key=micros, reverse=True)
    busy_s = sum(map(micros, kernels)) / 1e6 / len(middle)
    return {
        "step_s": seconds,
        "kernel_s": busy_s,
        "busy": busy_s / seconds,
        "kernels_per_step": sum(event.count for event in kernels) / len(middle),
        "waits_per_step": {
            event.key: event.count / len(middle) for event in events if event.key in WAITING_CALLS and event.count
        },
        "top": [
            {"kernel": event.key[:100], "calls": event.count / len(middle), "ms": micros(event) / 1e3 / len(middle)}
            for event in kernels[:SHOWN_KERNELS]
        ],
    }


def _is_range(event) -> bool:
    """Return whether an event is an annotation, which spans other events."""
    return bool(event.is_user_annotation) or event.key.startswith(("Optimizer.step#", "ProfilerStep"))


def save_and_load(bench: Bench, shape: Shape, num_layers: int) -> dict:
    """Time saving a checkpoint (write, sync, hash) and loading it (hash, read), with some of the shape's layers."""
    small = Shape(shape.name, shape.method, shape.sizes | {"num_hidden_layers": num_layers})
    setup = Setup(small, "sst2")
    built = bench.built(setup)
    data, steps = bench.rows(setup, built.flops, bench.tokens(8192), None)
    optimizer_step(built.engine, data, steps[0], bench.tokens(8192))
    with tempfile.TemporaryDirectory() as folder:
        bench.wait()
        started = time.perf_counter()
        saved = save_checkpoint(built.engine, Path(folder))
        saved_s = time.perf_counter() - started
        num_bytes = sum(path.stat().st_size for path in saved.iterdir())
        started = time.perf_counter()
        load_checkpoint(built.engine, saved)
        bench.wait()
        loaded_s = time.perf_counter() - started
    bench.release()
    return {
        "bytes": num_bytes,
        "save_s": saved_s,
        "load_s": loaded_s,
        "save_bytes_per_s": num_bytes / saved_s,
        "load_bytes_per_s": num_bytes / loaded_s,
    }
