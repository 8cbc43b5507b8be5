"""One model shape of throughput.py, measured in this process: zerotune's steps and the Trainer's, in turns."""

import gc
import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from random_models import SHAPES, random_model, random_rows, settings_for
from transformers import Trainer, TrainerCallback, TrainingArguments

from zerotune.models.classifier import SequenceClassifier
from zerotune.models.parameters import parameter_groups, parameter_table
from zerotune.models.used_rows import train_used_rows
from zerotune.run import launch
from zerotune.training.batches import micro_batches
from zerotune.training.engine import Engine, build_optimizer
from zerotune.training.loop import Loop
from zerotune.training.schedule import Schedule

# steps after the timed ones, in which waits are counted
WAIT_STEPS = 3
PEAK_RATE, HEAD_RATE, WEIGHT_DECAY = 1e-5, 5e-5, 0.01


@dataclass(frozen=True)
class Timed:
    """What one way did in its timed steps. waits_per_step: how often the host waited for the GPU, None if unknown."""

    seconds: float
    num_examples: int
    num_tokens: int
    num_padded_tokens: int
    waits_per_step: float | None = None


def measure_shape(args) -> None:
    """Every batch size of one shape, the ways in turns; writes --result after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    toy = args.toy or device.type == "cpu"
    shape, rows = SHAPES[args.shape], []
    config = shape.config(toy)
    settings = settings_for(shape, "bf16")
    rate = matmul_rate(device, 1024 if toy else 8192)
    for batch_size in args.batch_sizes:
        data = random_rows(args.steps * batch_size, config.vocab_size, seed=0)
        taken = {"zerotune": [], "Trainer": []}
        for _ in range(args.rounds):
            for way, run in (("zerotune", run_ours), ("Trainer", run_trainer)):
                taken[way].append(_measured(run, (args, config, settings, data, batch_size), device))
        for way, results in taken.items():
            rows.append(_row(f"{shape.name}/{shape.method}", way, batch_size, results, rate))
        args.result.write_text(json.dumps(rows))


def _measured(run, arguments: tuple, device) -> dict:
    """One turn of one way, with its peak memory, from a model made for it to that model gone."""
    args, config, settings, data, batch_size = arguments
    torch.manual_seed(0)
    model = random_model(config, settings, device)
    useful = useful_flops_per_token(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timed = run(args, model, settings, data, batch_size)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    del model
    gc.collect()
    return asdict(timed) | {"peak_memory_bytes": peak, "useful_flops_per_token": useful}


def _row(shape: str, way: str, batch_size: int, results: list[dict], rate: float) -> dict:
    fastest = min(results, key=lambda result: result["seconds"])
    tokens_per_s = fastest["num_tokens"] / fastest["seconds"]
    return {
        "shape": shape,
        "way": way,
        "batch_size": batch_size,
        "tokens_per_s": tokens_per_s,
        "examples_per_s": fastest["num_examples"] / fastest["seconds"],
        "padding_ratio": fastest["num_padded_tokens"] / fastest["num_tokens"],
        "utilisation": tokens_per_s * fastest["useful_flops_per_token"] / rate,
        "matmul_flops_per_s": rate,
        "peak_memory_bytes": max(result["peak_memory_bytes"] or 0 for result in results) or None,
        "waits_per_step": fastest["waits_per_step"],
        "rounds": results,
    }


def useful_flops_per_token(model) -> int:
    """6 for each trained matrix weight, 4 for each frozen one; embeddings and head left out (see throughput.py)."""
    table = parameter_table(model)
    backbone = table["groups"]["attention"] + table["groups"]["mlp"]
    adapter = table["groups"]["adapter"]
    return 4 * backbone + 6 * adapter if adapter else 6 * backbone


def matmul_rate(device, size: int) -> float:
    """Floating-point operations a second in a bf16 product of two random size × size matrices: the best of 20."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(23):
        _wait(device)
        started = time.perf_counter()
        torch.matmul(left, right)
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[3:])


