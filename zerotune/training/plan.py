"""Plan a training run and its needs before any weight is loaded, even for a model that is not on this machine."""

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from zerotune.errors import Refused, Unavailable
from zerotune.models.divided import EvaluatedWeights, device_bytes
from zerotune.models.fake import chosen_attention
from zerotune.models.heads import is_encoder
from zerotune.models.loading import check_trainable
from zerotune.models.packed import packs_rows
from zerotune.models.parameters import format_table, model_size, published_table
from zerotune.models.precision import compute_dtype
from zerotune.models.pretrained import check_generator, check_token_ids, load_tokenizer, most_tokens
from zerotune.models.shapes import config_to_plan, downloadable_name, has_tokenizer
from zerotune.run.exchange import Exchange, efficiency, exchanged_weights, step_exchange
from zerotune.run.plan import (
    GIB,
    STAGES,
    MemoryNeed,
    Sharding,
    describe_bytes,
    describe_memory,
    fits,
    memory_need,
    why_not_fit,
)
from zerotune.settings.groups import ModelSettings, TrainSettings
from zerotune.terminal import duration
from zerotune.training.data import TrainingData
from zerotune.training.engine import model_in_training, used_ids
from zerotune.training.schedule import plan_schedule
from zerotune.training.snapshot import bytes_on_node
from zerotune.training.step_counts import BatchShape, StepCounts, count_step
from zerotune.training.zero_state import BYTES_A_WEIGHT

# Assumed without data: labels of a classifier, tokens of a row and of its answer.
LABELS, WINDOW, ANSWER = 2, 384, {"classify": 0, "span": 0, "generate": 2}
# Assumed FLOP/s of a GPU, and those of an H100 at its peak.
GPU_FLOPS = {"bf16": 400e12, "fp16": 400e12, "fp32": 40e12}
PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}
# Rough overhead of a step besides its arithmetic: Python's own work, on a CPU or a GPU.
SECONDS_OF_PYTHON = 0.02
# Tokens of a micro-batch that leaves most of a device's memory to the weights.
SMALL_BUDGET = 2048
# Runs whose weights and their training state need less than this share of a GPU start without counting.
SURELY_FITS = 0.05
STAGE_NAMES = ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-3")
NODES = (2, 4, 8)  # numbers of nodes in the table of --node-bandwidth
STEPS_OF_A_PLAN = 50  # over which the work of several nodes is averaged
_DEEPSPEED_FILES = {1: "ds_configs/zero1.json", 2: "ds_configs/zero2.json", 3: "ds_configs/zero3.json"}


@dataclass(frozen=True)
class Devices:
    """The devices that a run is planned for.

    Attributes:
        number: of devices.
        memory: bytes of each; None if there is no limit (a CPU).
        on_gpu: whether they are GPUs.
    """

    number: int
    memory: int | None
    on_gpu: bool

    @classmethod
    def of(cls, settings: TrainSettings) -> "Devices":
        """Return the devices of --devices and --device-memory, by default those of this launch."""
        number = settings.run.devices or int(os.environ.get("WORLD_SIZE", "1"))
        memory = settings.run.device_memory
        if memory is None:
            memory = device_bytes()
        return cls(number, memory, memory is not None)


# --- before a run ---


def check_fits(settings: TrainSettings, config, train: TrainingData, num_labels: int) -> bool:
    """Refuse a run that will not fit its GPU. Small runs, and runs on a CPU, are not counted.

    Returns whether whole gradients fit too, so that ZeRO-2 and 3 can exchange them once a step.

    Args:
        num_labels: of a classifier.
    Raises:
        Refused: the run does not fit, or a token has no embedding.
    """
    check_token_ids(settings.model.name, config, train.token_ids)
    devices = Devices.of(settings)
    if not devices.on_gpu:
        return True
    total, trainable = model_size(config, settings.head, num_labels, settings.model)
    _check_final_evaluation(settings, config, devices)
    if 4 * total + 14 * trainable < SURELY_FITS * devices.memory:
        return True
    batch = _largest_batch(settings, config, train, devices)
    counts = _count(settings, config, num_labels, batch, devices, used_ids(settings, train))
    problem = why_not_fit(_need(settings, counts, devices), devices.memory, settings.model, _may_shard(settings))
    if problem:
        raise Refused(problem)
    return fits(_need(settings, counts, devices, whole_gradients=True), devices.memory)


