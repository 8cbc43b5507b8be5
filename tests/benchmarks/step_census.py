"""Count what a training step at real shapes asks of a GPU, on fake tensors: no GPU, no weights, no download.

    python tests/benchmarks/step_census.py
    python tests/benchmarks/step_census.py --only mistral-qlora --steps imdb:57 --top 12 --json census.json

A step goes through zerotune's own batches, model, engine and optimizer, on tensors that have shapes and types but no
numbers. Every operation that would launch kernels is counted, with the bytes that it reads and writes and its
floating-point operations. Times are predicted from the rates below, not measured.

The fake tensors are those of zerotune/models/fake.py: they are on the CPU but take the paths that CUDA takes. A fused
pass (zerotune/models/fused.py) counts as one kernel that reads each input and writes each output once; we assume that
the compiler makes such a kernel. Fake tensors have no numbers to read, so host reads are counted on real ones: a toy
with as many layers, on rows of the same lengths.
"""

import argparse
import math
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from benchmarking import conditions, markdown_table, write_record
from library_step import build_engine, micro_batch, prompt_data, useful_flops, weight_counts
from random_models import (
    SHAPES,
    Shape,
    longest_row,
    random_language_model,
    random_model,
    random_rows,
    settings_for,
    used_ids,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from zerotune.models import fused, fused_functions, fused_kernels, packed
from zerotune.models.fake import chosen_attention, fake_gpu, make_fake
from zerotune.training.generation import AnswerData

# Rates that large kernels reach on an H100 SXM (field experience, not data sheets): matrix products in 16 bits, in
# float32 without TF32, and memory. Then the shortest time of a kernel, and the host's time to launch one.
MATRIX_FLOPS, FLOAT32_FLOPS, MEMORY_BYTES = 650e12, 55e12, 3.0e12
KERNEL_S = 2e-6
HOST_S = {"forward": 8e-6, "backward": 5e-6, "optimizer": 8e-6}
# The host's extra time for a fused pass: on a CPU, calling a compiled function took 34 µs longer than calling an
# addition, and the autograd function around it is Python.
FUSED_HOST_S = 50e-6
PEAK_FLOPS = 989e12  # bf16 without sparsity, NVIDIA's data sheet; utilisation is a share of this

CPU = torch.device("cpu")
BY_NAME = {(shape.name, shape.method): shape for shape in SHAPES}
# The cases to count: a shape, and whether it is a generator instead of a classifier.
CASES = {
    "llama-1b-full": (BY_NAME["Llama-3.2-1B", "full"], False),
    "llama-1b-lora": (BY_NAME["Llama-3.2-1B", "lora"], False),
    "llama-1b-lora-generate": (BY_NAME["Llama-3.2-1B", "lora"], True),
    "gemma-2b-lora": (BY_NAME["Gemma-2-2B", "lora"], False),
    "mistral-7b-qlora": (BY_NAME["Mistral-7B", "qlora"], False),
    "roberta-large-full": (BY_NAME["RoBERTa-large", "full"], False),
}
# Task and examples per step: the default batch size; 3,300 tokens; 16,000 tokens.
STEPS = ("sst2:32", "sst2:256", "imdb:57")
PROMPT_TOKENS = 12  # before the text in a generator's rows

_NO_KERNELS = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
               "_unsafe_view", "_reshape_alias", "lift_fresh", "promote_types"}  # fmt: skip
_WRITE_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_"}
_ROW_READERS = {"embedding", "index", "index_select", "gather"}  # of the first argument they read only what they return
HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
# The most tensors, and the most elements, that one launch of torch's multi-tensor kernels takes.
_TENSORS_A_LAUNCH, _ELEMENTS_A_LAUNCH = 36, 320 * 65536