def _wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_ours(args, model, settings, data, batch_size: int) -> Timed:
    """zerotune's loop over its engine, put together as train/sst2.py does: an epoch to warm up, an epoch timed."""
    accelerator = launch.start_accelerator(None)
    classifier = SequenceClassifier(model)
    train_used_rows(classifier.stock_model, np.union1d(data.encoded.ids, [data.pad_id]))
    groups = parameter_groups(classifier, PEAK_RATE, HEAD_RATE, WEIGHT_DECAY)
    optimizer = build_optimizer("adamw", groups, accelerator.device.type)
    engine = Engine(accelerator, classifier, optimizer, settings.precision, max_grad_norm=1.0)
    never = 3 * args.steps + 1  # evaluations, checkpoints and logs
    schedule = Schedule(never, args.steps, 0, eval_every=never, checkpoint_every=never, log_every=never)
    run = SimpleNamespace(path=Path(tempfile.gettempdir()), log=None)
    flags = SimpleNamespace(batch_size=batch_size, tokens_per_device=args.tokens_per_device, seed=0, scratch_dir=None)
    loop = Loop(engine, data, schedule, run, flags, None, SimpleNamespace(name=None))

    def take_steps(numbers: range) -> float:
        _wait(accelerator.device)
        started = time.perf_counter()
        for step in numbers:
            loop._one_step(step)
        _wait(accelerator.device)
        return time.perf_counter() - started

    take_steps(range(1, args.steps + 1))
    timed = range(args.steps + 1, 2 * args.steps + 1)
    seconds = take_steps(timed)
    steps = [loop.step_indices(step) for step in timed]
    batches = [batch for step in steps for batch in micro_batches(step, data.lengths, args.tokens_per_device, 1)[0]]
    num_tokens = int(data.lengths.sum())
    num_padded = sum(int(data.lengths[batch].max()) * len(batch) for batch in batches)
    num_waits = _count_waits(lambda: take_steps(range(timed.stop, timed.stop + WAIT_STEPS)), accelerator.device)
    waits = None if num_waits is None else num_waits / WAIT_STEPS  # torch.cuda.synchronize is not among them
    return Timed(seconds, len(data.labels), num_tokens, num_padded, waits)


def _count_waits(run, device) -> int | None:
    """How often the host waits for the GPU meanwhile, as PyTorch's debug mode counts it; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def run_trainer(args, model, settings, data, batch_size: int) -> Timed:
    """transformers.Trainer at its best flags on the same rows, as many steps to warm up and timed.

    It gets the rows four times over, for it sorts by length within a quarter of them: so that every turn of `steps`
    steps is one sorted group, as long on average as the whole.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    num_warmup, num_steps = args.steps, 2 * args.steps
    counts = {"real": torch.zeros((), dtype=torch.int64, device=device), "padded": 0}
    clock = {}

    class Counting(Trainer):
        def compute_loss(self, model, inputs, *rest, **kwargs):
            if self.state.global_step >= num_warmup:
                counts["real"] += inputs["attention_mask"].sum()
                counts["padded"] += inputs["attention_mask"].numel()
            return super().compute_loss(model, inputs, *rest, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == num_warmup:
                _wait(device)
                clock["started"] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == num_steps:
                _wait(device)
                clock["ended"] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            bf16=True,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            dataloader_num_workers=2 if cuda else 0,
            per_device_train_batch_size=batch_size,
            max_steps=num_steps,
            learning_rate=PEAK_RATE,
            weight_decay=WEIGHT_DECAY,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            use_cpu=not cuda,
            report_to=[],
            disable_tqdm=True,
        )
        rows = [{"input_ids": data.encoded.row(row), "labels": label} for row, label in enumerate(data.labels.tolist())]
        trainer = Counting(
            model=model, args=arguments, train_dataset=rows * 4, data_collator=pad_rows, callbacks=[Clock()]
        )
        trainer.train()
    seconds = clock["ended"] - clock["started"]
    return Timed(seconds, len(data.labels), int(counts["real"]), counts["padded"])


def pad_rows(features: list[dict]) -> dict:
    """What DataCollatorWithPadding does, without a tokenizer."""
    rows = [torch.as_tensor(feature["input_ids"], dtype=torch.int64) for feature in features]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = torch.tensor([feature["labels"] for feature in features])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