def _check_final_evaluation(settings: TrainSettings, config, devices: Devices) -> None:
    if settings.model.method != "full":
        return
    on_each = _final_bytes(settings, config, devices)
    if on_each > devices.memory:
        raise Refused(
            f"--method full ends by evaluating final/, whose weights take {on_each / GIB:.0f} GiB on each device, and "
            f"a device has {devices.memory / GIB:.0f} GiB: use more devices, or --method lora or qlora"
        )


def _final_bytes(settings: TrainSettings, config, devices: Devices) -> float:
    """Return the bytes of a fully tuned model's weights on each device that evaluates them."""
    weights = EvaluatedWeights.of(config, settings.model.precision, settings.head == "generate", is_whole=True)
    return weights.on_each(devices.number, devices.memory)


# --- --plan ---


def plan_training(settings: TrainSettings, load: Callable, tokenise: Callable) -> str:
    """Describe a run: its parameters, architecture, data, steps, memory, arithmetic, and the devices that it fits.

    It needs no data, and no file of a model whose shape is known. It says which of these are missing.

    Args:
        load: () -> (the task, its splits).
        tokenise: (task, splits, config, tokenizer) -> the tokenised splits by name.
    Raises:
        Refused: an input cannot be used, or the run will not fit this machine's GPU.
    """
    started = time.perf_counter()
    model, devices = settings.model, Devices.of(settings)
    config, shape = config_to_plan(model.name, model.revision)
    max_length = settings.text.max_length or settings.questions.max_length
    check_trainable(model, config, max_length)
    if settings.head == "generate":
        check_generator(model.name, config, settings.optimisation.head_learning_rate, "classify or span")
    splits, data, notes = _read(settings, config, shape, load, tokenise)
    num_labels = _num_labels(splits)
    train = data["train"] if data else None
    if train is None:
        batch = _assumed_batch(settings, config, max_length or WINDOW, devices)
    else:
        check_token_ids(model.name, config, train.token_ids)
        train = _as_on_devices(train, settings, config, devices)
        batch = _largest_batch(settings, config, train, devices)
    used = None if train is None else used_ids(settings, train)
    counts = _count(settings, config, num_labels, batch, devices, used)
    need = _need(settings, counts, devices)
    whole = _need(settings, counts, devices, whole_gradients=True)
    exchanges_once = devices.memory is None or fits(whole, devices.memory)
    lines = [
        f"{model.name}: {model.method}, {model.precision}, --head {settings.head}"
        + (f" (the published shape of {shape}; no file of the model was read)" if shape else ""),
        format_table(published_table(config), _whole(counts.table)),
        describe_architecture(config),
        *notes,
        *_describe_data(splits, train),
        *_describe_steps(settings, splits, train, batch, counts, devices),
        *_describe_exchange(settings, train, batch, counts, devices, exchanges_once),
        _describe_checkpoints(settings, counts.table["trainable"]),
        f"largest micro-batch: {batch.rows} rows, {batch.longest} tokens in the longest",
        describe_memory(whole if exchanges_once else need),
        "  " + _how_counted(config, counts, devices),
    ]
    if devices.memory is not None:
        problem = why_not_fit(need, devices.memory, model, _may_shard(settings))
        if settings.run.device_memory is None:  # this machine's GPU
            _check_final_evaluation(settings, config, devices)
            if problem:
                raise Refused(problem)
        lines += _fitting(settings, config, num_labels, batch, devices, counts)
    return "\n".join([*lines, f"planned in {time.perf_counter() - started:.1f} s"])


def _read(settings: TrainSettings, config, shape: str | None, load, tokenise) -> tuple:
    """Return the splits and the tokenised data, None for each that is unavailable, and lines that say why."""
    try:
        task, splits = load()
    except Unavailable as refusal:
        return None, None, [f"data: not on this machine, so the steps are unknown ({refusal})"]
    if shape or not has_tokenizer(settings.model.name, settings.model.revision):
        return splits, None, ["tokens: unknown without a tokenizer; rows of --max-length are assumed"]
    tokenizer = load_tokenizer(settings.model.name, settings.model.revision)
    return splits, tokenise(task, splits, config, tokenizer), []