@dataclass
class Kernels:
    """All kernels of one operation in one phase."""

    launches: int = 0
    fused: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, launches: int, num_bytes: int, flops: int = 0, rate: float = MATRIX_FLOPS) -> None:
        """Add an operation: its time is the longest of its memory's, its arithmetic's, and its launches' least time."""
        self.launches += launches
        self.bytes += num_bytes
        self.flops += flops
        self.seconds += max(num_bytes / MEMORY_BYTES, flops / rate, launches * KERNEL_S)


@dataclass
class Census(TorchDispatchMode):
    """Counts the kernels of each operation inside the block, by phase: "forward", "backward", "optimizer"."""

    phase: str = "forward"
    paused: bool = False
    kernels: dict[str, dict[str, Kernels]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Kernels)))

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if self.paused:
            return result
        name = operation._schema.name.split("::")[1]
        if operation.namespace == "prim" or name.startswith("sym_") or name in _NO_KERNELS or operation.is_view:
            return result
        if name == "gemm_4bit":
            self._count_nf4_product(*args, result)
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        flops = 0
        counted_as = torch.ops.aten.addmm if name == "addmm_" else operation._overloadpacket
        if counted_as in flop_registry:
            flops = flop_registry[counted_as](*args, **kwargs, out_val=result)
        # a CPU scalar among the operands is an argument of the kernel
        is_float32 = bool(flops) and read[0].dtype == torch.float32
        counted = self.kernels[self.phase][_shown_name(name, args, result)]
        rate = FLOAT32_FLOPS if is_float32 else MATRIX_FLOPS
        counted.add(_launches(name, read), _bytes(operation, name, args, kwargs, result), flops, rate)
        return result

    def _count_nf4_product(self, inputs, packed, shape, *scales_and_result) -> None:
        """Count what bitsandbytes runs on an H100 for more than a few tokens: it unpacks the weight, then multiplies.

        The scales are unpacked in one kernel, and their offset is added in another.
        """
        rows, columns = shape
        result = scales_and_result[-1]
        weight_bytes = rows * columns * inputs.element_size()
        scale_bytes = rows * columns // 64
        counted = self.kernels[self.phase]
        counted["dequantize_blockwise"].add(1, scale_bytes * 5)
        counted["add"].add(1, scale_bytes * 8)
        counted["dequantize_4bit"].add(1, size_of(packed) + scale_bytes * 4 + weight_bytes)
        flops = 2 * inputs.numel() * rows
        counted["mm"].add(1, size_of(inputs) + weight_bytes + size_of(result), flops)

    def run_fused(self, kernel, *args):
        """Replace `fused_kernels.run` on a GPU: count a pass as one kernel, by its inputs and outputs."""
        args = fused_kernels.contiguous(args)
        self.paused = True
        result = kernel(*args)
        self.paused = False
        leaves = {id(leaf): leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
        counted = self.kernels[self.phase][f"fused {kernel.__name__.strip('_')}"]
        counted.add(1, sum(map(size_of, leaves.values())))
        counted.fused += 1
        return result

    def wide_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Replace `fused_functions.wide_product` on a GPU: one product of 16-bit matrices that writes float32."""
        self.paused = True
        result = (left @ right).float()
        self.paused = False
        num_bytes = size_of(left) + size_of(right) + size_of(result)
        flops = 2 * left.numel() * right.shape[1]
        self.kernels[self.phase]["mm"].add(1, num_bytes, flops)
        return result

    def total(self, *phases: str) -> Kernels:
        """Return the sum of all operations of some phases."""
        total = Kernels()
        for phase in phases:
            for counted in self.kernels[phase].values():
                total.launches += counted.launches
                total.fused += counted.fused
                total.bytes += counted.bytes
                total.flops += counted.flops
                total.seconds += counted.seconds
        return total

    def operations(self) -> list[dict]:
        """Return the operations of all phases, the longest first."""
        rows = [
            {"phase": phase, "operation": name, **asdict(counted)}
            for phase, by_name in self.kernels.items()
            for name, counted in by_name.items()
        ]
        return sorted(rows, key=lambda row: -row["seconds"])


def _shown_name(name: str, args: tuple, result) -> str:
    if name != "_to_copy":
        return name
    return f"{str(args[0].dtype).removeprefix('torch.')} to {str(result.dtype).removeprefix('torch.')}"


def size_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor that a kernel reads; expanded dimensions count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size() if tensor.numel() else 0


def _launches(name: str, tensors: list[torch.Tensor]) -> int:
    if not name.startswith(("_foreach", "_fused_adam")):
        return 1
    lists = 4 if name.startswith("_fused") else 1  # weights, gradients and two moments, of equal sizes
    num_elements = sum(tensor.numel() for tensor in tensors) / lists
    return math.ceil(max(len(tensors) / lists / _TENSORS_A_LAUNCH, num_elements / _ELEMENTS_A_LAUNCH))


def _bytes(operation, name: str, args: tuple, kwargs: dict, result) -> int:
    """Return the bytes that an operation reads and writes: arguments (twice if it changes them) and results."""
    written = sum(size_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
    if name in _ROW_READERS:
        return 2 * written + sum(size_of(leaf) for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor))
    if name in ("index_put_", "_index_put_impl_"):
        return 2 * size_of(args[2])
    returns = operation._schema.returns
    if returns and all(each.alias_info is not None for each in returns):
        written = 0  # its results are changed arguments, which are counted below
    for position, argument in enumerate(operation._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        size = sum(size_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not (is_changed and name in _WRITE_ONLY)
        written += size * (is_changed + is_read)
    return written


class HostReads(TorchDispatchMode):
    """Counts the operations inside the block that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        selects = name in ("index", "index_put_", "_index_put_impl_") and any(
            leaf.dtype == torch.bool for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)
        )
        if name in HOST_READS or selects:
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Return a fake parameter to replace one on "meta", also one in 4 bits."""
    if type(parameter).__name__ != "Params4bit":
        return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
    from bitsandbytes.functional import QuantState

    num_blocks = math.ceil(parameter.numel() / 64)
    outer = QuantState(torch.empty(math.ceil(num_blocks / 256)), blocksize=256, code=torch.empty(256))
    outer.dtype = torch.float32
    # a Params4bit cannot be made from a fake tensor, but its layer reads only the quant_state
    packed = nn.Parameter(torch.empty(parameter.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        torch.empty(num_blocks, dtype=torch.uint8),
        shape=parameter.shape,
        dtype=torch.bfloat16,
        blocksize=64,
        quant_type="nf4",
        code=torch.empty(16),
        offset=torch.empty(()),
        state2=outer,
    )
    return packed


def task_rows(task: str, num_rows: int, vocabulary: int, generates: bool):
    """Draw rows as long as a task's, for a classifier or a generator."""
    labelled = random_rows(num_rows, vocabulary, 0, task)
    if not generates:
        return labelled
    tails = [labelled.encoded.row(row).tolist() for row in range(num_rows)]
    prompts = prompt_data(range(3, 3 + PROMPT_TOKENS), tails, [3, 4])
    return AnswerData(labelled.ids, labelled.labels, None, prompts, end=[2])


