"""The common parts of the measurements: the device, sizes, an engine that the next one may reuse, clocks, counters."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from library_step import build_engine, planned_bytes, useful_flops, weight_counts
from random_models import (
    Shape,
    longest_row,
    random_language_model,
    random_lengths,
    random_model,
    random_rows,
    settings_for,
    used_ids,
)

from zerotune.models.fused import use_fused_passes
from zerotune.models.packed import packs_rows, use_packed_attention

PEAK_FLOPS = 989e12  # bf16 without sparsity, NVIDIA's data sheet of H100 and H200 SXM
ASSUMED_UTILISATION = 0.3  # to estimate how many steps fill the time
USABLE_MEMORY = 0.92  # the share of the device's memory that the plan may fill
MAX_STEPS, MIN_STEPS, MAX_ROWS = 60, 3, 10_000


class Skipped(Exception):
    """A measurement cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Setup:
    """The settings from which an engine is built.

    Attributes:
        task: the source of its rows, which decides the embedding rows that are used.
        checkpointing: whether activations are recomputed; None: only if they do not fit otherwise (`Bench.settle`).
        generates: whether it has the LM head instead of a classifier's.
        deepspeed: a file of ds_configs/.
        fuses: whether passes are fused on a GPU, as with --compile auto.
        compiled: whether layers are compiled whole.
    """

    shape: Shape
    task: str
    attention: str = "auto"
    checkpointing: bool | None = False
    generates: bool = False
    deepspeed: Path | None = None
    fuses: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class Built:
    """An engine with facts about its model.

    Attributes:
        counts: from library_step.weight_counts.
        flops: useful floating-point operations for a real token.
        passes: names of the fused passes, or why there are none.
    """

    engine: object
    settings: object
    config: object
    counts: dict
    flops: int
    passes: str


@dataclass(frozen=True)
class Timed:
    """The result of timing some steps: seconds, number of steps, the last one's loss."""

    seconds: float
    num_steps: int
    loss: float


class Bench:
    """One process on one device. Without CUDA the sizes are a toy's: they show that it works and measure nothing."""

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.toy = self.device.type == "cpu"
        self.limit_s = 0.1 if self.toy else 2.5  # seconds of stepping per measurement
        self._key, self._built, self._compiled = None, None, False

    def tokens(self, real: int) -> int:
        """Scale a number of tokens: a toy gets a fraction, but no less than the longest row."""
        return max(512, real // 32) if self.toy else real

    def count(self, real: int, toy: int) -> int:
        """Choose between the real size and the toy's, where no common scale fits."""
        return toy if self.toy else real

    def settle(self, setup: Setup, tokens: int) -> Setup:
        """Return the setup, with activation checkpointing if micro-batches of `tokens` tokens need it."""
        if setup.checkpointing is not None:
            return setup
        config = setup.shape.config(self.toy)
        settings = settings_for(setup.shape, "bf16", attention=setup.attention)
        used = used_ids(setup.task, config.vocab_size)
        needed = planned_bytes(config, settings, tokens, longest_row(setup.task), used)
        usable = float("inf") if self.toy else USABLE_MEMORY * torch.cuda.mem_get_info()[1]
        return replace(setup, checkpointing=needed > usable)

    def built(self, setup: Setup) -> Built:
        """Return the engine of a setup; it is kept until another one is needed."""
        key = setup if setup.shape.method == "full" else replace(setup, task="any")
        if key != self._key:
            self.release()
            self._built = self._build(setup)
            self._key = key
        return self._built

    def _build(self, setup: Setup) -> Built:
        torch.manual_seed(0)
        config = setup.shape.config(self.toy)
        settings = settings_for(
            setup.shape,
            "bf16",
            attention=setup.attention,
            activation_checkpointing=setup.checkpointing,
            zero_stage=None if setup.deepspeed is None else 2,
            compile="auto" if setup.fuses and not setup.compiled else "none",
        )
        make = random_language_model if setup.generates else random_model
        model = make(config, settings, self.device)
        counts = weight_counts(model)
        if packs_rows(settings, config, trains=True) and not setup.generates:
            use_packed_attention(model)
        passes, problem = use_fused_passes(model, settings, self.device)
        ids = None if setup.generates else used_ids(setup.task, config.vocab_size)
        engine = build_engine(model, settings, ids, setup.deepspeed)
        if setup.compiled:
            self.compile_layers(engine.module, dynamic=True)
        return Built(engine, settings, config, counts, useful_flops(counts), problem or ", ".join(passes))

    def compile_layers(self, tuned, dynamic: bool) -> None:
        """Compile each layer in place with torch.compile; layers share one compilation. A toy's are only traced."""
        self._compiled = True
        for layer in layers_of(tuned):
            layer.compile(dynamic=dynamic, backend="aot_eager" if self.toy else "inductor")

    def release(self) -> None:
        """Drop the engine and free its memory."""
        self._key = self._built = None
        if self._compiled:
            torch.compiler.reset()
            self._compiled = False
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows(self, setup: Setup, flops: int, tokens: int, batch_size: int | None) -> tuple[object, list[np.ndarray]]:
        """Make labelled rows, and one epoch's steps over them: about `tokens` tokens each, enough to fill the time."""
        mean = random_lengths(setup.task, 10_000, np.random.default_rng(0)).mean()
        batch_size = min(batch_size or MAX_ROWS, max(1, round(tokens / mean)))
        per_step = flops * mean * batch_size
        num_steps = 4 if self.toy else int(self.limit_s * ASSUMED_UTILISATION * PEAK_FLOPS / per_step)
        num_steps = min(MAX_STEPS, max(MIN_STEPS, num_steps))
        config = setup.shape.config(self.toy)
        data = random_rows(num_steps * batch_size, config.vocab_size, 0, setup.task)
        settings = settings_for(setup.shape, "bf16", attention=setup.attention)
        data = replace(data, packs=packs_rows(settings, config, trains=True))
        return data, data.epoch_steps(batch_size, 0, 0)

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_steps(self, take: Callable[[object], torch.Tensor], steps: list, warm_up: list) -> Timed:
        """Time `take(step)` -> loss over some steps after the warm-up; stops early at twice the time limit."""
        for step in warm_up:
            take(step)
        self.wait()
        started, previous, num_steps = time.perf_counter(), None, 0
        for step in steps:
            loss = take(step)
            num_steps += 1
            if self.device.type == "cuda":  # the training loop also reads a loss one step late
                if previous is not None:
                    previous.synchronize()
                previous = torch.cuda.Event()
                previous.record()
            if time.perf_counter() - started > 2 * self.limit_s:
                break
        self.wait()
        return Timed(time.perf_counter() - started, num_steps, float(loss))

    def reset_peak(self) -> None:
        """Start measuring peak memory from here."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Return the peak memory of tensors since `reset_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def count_waits(self, run: Callable[[], object]) -> int | None:
        """Count how often the host waits for the GPU in `run`, by PyTorch's debug mode; None on a CPU."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def layers_of(tuned) -> torch.nn.ModuleList:
    """Return the decoder's or encoder's layers of a tuned model."""
    backbone = tuned.stock_model.base_model
    return backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer


@contextmanager
def attention_of(tuned, name: str) -> Iterator[None]:
    """Switch to another of transformers' attention implementations inside the block."""
    configs = {id(m.config): m.config for m in tuned.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old