def _num_labels(splits) -> int:
    parts = splits.record["splits"] if splits else {}
    return len(parts.get("train", {}).get("labels") or ()) or LABELS


def _as_on_devices(train: TrainingData, settings: TrainSettings, config, devices: Devices) -> TrainingData:
    """Return the data, packed if the planned devices will pack it."""
    model = model_in_training(settings, config)
    packs = chosen_attention(model, config)[1] if devices.on_gpu else packs_rows(model, config, trains=True)
    return replace(train, packs=packs) if "packs" in {each.name for each in fields(train)} else train


def _largest_batch(settings: TrainSettings, config, train: TrainingData, devices: Devices) -> BatchShape:
    """Return the shape of the largest micro-batch in a step of the longest rows."""
    optimisation = settings.optimisation
    longest = np.argsort(-train.lengths, kind="stable")[: optimisation.batch_size]
    ranks = train.micro_batches(longest, optimisation.tokens_per_device, devices.number)
    rows = max((rows for rank in ranks for rows in rank if len(rows)), key=train.num_padded_tokens)
    return BatchShape.of(train.batch(rows, torch.device("cpu")).inputs, is_alone=len(ranks[0]) == 1)


def _assumed_batch(settings: TrainSettings, config, longest: int, devices: Devices) -> BatchShape:
    """Return the shape of a micro-batch of rows of maximum length, for a plan without data."""
    optimisation, answer = settings.optimisation, ANSWER[settings.head]
    if settings.head == "generate" and settings.task == "squad":
        answer = settings.questions.max_new_tokens or 32
    longest = min(longest, most_tokens(config) or longest)
    a_device = math.ceil(optimisation.batch_size / devices.number)
    rows = max(1, min(a_device, optimisation.tokens_per_device // longest))
    return BatchShape(rows, longest, rows * longest, rows * answer, is_alone=rows == a_device)


def _count(settings: TrainSettings, config, num_labels, batch, devices: Devices, used_ids) -> StepCounts:
    model = model_in_training(settings, config)
    return count_step(config, model, settings.head, num_labels, batch, devices.on_gpu, used_ids)


def _need(settings: TrainSettings, counts: StepCounts, devices: Devices, whole_gradients: bool = False) -> MemoryNeed:
    zero = (settings.deepspeed or {}).get("zero_optimization", {})
    sharding = Sharding(settings.model.zero_stage or 0, devices.number, zero, whole_gradients)
    return _need_of(counts, settings.model, settings.optimisation.optimizer, sharding, devices)


def _need_of(counts: StepCounts, model: ModelSettings, optimizer: str, sharding: Sharding, devices) -> MemoryNeed:
    return memory_need(counts.peaks, counts.table, counts.largest_layer, model, optimizer, sharding, devices.on_gpu)


# --- what is printed ---


def _whole(table: dict) -> dict:
    """Return a counted table with its numbers rounded."""
    whole = {name: round(table[name]) for name in ("total", "trainable", "head")}
    return whole | {"groups": {name: round(count) for name, count in table["groups"].items()}}


def describe_architecture(config) -> str:
    """Return a model's sizes as papers list them: a line of names and a line of numbers."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "dim": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "KV heads": getattr(config, "num_key_value_heads", None) or heads,
        "head size": size,
        "MLP": getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None),
        "window": getattr(config, "sliding_window", None) or "–",
        "context": getattr(config, "max_position_embeddings", None) or "–",
        "vocabulary": config.vocab_size,
        "embedding": "tied" if config.tie_word_embeddings and not is_encoder(config) else "–",
    }
    shown = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in sizes.items()}
    widths = {name: max(len(name), len(value)) for name, value in shown.items()}
    return "\n".join(
        "  ".join(f"{row[name]:>{widths[name]}}" for name in shown) for row in ({n: n for n in shown}, shown)
    )


def _describe_data(splits, train: TrainingData | None) -> list[str]:
    if splits is None:
        return []
    sizes = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    lines = ["splits: " + ", ".join(f"{name} {len(part):,}" for name, part in sizes.items())]
    if train is not None:
        rows = np.arange(len(train.ids))
        lines.append(f"data: {len(rows):,} rows, {train.num_tokens(rows):,} tokens, longest {train.lengths.max():,}")
    return lines


def _describe_steps(settings, splits, train, batch: BatchShape, counts: StepCounts, devices: Devices) -> list[str]:
    optimisation = settings.optimisation
    flops_a_token = _flops_a_token(train, batch, counts)
    if splits is None:
        num_steps, num_tokens = None, optimisation.batch_size * batch.longest
        lines = []
    else:
        schedule = plan_schedule(optimisation, settings.run, len(splits.train))
        num_steps, passes, num_tokens = schedule.num_steps, "", optimisation.batch_size * batch.longest
        if train is not None:
            steps = train.epoch_steps(optimisation.batch_size, optimisation.seed, epoch=0)
            cuts = [train.micro_batches(step, optimisation.tokens_per_device, devices.number) for step in steps]
            micro = [rows for ranks in cuts for rank in ranks for rows in rank if len(rows)]
            real, num_tokens = sum(map(train.num_tokens, micro)), sum(map(train.num_padded_tokens, micro)) / len(steps)
            passes = f", {sum(len(ranks[0]) for ranks in cuts) / len(steps):.2f} micro-batches a step"
            passes += f", {num_tokens * len(steps) / real:.3f} × with padding"
        lines = [
            f"steps: {num_steps:,} of {optimisation.batch_size} rows on {devices.number} device(s), "
            f"{schedule.steps_per_epoch:,} an epoch{passes}"
        ]
    if not counts.flops:
        return lines
    flops = flops_a_token * num_tokens
    rate, what = _rate(settings.model.precision, devices)
    seconds = flops / (rate * devices.number)
    took = f"{seconds:.3g} s a step" + (f", about {duration(seconds * num_steps)} of steps" if num_steps else "")
    if seconds < SECONDS_OF_PYTHON:
        took = f"{seconds:.2g} s a step, less than Python's own work: about {SECONDS_OF_PYTHON} s a step in all"
        took += f", about {duration((seconds + SECONDS_OF_PYTHON) * num_steps)} of steps" if num_steps else ""
    most = "" if train is not None else "at most "
    lines.append(f"arithmetic: {most}{flops / 1e12:.3g} TFLOP a step; {took}, at {rate / 1e12:.3g} TFLOP/s {what}")
    return lines


def _describe_exchange(
    settings: TrainSettings, train: TrainingData | None, batch: BatchShape, counts: StepCounts, devices, once: bool
) -> list[str]:
    """Describe what a device sends in a step and, with --node-bandwidth, the share of the time in which it computes.

    Args:
        once: whether ZeRO-2 and 3 exchange gradients once a step.
    """
    lines, zero = [], (settings.deepspeed or {}).get("zero_optimization", {})
    if devices.number > 1:
        sharding = Sharding(settings.model.zero_stage or 0, devices.number, zero, once)
        number, _ = _work_of_a_device(settings, train, batch, devices.number)
        sent = _exchange(settings, counts, sharding, number)
        often = "once" if sent.times == 1 else f"{number} times: whole ones do not fit until the last micro-batch"
        parts = f"{sent.gradients / 1e9:.3g} of gradients, {often}"
        lines.append(f"exchange: each device sends {sent.total / 1e9:.3g} GB a step ({parts})")
    if not (settings.run.node_bandwidth and counts.flops):
        return lines
    rate, _ = _rate(settings.model.precision, devices)
    seconds_a_token = _flops_a_token(train, batch, counts) / rate
    rows = f"{settings.optimisation.batch_size} rows a step, {devices.number} device(s) a node"
    lines += [
        f"share of the time in which devices compute, at {settings.run.node_bandwidth:g} Gbit/s a node; {rows}:",
        " " * 10 + "".join(f"{nodes:>4} nodes" for nodes in NODES),
    ]
    for stage in STAGES if settings.model.method != "qlora" else STAGES[:3]:
        cells = []
        for nodes in NODES:
            sharding = Sharding(stage, nodes * devices.number, zero if stage == settings.model.zero_stage else {}, once)
            number, tokens = _work_of_a_device(settings, train, batch, sharding.devices)
            sent = _exchange(settings, counts, sharding, number)
            overlaps = (settings.model.method, stage) != ("qlora", 2)  # ds_configs/qlora.json
            bytes_per_second = settings.run.node_bandwidth * 1e9 / 8
            cells.append(efficiency(sent, tokens * seconds_a_token, number, bytes_per_second, overlaps))
        lines.append(f"{STAGE_NAMES[stage]:>10}" + "".join(f"{cell:>10.0%}" for cell in cells))
    return [*lines, "  assumed: gradients travel during their backward pass, ZeRO-3's weights during any pass"]


def _exchange(settings: TrainSettings, counts: StepCounts, sharding: Sharding, num_micro_batches: int) -> Exchange:
    narrow = 4 if settings.model.precision == "fp32" else 2
    plain = 2 if settings.optimisation.gradient_exchange == "bf16" else 4
    weights = exchanged_weights(counts.table, settings.model.method)
    return step_exchange(*weights, narrow, sharding, num_micro_batches, plain)


def _work_of_a_device(
    settings: TrainSettings, train: TrainingData | None, batch: BatchShape, number: int
) -> tuple[int, float]:
    """Return the micro-batches and padded tokens of the busiest of `number` devices in a step, averaged over steps."""
    optimisation = settings.optimisation
    if train is None:
        rows = math.ceil(optimisation.batch_size / number)
        a_micro_batch = max(1, optimisation.tokens_per_device // batch.longest)
        return math.ceil(rows / a_micro_batch), rows * batch.longest
    steps = train.epoch_steps(optimisation.batch_size, optimisation.seed, epoch=0)[:STEPS_OF_A_PLAN]
    cuts = [train.micro_batches(step, optimisation.tokens_per_device, number) for step in steps]
    busiest = [max(sum(train.num_padded_tokens(rows) for rows in rank if len(rows)) for rank in cut) for cut in cuts]
    return round(sum(len(cut[0]) for cut in cuts) / len(cuts)), sum(busiest) / len(busiest)


def _flops_a_token(train: TrainingData | None, batch: BatchShape, counts: StepCounts) -> float:
    return counts.flops / (batch.rows * batch.longest if train is None or not train.packs else batch.tokens)


def _rate(precision: str, devices: Devices) -> tuple[float, str]:
    """Return the floating-point operations per second of one device, and the source of the number."""
    if devices.on_gpu:
        share = GPU_FLOPS[precision] / PEAK_FLOPS[precision]
        return GPU_FLOPS[precision], f"a device (assumed: {100 * share:.0f} % of an H100's peak)"
    size, number = 768, 3
    matrix = torch.ones(size, size, dtype=compute_dtype(precision))
    matrix @ matrix
    started = time.perf_counter()
    for _ in range(number):
        matrix @ matrix
    rate = number * 2 * size**3 / (time.perf_counter() - started)
    return rate, "a device (a matrix product on this CPU, now)"


def _how_counted(config, counts: StepCounts, devices: Devices) -> str:
    if not counts.flops:
        return f"without activations, which PyTorch cannot count for {config.model_type}: leave room for them"
    if devices.on_gpu:
        rest = "CUDA context and DeepSpeed's gathered weights are assumed"
    else:
        rest = "the process itself (Python, libraries, data) comes on top"
    return f"counted by PyTorch on fake tensors; {rest}"


def _describe_checkpoints(settings: TrainSettings, num_trainable: float) -> str:
    """Describe the size of a checkpoint and of its copy; smaller if an embedding trains only its used rows."""
    every = settings.run.checkpoint_every
    often = f"every {every.steps} steps" if every.minutes is None else f"every {every.minutes:g} minutes"
    num_bytes = int(num_trainable * BYTES_A_WEIGHT)
    line = f"checkpoints: up to {describe_bytes(num_bytes)} each, {often}"
    if settings.run.scratch_dir:
        return f"{line}, written to {settings.run.scratch_dir} first"
    copied = bytes_on_node(num_bytes, settings.deepspeed is not None)
    return f"{line}; a copy of {describe_bytes(copied)} in the host memory of a node while one is written"


# --- what fits ---


def _fitting(
    settings: TrainSettings,
    config,
    num_labels: int,
    batch: BatchShape,
    devices: Devices,
    counted: StepCounts,
    savings: Sequence[str] = (),
) -> list[str]:
    """Return a table of the GiB per device for each method and ZeRO stage, and the launch line of the best that fits.

    The best is the first of full tuning, LoRA and QLoRA that fits, with its lowest stage. If none fits, a second table
    follows, with recomputed activations and small micro-batches.

    Args:
        counted: counts of the run's own method.
        savings: flags of the second table.
    """
    own, optimizer = settings.model.method, settings.optimisation.optimizer
    stages = STAGES if devices.number > 1 and _may_shard(settings) else STAGES[:1]
    needs: dict[tuple[str, int], MemoryNeed] = {}
    counts: dict[bool, StepCounts] = {own == "full": counted}
    for method in ("full", "lora", "qlora"):
        model, is_full = replace(settings.model, method=method), method == "full"
        if is_full not in counts:
            counts[is_full] = _count(replace(settings, model=model), config, num_labels, batch, devices, None)
        for stage in stages:
            if (method, stage) != ("qlora", 3):  # a refused combination
                sharding = Sharding(stage, devices.number, {"overlap_comm": (method, stage) != ("qlora", 2)})
                needs[method, stage] = _need_of(counts[is_full], model, optimizer, sharding, devices)
    final_fits = _final_bytes(settings, config, devices) <= devices.memory
    fitting = [each for each, need in needs.items() if fits(need, devices.memory) and (final_fits or each[0] != "full")]
    names = STAGE_NAMES[: len(stages)]
    lines = [
        f"GiB on each of {devices.number} device(s) of {devices.memory / GIB:.4g} GiB (* fits):",
        "".join(f"{name:>10}" for name in ["", *names]),
    ]
    for method in ("full", "lora", "qlora"):
        cells = [_cell(needs.get((method, stage)), (method, stage) in fitting) for stage in stages]
        lines.append(f"{method:>10}" + "".join(f"{cell:>10}" for cell in cells))
    if not final_fits:
        lines.append("full: its weights do not fit a device in the final evaluation")
    if fitting:
        return [*lines, "launch of the first that fits:", f"  {_launch_line(*fitting[0], devices, savings)}"]
    if savings:
        return [*lines, "none fits: use more devices, or a smaller model"]
    model = replace(settings.model, activation_checkpointing=True)
    budget = min(settings.optimisation.tokens_per_device, SMALL_BUDGET)
    settings = replace(settings, model=model, optimisation=replace(settings.optimisation, tokens_per_device=budget))
    batch = batch.cut_to(budget)
    counted = _count(settings, config, num_labels, batch, devices, None)
    savings = ["--activation-checkpointing", f"--tokens-per-device {budget}"]
    second = _fitting(settings, config, num_labels, batch, devices, counted, savings)
    return [*lines, f"none fits; with {' '.join(savings)}:", *second]


def _may_shard(settings: TrainSettings) -> bool:
    """Return whether a run may use DeepSpeed."""
    return settings.engine == "loop" and settings.model.precision != "fp16"


def _cell(need: MemoryNeed | None, is_fitting: bool) -> str:
    return "– " if need is None else f"{need.total / GIB:.1f}{'*' if is_fitting else ' '}"


def _launch_line(method: str, stage: int, devices: Devices, savings: Sequence[str]) -> str:
    """Return the typed command, launched on all devices with a method, a ZeRO stage and the flags of `savings`."""
    kept, skip = [], False
    file = "ds_configs/qlora.json" if (method, stage) == ("qlora", 2) else _DEEPSPEED_FILES.get(stage)
    replaced = {"--plan", "--devices", "--device-memory", "--node-bandwidth", "--method", "--deepspeed"}
    replaced |= {each.partition(" ")[0] for each in savings}
    if file:
        replaced.add("--gradient-exchange")  # DeepSpeed has its own
    if method == "full":
        replaced |= {"--lora-rank", "--lora-alpha", "--lora-dropout"}
    alone = ("--plan", "--activation-checkpointing")
    for word in sys.argv[1:]:
        name, has_value, value = word.partition("=")
        if skip:
            skip = False
        elif name in replaced:
            skip = name not in alone and not has_value
        elif name == "--model" and has_value:
            kept.append(shlex.quote(f"--model={downloadable_name(value)}"))
        elif kept and kept[-1] == "--model":
            kept.append(shlex.quote(downloadable_name(word)))
        else:
            kept.append(shlex.quote(word))
    script = os.path.relpath(sys.argv[0]) if sys.argv[0] else "train/sst2.py"
    launch = ["python"] if devices.number == 1 else ["accelerate launch", f"--num_processes {devices.number}"]
    return " ".join(
        [*launch, script, *kept, f"--method {method}", *savings, *([f"--deepspeed {file}"] if file else [])]
    )
