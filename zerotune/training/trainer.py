"""--engine trainer: the same run with the Hugging Face Trainer, as a comparison for the loop.

Rows, weights, optimizer groups, learning rates, examples per step, evaluation, checkpoints and logs are the loop's.
Data loading, accumulation, autocast, clipping, DDP and the steps are the Trainer's, with the flags of an experienced
user: bf16, dynamic padding, batches grouped by length, fused AdamW. The forward pass is transformers' own.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from zerotune.errors import Refused
from zerotune.randomness import derive_seed
from zerotune.settings.groups import TrainSettings
from zerotune.training.classification import UNLABELLED, LabelledData
from zerotune.training.engine import Engine
from zerotune.training.loop import Step, TrainingLoop


def check_trainer_flags(settings: TrainSettings) -> None:
    """Refuse flags that --engine loop supports and --engine trainer does not."""
    num_processes = settings.run.devices or int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = settings.optimisation.batch_size
    if settings.head == "generate":
        raise Refused("--engine trainer tunes a classifier: use --head classify, or --engine loop")
    if settings.optimisation.class_weights != "none":
        raise Refused(
            "--engine trainer divides a step's loss by its number of examples, which --class-weights "
            f"{settings.optimisation.class_weights} does not allow: leave that out, or use --engine loop"
        )
    if settings.deepspeed is not None:
        raise Refused("--engine trainer runs without DeepSpeed: leave it out, or use --engine loop")
    if settings.optimisation.gradient_exchange != "fp32":
        raise Refused(
            "--engine trainer exchanges gradients in fp32: leave --gradient-exchange out, or use --engine loop"
        )
    if settings.model.attention == "varlen":
        raise Refused("--engine trainer pads its batches: leave --attention varlen out, or use --engine loop")
    if settings.model.precision == "fp16" and not torch.cuda.is_available() and not settings.run.plan:
        raise Refused("--engine trainer computes in fp16 on a GPU only: use --precision fp32 or bf16, or --engine loop")
    if batch_size % num_processes:
        raise Refused(
            f"--engine trainer gives each process equally many examples of a step, and --batch-size {batch_size} "
            f"is not a multiple of {num_processes} processes: choose one that is, or use --engine loop"
        )


@dataclass(frozen=True)
class TrainerOrder(LabelledData):
    """Labelled texts in the Trainer's own order: grouped by length, drawn from (seed, epoch)."""

    def epoch_steps(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Split one epoch into steps, as the Trainer's sampler would draw them from a seeded generator."""
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        order = np.array(get_length_grouped_indices(self.lengths.tolist(), batch_size, generator=generator))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def train_with_trainer(loop: TrainingLoop, settings: TrainSettings) -> None:
    """Let a Trainer take the steps of a loop, which resumes, logs, validates, saves and stops between them.

    Raises whatever iterating over the loop raises.
    """
    steps = iter(loop)
    first = next(steps, None)
    if first is None:
        return
    engine, schedule = loop.engine, loop.schedule
    # `_BetweenSteps` sets the rates: a Trainer's scheduler does not advance where fp16 skips an update
    scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda done: 1.0)

    def loss_of(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        loss = mean_over_step(logits, labels, num_items_in_batch, settings.optimisation.label_smoothing)
        engine.note_loss(loss)
        return loss

    trainer = _StepTrainer(
        engine,
        args=_training_arguments(settings, loop.data, schedule.num_steps - first.number + 1),
        data_collator=partial(_batch_of, loop.data),
        train_dataset=_remaining_rows(loop, first.number, settings.optimisation.batch_size),
        compute_loss_func=loss_of,
        optimizers=(engine.optimizer, scheduler),
        callbacks=[_BetweenSteps(steps, first, settings.optimisation.seed, loop)],
    )
    if engine.scaler:
        trainer.accelerator.scaler = engine.scaler
    trainer.train()


class _StepTrainer(Trainer):
    """A Trainer that reports gradient norms to the engine."""

    def __init__(self, engine: Engine, **kwargs):
        self.engine = engine
        super().__init__(model=engine.module, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        self.engine.note_norm(super()._get_grad_norm(model, grad_norm))
        return None  # so that the Trainer does not log it: that would wait for the device


class _BetweenSteps(TrainerCallback):
    """Advances the loop after each step of the Trainer."""

    def __init__(self, steps: Iterator[Step], first: Step, seed: int, loop: TrainingLoop):
        self.steps, self.step, self.seed, self.loop = steps, first, seed, loop

    def on_step_begin(self, args, state, control, **kwargs):
        self.loop.engine.set_rates(self.step.rate_factor)
        if self.loop.has_dropout:
            torch.manual_seed(derive_seed(self.seed, self.step.number, self.loop.accelerator.process_index))

    def on_step_end(self, args, state, control, **kwargs):
        self.step = next(self.steps, None)
        control.should_training_stop = self.step is None


def _remaining_rows(loop: TrainingLoop, first: int, batch_size: int) -> list[int]:
    """Return the rows of all remaining steps, one step after the other.

    An epoch's last step, if smaller, is filled up with a row that does not count, so that all ranks get equally many;
    Accelerate would repeat examples instead.
    """
    rows, filler = [], len(loop.data.ids)
    for number in range(first, loop.schedule.num_steps + 1):
        step = loop.step_rows(number).tolist()
        rows += step + [filler] * (batch_size - len(step))
    return rows


def _batch_of(data: LabelledData, rows: list[int]) -> dict[str, torch.Tensor]:
    """Return a micro-batch's padded inputs with labels, on the CPU. Filler becomes an unlabelled example."""
    rows = np.array(rows)
    is_filler = rows == len(data.ids)
    shown = np.where(is_filler, np.argmin(data.lengths), rows)
    labels = np.where(is_filler, UNLABELLED, data.labels[shown])
    return {**data.inputs(shown, torch.device("cpu")), "labels": torch.from_numpy(labels)}


def mean_over_step(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return a micro-batch's share of the step's mean cross entropy; the Trainer undoes DDP's division by the ranks.

    Without this function the Trainer would average micro-batch means, and multiply the loss by the number of processes
    if the model's forward takes **kwargs, as if the loss had been divided by a global count.

    Args:
        logits: [rows, num_labels].
        labels: [rows], UNLABELLED in filler rows.
        num_items_in_batch: labelled rows of the step over all micro-batches and ranks.
    """
    loss_sum = functional.cross_entropy(
        logits.float(), labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=label_smoothing
    )
    return loss_sum / num_items_in_batch


def cut_step(num_examples: int, longest: int, budget: int) -> tuple[int, int]:
    """Cut one device's share of a step into micro-batches of equal size, as few as the budget allows.

    Args:
        num_examples: of one device in one step.
        longest: tokens of the longest example.
        budget: most padded tokens in one micro-batch, exceeded only by a single long example.
    Returns:
        (examples in a micro-batch, micro-batches in a step): the Trainer's per_device_train_batch_size and
        gradient_accumulation_steps, whose product is `num_examples`.
    """
    sizes = [size for size in range(1, num_examples + 1) if num_examples % size == 0 and size * longest <= budget]
    size = max(sizes, default=1)
    return size, num_examples // size


def _training_arguments(settings: TrainSettings, data: LabelledData, num_steps: int) -> TrainingArguments:
    optimisation, precision = settings.optimisation, settings.model.precision
    on_gpu, num_processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    share = optimisation.batch_size // num_processes
    micro_batch, num_micro_batches = cut_step(share, int(data.lengths.max()), optimisation.tokens_per_device)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # `precision` already includes the launcher's setting
    arguments = TrainingArguments(
        output_dir=str(settings.run.output_dir / "checkpoints"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=num_micro_batches,
        max_steps=num_steps,
        max_grad_norm=optimisation.max_grad_norm or 0.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=optimisation.seed % 2**32,  # numpy's limit
        train_sampling_strategy="sequential",  # the rows are in the loop's order
        use_cpu=not on_gpu,
        ddp_backend="gloo" if num_processes > 1 and not on_gpu else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every micro-batch
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # else, with several GPUs visible, the Trainer would use DataParallel with as many batches
    return arguments