def typical_step(data, batch_size: int, tokens_per_device: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the examples of the step whose number of tokens is nearest to the mean, and its micro-batches."""
    steps = data.epoch_steps(batch_size, seed=0, epoch=0)
    num_tokens = np.array([data.num_tokens(step) for step in steps])
    step = steps[np.argmin(abs(num_tokens - num_tokens.mean()))]
    (micro_batches,) = data.micro_batches(step, tokens_per_device, 1)
    return step, micro_batches


@dataclass(frozen=True)
class Wanted:
    """The options that decide how the steps are computed."""

    attention: str
    tokens_per_device: int
    activation_checkpointing: bool
    fused: bool = True


def census_of(case: str, task: str, batch_size: int, wanted: Wanted) -> dict:
    """Count one micro-batch and one update of a step. Returns a row of the table, with its operations."""
    started = time.perf_counter()
    shape, generates = CASES[case]
    config = shape.config(toy=False)
    settings = settings_for(
        shape, "bf16", attention=wanted.attention, activation_checkpointing=wanted.activation_checkpointing
    )
    kernel, packs = chosen_attention(settings, config)
    settings = replace(settings, attention=kernel)
    data = replace(task_rows(task, 100 * batch_size, config.vocab_size, generates), packs=packs)
    step, micros = typical_step(data, batch_size, wanted.tokens_per_device)
    make = random_language_model if generates else random_model
    with torch.device("meta"):
        model = make(config, settings, torch.device("meta"))
    counts = weight_counts(model)
    census = Census()
    if wanted.fused:
        fused.fuse(model)
    as_on_cuda = {
        "run": census.run_fused,
        "steady": lambda rows: rows,
        "can_multiply_wide": lambda states: True,
        "wide_product": census.wide_product,
    }
    with fake_gpu(), mock.patch.multiple(fused_functions, **as_on_cuda):
        make_fake(model, fake_parameter)
        if packs:
            packed.use_packed_attention(model)
        engine = build_engine(model, settings, None if generates else used_ids(task, config.vocab_size))
        with census:
            loss = micro_batch(engine, data.batch(micros[0], CPU), data.num_targets(step))
            census.phase = "backward"
            engine.backward(loss, is_last=True)
        engine.update(1.0)  # the first update creates the moments, which later ones reuse
        for parameter in engine.trainable:
            parameter.grad = torch.empty_like(parameter)
        census.phase = "optimizer"
        with census:
            engine.update(1.0)
    return _row(case, task, packed.ATTENTION if packs else kernel, data, step, micros, counts, census) | {
        "host_reads": count_host_reads(shape, generates, task, batch_size, settings, packs, wanted.fused),
        "census_s": time.perf_counter() - started,
    }


def _row(case, task, kernel, data, step, micros, counts, census) -> dict:
    passes, update = census.total("forward", "backward"), census.total("optimizer")
    phases = {phase: census.total(phase) for phase in HOST_S}
    host = {phase: phases[phase].launches * s + phases[phase].fused * FUSED_HOST_S for phase, s in HOST_S.items()}
    device_s = len(micros) * passes.seconds + update.seconds
    host_s = len(micros) * (host["forward"] + host["backward"]) + host["optimizer"]
    num_tokens = data.num_tokens(step)
    useful = useful_flops(counts) * num_tokens
    return {
        "case": case,
        "task": task,
        "attention": kernel,
        "examples": len(step),
        "tokens": num_tokens,
        "micro_batches": len(micros),
        "micro_tokens": data.num_tokens(micros[0]),
        "micro_padded_tokens": data.num_padded_tokens(micros[0]),
        "micro": asdict(passes) | {"host_seconds": host["forward"] + host["backward"]},
        "optimizer": asdict(update) | {"host_seconds": host["optimizer"]},
        "device_s": device_s,
        "host_s": host_s,
        "step_s": max(device_s, host_s),
        "useful_flops": useful,
        "utilisation": useful / max(device_s, host_s) / PEAK_FLOPS,
        "utilisation_device_alone": useful / device_s / PEAK_FLOPS,
        "operations": census.operations(),
    }


def _no_attention(query, key, value, *_, **__):
    """Replace CUDA's packed kernel, which reads nothing on the host; its CPU reference does."""
    groups = query.shape[1] // key.shape[1]
    return (query + (key + value).repeat_interleave(groups, dim=1)).to(value.dtype).transpose(1, 2)


def count_host_reads(
    shape: Shape, generates: bool, task: str, batch_size: int, settings, packs: bool, fuses: bool
) -> dict:
    """Count the host reads of a real micro-batch and update: {"micro": Counter, "optimizer": Counter}.

    The model is the shape's toy with as many layers as the shape has; the rows are the first eight of the micro-batch.
    """
    config = shape.config(toy=True, all_layers=True)
    data = replace(task_rows(task, 100 * batch_size, config.vocab_size, generates), packs=packs)
    step, micros = typical_step(data, batch_size, batch_size * longest_row(task))
    rows = micros[0][np.linspace(0, len(micros[0]) - 1, min(8, len(micros[0]))).astype(int)]
    make = random_language_model if generates else random_model
    model = make(config, settings, CPU)
    if packs:
        packed.use_packed_attention(model)
    if fuses:
        fused.fuse(model)
    engine = build_engine(model, settings, None if generates else used_ids(task, config.vocab_size))
    with HostReads() as reads, mock.patch.object(packed, "_reference", _no_attention):
        loss = micro_batch(engine, data.batch(rows, CPU), data.num_targets(step))
        engine.backward(loss, is_last=True)
    with HostReads() as of_update:
        engine.update(1.0)
    return {"micro": dict(reads.counts), "optimizer": dict(of_update.counts)}


COLUMNS = {
    "case": lambda row: row["case"],
    "task": lambda row: row["task"],
    "attention": lambda row: row["attention"],
    "tokens a step": lambda row: f"{row['tokens']:,} ({row['examples']})",
    "micro-batches": lambda row: f"{row['micro_batches']}",
    "kernels": lambda row: f"{row['micro']['launches']:,}",
    "GB": lambda row: f"{row['micro']['bytes'] / 1e9:.1f}",
    "TFLOP": lambda row: f"{row['micro']['flops'] / 1e12:.1f}",
    "host reads": lambda row: f"{sum(row['host_reads']['micro'].values())}",
    "ms": lambda row: f"{row['micro']['seconds'] * 1e3:.1f}",
    "host ms": lambda row: f"{row['micro']['host_seconds'] * 1e3:.1f}",
    "optimizer": lambda row: (
        f"{row['optimizer']['launches']:,}, {row['optimizer']['bytes'] / 1e9:.1f} GB, "
        f"{row['optimizer']['seconds'] * 1e3:.1f} ms"
    ),
    "step ms": lambda row: f"{row['step_s'] * 1e3:.1f}",
    "utilisation": lambda row: f"{row['utilisation']:.1%}",
}
OPERATION_COLUMNS = {
    "phase": lambda row: row["phase"],
    "operation": lambda row: row["operation"],
    "kernels": lambda row: f"{row['launches']:,}",
    "GB": lambda row: f"{row['bytes'] / 1e9:.2f}",
    "TFLOP": lambda row: f"{row['flops'] / 1e12:.2f}",
    "ms": lambda row: f"{row['seconds'] * 1e3:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="TASK:EXAMPLES", help="sst2 or imdb, batch size")
    parser.add_argument("--attention", default="auto", help="as the train scripts' flag, resolved as on a GPU")
    parser.add_argument("--tokens-per-device", type=int, default=16384, help="most tokens in a micro-batch")
    parser.add_argument("--activation-checkpointing", action="store_true", help="count recomputed layers too")
    parser.add_argument("--compile", choices=("auto", "none"), default="auto", help="as the train scripts' flag")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also print the N longest operations of each")
    parser.add_argument("--json", type=Path, help="write the figures, with every operation, to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = Wanted(args.attention, args.tokens_per_device, args.activation_checkpointing, args.compile == "auto")
    rows = []
    for case in args.only:
        for each in args.steps:
            task, _, examples = each.partition(":")
            row = census_of(case, task, int(examples), wanted)
            rows.append(row)
            print(f"{case} {each}: counted in {row['census_s']:.0f} s", flush=True)
            if args.top:
                print(markdown_table(row["operations"][: args.top], OPERATION_COLUMNS), flush=True)
    print(markdown_table(rows, COLUMNS))
    write_record(args.json, {"conditions": conditions(1), "rows": rows})


if __name__ == "__main__":
    main()
