"""Compare the memory that --plan counts with what PyTorch's allocator hands out in real steps on a CPU.

    python tests/benchmarks/plan_memory.py

Models have random weights: published architectures with few layers and smaller sizes. Each takes two steps through
zerotune's engine; torch's profiler records every allocation in a step, on top of the weights and optimizer state held.
"""

import argparse
import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from benchmarking import conditions, markdown_table, write_record
from library_step import build_engine, micro_batch
from random_models import SHAPES, random_model, settings_for
from torch.profiler import ProfilerActivity, profile

from zerotune.run.plan import Sharding, memory_need
from zerotune.tasks.tokens import Encoded
from zerotune.training.classification import LabelledData
from zerotune.training.step_counts import BatchShape, count_step

# Sizes that keep the architecture but make it small. 4-bit methods need widths of at least 64.
SMALL = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
SMALL_ENCODERS = {
    "distilbert": {"vocab_size": 8192, "dim": 256, "hidden_dim": 1024, "n_layers": 6, "n_heads": 8},
    "roberta": SMALL | {"intermediate_size": 1024},
}


@dataclass(frozen=True)
class Case:
    """A shape of random_models.py, made small, and how to train it."""

    shape: str
    method: str
    precision: str
    recomputes: bool = False
    rows: int = 8
    longest: int = 96


CASES = (
    Case("Llama-3.2-1B", "full", "fp32"),
    Case("Llama-3.2-1B", "lora", "bf16"),
    Case("Llama-3.2-1B", "full", "bf16", recomputes=True),
    Case("Gemma-2-2B", "lora", "fp32"),
    Case("Mistral-7B", "qlora", "fp32"),
    Case("RoBERTa-large", "full", "fp32"),
    Case("RoBERTa-large", "lora", "fp32"),
    Case("DistilBERT", "full", "bf16"),
)


def small_config(shape):
    """Return a shape's config with few layers and small sizes."""
    model_type = shape.sizes["model_type"]
    small = SMALL_ENCODERS.get(model_type, SMALL)
    return replace(shape, sizes=shape.sizes | small).config(toy=False)


def compare(case: Case) -> dict:
    """Return {"planned", "measured"} bytes of a case."""
    shape = replace(next(shape for shape in SHAPES if shape.name == case.shape), method=case.method)
    config = small_config(shape)
    settings = settings_for(shape, case.precision, activation_checkpointing=case.recomputes)
    batch = BatchShape(case.rows, case.longest, case.rows * case.longest, is_alone=True)
    counts = count_step(small_config(shape), settings, "classify", 2, batch, on_gpu=False)
    sizes = counts.peaks, counts.table, counts.largest_layer
    need = memory_need(*sizes, settings, "adamw", Sharding(), on_gpu=False)
    return {"planned": need.total, "measured": measured_bytes(case, config, settings)}


def measured_bytes(case: Case, config, settings) -> int:
    """Return the most bytes that the allocator held in two steps of a model, its weights included."""
    ids = torch.randint(3, config.vocab_size, (case.rows * case.longest,), dtype=torch.int32).numpy()
    offsets = torch.arange(0, len(ids) + 1, case.longest).numpy()
    data = LabelledData(
        [str(row) for row in range(case.rows)], Encoded(ids, offsets, 0, None), torch.zeros(case.rows).long().numpy(), 0
    )
    rows = torch.arange(case.rows).numpy()
    model = random_model(config, settings, torch.device("cpu"))
    engine = build_engine(model, settings, torch.arange(config.vocab_size).numpy())
    gc.collect()
    held = sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _tensors(model)}.values()
    )
    peaks = []
    for _ in range(2):
        state = [value for of_one in engine.optimizer.state.values() for value in of_one.values()]
        before = held + sum(value.numel() * value.element_size() for value in state if torch.is_tensor(value))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            loss = micro_batch(engine, data.batch(rows, torch.device("cpu")), len(rows))
            engine.backward(loss, is_last=True)
            del loss
            engine.update(1.0)
            engine.take_loss_and_norm()
        peaks.append(before + _peak_growth(prof))
    return peaks[-1]  # the first step also creates the optimizer's moments


def _tensors(model):
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():  # also the scales of 4-bit weights
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, *([state.state2.absmax] if state.nested else []))


def _peak_growth(prof) -> int:
    """Return the most bytes by which the allocator's total rose above its start."""
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


COLUMNS = {
    "model": lambda row: row["shape"],
    "method": lambda row: row["method"] + (", recomputed" if row["recomputes"] else ""),
    "precision": lambda row: row["precision"],
    "planned MiB": lambda row: f"{row['planned'] / 2**20:.1f}",
    "measured MiB": lambda row: f"{row['measured'] / 2**20:.1f}",
    "planned / measured": lambda row: f"{row['planned'] / row['measured']:.3f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [vars(case) | compare(case) for case in CASES]
    print(markdown_table(rows, COLUMNS))
    write_record(args.json, {"conditions": conditions(1), "rows": rows})


if __name__ == "__main__":
    main()
