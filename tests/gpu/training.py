"""Time training steps: zerotune's own, and transformers.Trainer's on the same examples."""

import tempfile
import time

import numpy as np
import torch
from bench import PEAK_FLOPS, Bench, Setup, Timed
from library_step import (
    PEAK_RATE,
    WEIGHT_DECAY,
    fresh_accelerator,
    optimizer_step,
    planned_bytes,
    useful_flops,
    weight_counts,
)
from random_models import longest_row, random_model, settings_for, used_ids
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

WAIT_STEPS = 2  # steps in which the host's waits are counted


def train(bench: Bench, setup: Setup, tokens: int, batch_size: int | None = None, peft_casts: bool = True) -> dict:
    """Time zerotune's steps, through its data, micro-batches and engine.

    Args:
        tokens: most padded tokens of a micro-batch; a step has about as many.
        batch_size: examples of a step; None: derived from `tokens`.
        peft_casts: False switches off peft's cast of a layer's inputs to the adapter's float32.
    """
    tokens = bench.tokens(tokens)
    setup = bench.settle(setup, tokens)
    built = bench.built(setup)
    for module in built.engine.module.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = peft_casts
    data, steps = bench.rows(setup, built.flops, tokens, batch_size)
    micros = [micro for step in steps for micro in data.micro_batches(step, tokens, 1)[0]]
    largest = max(steps, key=data.num_padded_tokens)

    def take(step) -> torch.Tensor:
        return optimizer_step(built.engine, data, step, tokens)

    bench.reset_peak()
    timed = bench.time_steps(take, steps, [largest, *steps[:2]])
    peak = bench.peak_bytes()
    waits = bench.count_waits(lambda: [take(step) for step in steps[:WAIT_STEPS]])
    micro_tokens = max(data.num_padded_tokens(micro) for micro in micros)
    used = used_ids(setup.task, built.config.vocab_size)
    planned = planned_bytes(built.config, built.settings, micro_tokens, longest_row(setup.task), used)
    return figures(timed, [data.num_tokens(step) for step in steps], len(steps[0]), built.flops) | {
        "attention": "varlen" if data.packs else setup.attention,
        "checkpointing": setup.checkpointing,
        "passes": built.passes,
        "micro_batches": len(micros) / len(steps),
        "padding": sum(map(data.num_padded_tokens, micros)) / data.num_tokens(np.arange(len(data.ids))),
        "peak_bytes": peak,
        "planned_bytes": planned,
        "waits_per_step": None if waits is None else waits / WAIT_STEPS,
    }


def figures(timed: Timed, step_tokens: list[int], batch_size: int, flops: int) -> dict:
    """Return the speed of some steps: real tokens per second, and utilisation by `flops` useful operations a token."""
    num_tokens = sum(step_tokens[: timed.num_steps])
    return {
        "batch_size": batch_size,
        "num_steps": timed.num_steps,
        "tokens_per_step": num_tokens / timed.num_steps,
        "step_s": timed.seconds / timed.num_steps,
        "tokens_per_s": num_tokens / timed.seconds,
        "utilisation": num_tokens * flops / timed.seconds / PEAK_FLOPS,
        "loss": timed.loss,
    }


def train_with_trainer(bench: Bench, setup: Setup, tokens: int) -> dict:
    """Time transformers.Trainer with its best flags on the same examples, as many per step.

    Batches are as large as memory clearly allows: at most twice `tokens` padded tokens, accumulated to a step.
    """
    tokens = bench.tokens(tokens)
    bench.release()
    fresh_accelerator()
    torch.manual_seed(0)
    setup = bench.settle(setup, 2 * tokens)
    settings = settings_for(setup.shape, "bf16", activation_checkpointing=setup.checkpointing)
    model = random_model(setup.shape.config(bench.toy), settings, bench.device)
    flops = useful_flops(weight_counts(model))
    data, steps = bench.rows(setup, flops, tokens, None)
    batch_size = len(steps[0])
    accumulation = -(-batch_size * longest_row(setup.task) // (2 * tokens))
    clock = _Clock(bench, num_steps=len(steps))

    class Counting(Trainer):
        def compute_loss(self, model, inputs, *rest, **kwargs):
            clock.count(inputs["attention_mask"])
            return super().compute_loss(model, inputs, *rest, **kwargs)

    bench.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            bf16=True,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            dataloader_num_workers=bench.count(2, 0),
            per_device_train_batch_size=-(-batch_size // accumulation),
            gradient_accumulation_steps=accumulation,
            max_steps=clock.num_warm_up + len(steps),
            learning_rate=PEAK_RATE,
            weight_decay=WEIGHT_DECAY,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            use_cpu=bench.device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
        )
        rows = [{"input_ids": data.encoded.row(row), "labels": label} for row, label in enumerate(data.labels.tolist())]
        # the Trainer sorts at most a quarter of its rows at a time: with four times the rows it sorts the whole set
        trainer = Counting(model=model, args=arguments, train_dataset=rows * 4, data_collator=_pad, callbacks=[clock])
        loss = trainer.train().training_loss
    peak = bench.peak_bytes()
    del trainer, model
    bench.release()
    real, padded = int(clock.real), clock.padded
    return {
        "batch_size": batch_size,
        "num_steps": clock.num_timed,
        "tokens_per_step": real / clock.num_timed,
        "step_s": clock.seconds / clock.num_timed,
        "tokens_per_s": real / clock.seconds,
        "utilisation": real * flops / clock.seconds / PEAK_FLOPS,
        "loss": loss,
        "attention": setup.attention,
        "checkpointing": setup.checkpointing,
        "micro_batches": accumulation,
        "padding": padded / real,
        "peak_bytes": peak,
    }


class _Clock(TrainerCallback):
    """Times the Trainer's steps after a few to warm up, and stops early at twice the time limit."""

    num_warm_up = 3

    def __init__(self, bench: Bench, num_steps: int):
        self.bench, self.num_steps = bench, num_steps
        self.real, self.padded, self.num_timed, self.seconds, self._started = 0, 0, 0, 0.0, None

    def count(self, mask: torch.Tensor) -> None:
        if self._started is not None:
            self.real = self.real + mask.sum()  # stays on the device: no wait
            self.padded += mask.numel()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.num_warm_up:
            self.bench.wait()
            self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.num_timed = state.global_step - self.num_warm_up
        late = self._started is not None and time.perf_counter() - self._started > 2 * self.bench.limit_s
        if self.num_timed == self.num_steps or (late and self.num_timed > 0):
            self.bench.wait()
            self.seconds = time.perf_counter() - self._started
            control.should_training_stop = True


def _pad(features: list[dict]) -> dict:
    """Pad as DataCollatorWithPadding does, without a tokenizer."""
    rows = [torch.as_tensor(feature["input_ids"], dtype=torch.int64) for feature in features]
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([each["labels"] for each in features])}
