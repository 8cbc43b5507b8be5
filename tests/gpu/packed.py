"""Try packing: the examples of a micro-batch in one row of fixed length, without padding and without a mask.

transformers hands `cu_seq_lens_q` and `max_length_q` to the attention of zerotune's packed rows, which runs
torch.nn.attention.varlen on a GPU and a block-diagonal reference on a CPU. A dummy example with no weight fills the
row, and empty segments fill `cu_seq_lens_q`, so all shapes are the same at every step and the layers compile once.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from bench import Bench, Setup, attention_of
from library_step import classifier_inputs
from random_models import longest_row
from torch.nn import functional
from training import figures

from zerotune.models.packed import ATTENTION


@dataclass(frozen=True)
class PackedRow:
    """One row of examples, on a device. All sizes except `num_examples` are the same for all rows.

    Attributes:
        input_ids, positions: int64 [1, size]; positions restart at 0 with every example.
        cu: where examples begin, int32 [most examples + 2]; unused ones at the end are empty.
        pooled: the token pooled for each example, int64 [most examples]; arbitrary for missing ones.
        labels: int64 [most examples]; -100 for missing ones.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu: torch.Tensor
    pooled: torch.Tensor
    labels: torch.Tensor
    num_examples: int
    num_tokens: int


def pack(data, rows: np.ndarray, size: int, most: int, device: torch.device) -> PackedRow:
    """Lay out examples in one row of `size` tokens; the rest is a dummy example."""
    lengths = data.lengths[rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    input_ids, positions = np.full(size, 1), np.arange(size) - starts[-1]
    for row, start, length in zip(rows, starts[:-1], lengths, strict=True):
        input_ids[start : start + length] = data.encoded.row(row)
        positions[start : start + length] = np.arange(length)
    cu = np.full(most + 2, size, dtype=np.int32)
    cu[: len(starts)] = starts
    pooled, labels = np.zeros(most, dtype=np.int64), np.full(most, -100)
    pooled[: len(rows)] = starts[1:] - 1
    labels[: len(rows)] = data.labels[rows]
    arrays = (input_ids[None], positions[None], cu, pooled, labels)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return PackedRow(*tensors, num_examples=len(rows), num_tokens=int(starts[-1]))


def fill_rows(data, order: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut examples into runs of at most `size` tokens."""
    runs, start, total = [], 0, 0
    for index, length in enumerate(data.lengths[order]):
        if total + length > size:
            runs.append(order[start:index])
            start, total = index, 0
        total += length
    return [*runs, order[start:]]


def packed_logits(tuned, row: PackedRow, longest: int) -> torch.Tensor:
    """Return the logits [most examples, labels] of a causal SequenceClassifier that reads packed rows."""
    stock, told = tuned.stock_model, {"cu_seq_lens_q": row.cu, "cu_seq_lens_k": row.cu}
    told |= {"max_length_q": longest, "max_length_k": longest}
    hidden = stock.base_model(input_ids=row.input_ids, position_ids=row.positions, use_cache=False, **told)
    return stock.score(hidden.last_hidden_state[0, row.pooled])


def train_packed(bench: Bench, setup: Setup, tokens: int) -> dict:
    """Time optimizer steps of one packed row each through zerotune's engine, and measure how far the packed and padded
    logits are from float32 ones, as shares of their norm."""
    compiled, setup = setup.compiled, replace(setup, compiled=False, fuses=not setup.compiled)
    size, longest = bench.tokens(tokens), 1 << (longest_row(setup.task) - 1).bit_length()
    built = bench.built(setup)
    engine, tuned = built.engine, built.engine.module
    data, steps = bench.rows(setup, built.flops, size, None)
    runs = fill_rows(data, np.concatenate(steps), size)
    runs = runs[:-1] or runs
    most = max(map(len, runs))
    rows = [pack(data, run, size, most, bench.device) for run in runs]

    def take(row: PackedRow) -> torch.Tensor:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            logits = packed_logits(tuned, row, longest)
        loss = functional.cross_entropy(logits.float(), row.labels, reduction="sum") / row.num_examples
        engine.backward(loss, is_last=True)
        engine.update(1.0)
        return engine.take_loss_and_norm()[0]

    found = {} if compiled or setup.shape.method != "full" else _errors(bench, built, data, runs[0], rows[0], longest)
    with attention_of(tuned, ATTENTION):
        if compiled:
            bench.compile_layers(tuned, dynamic=False)
        bench.reset_peak()
        timed = bench.time_steps(take, rows, rows[:3])
        peak = bench.peak_bytes()
        waits = bench.count_waits(lambda: [take(row) for row in rows[:2]])
    if compiled:
        found["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        bench.release()
    return (
        figures(timed, [row.num_tokens for row in rows], most, built.flops)
        | found
        | {
            "attention": "varlen" if bench.device.type == "cuda" else "reference",
            "checkpointing": False,
            "micro_batches": 1,
            "padding": size * len(rows) / sum(row.num_tokens for row in rows),
            "peak_bytes": peak,
            "waits_per_step": None if waits is None else waits / 2,
        }
    )


@torch.no_grad()
def _errors(bench: Bench, built, data, run: np.ndarray, row: PackedRow, longest: int) -> dict:
    """Return the relative errors of bf16 logits, packed and padded, against padded float32."""
    tuned, few = built.engine.module, run[:32]
    tuned.eval()
    inputs = classifier_inputs(replace(data, packs=False), few, bench.device)
    with attention_of(tuned, "sdpa"):
        exact = tuned(**inputs)
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            padded = tuned(**inputs)
    with attention_of(tuned, ATTENTION), torch.autocast(bench.device.type, dtype=torch.bfloat16):
        packed = packed_logits(tuned, row, longest)[: len(few)]
    tuned.train()
    error = lambda logits: float((logits.float() - exact.float()).norm() / exact.float().norm())  # noqa: E731
    return {"packed_logit_error": error(packed), "padded_logit_error": error(padded)}
