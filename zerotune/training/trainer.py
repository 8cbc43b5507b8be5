"""--engine trainer: the same run by the Hugging Face Trainer, a counterpart to hold the loop against.

Data, weights, optimizer groups, learning rates, examples a step, evaluation, checkpoints and logs are the loop's. Data
loading, accumulation, autocast, clipping, DDP and the steps are the Trainer's, at the flags of a user who knows them:
bf16, dynamic padding, batches grouped by length, fused AdamW. The forward pass is transformers'.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from zerotune.evaluation.scorers import UNLABELLED
from zerotune.models.heads import SequenceClassifier, is_encoder
from zerotune.models.loading import ModelSettings
from zerotune.randomness import derive_seed
from zerotune.run.folder import RunFolder
from zerotune.training.classification import LabelledData
from zerotune.training.engine import load_training_state, save_training_state
from zerotune.training.loop import Loop, Progress
from zerotune.training.schedule import Schedule, schedule_for
from zerotune.training.stages import load_and_count, optimizer_for


def cut_step(num_examples: int, longest: int, budget: int) -> tuple[int, int]:
    """Cut one device's share of a step into micro-batches of one size, as few as fit the budget.

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


def mean_over_step(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """This micro-batch's part of the step's mean cross entropy; the Trainer undoes DDP's division by the ranks.

    Without such a function the Trainer would take the mean of micro-batch means; and it multiplies the loss by the
    number of processes where a model's forward takes **kwargs, as if that loss had been divided by a global count.

    Args:
        logits: [rows, num_labels].
        labels: [rows], UNLABELLED in rows that only fill up a batch.
        num_items_in_batch: labelled rows of the step over all micro-batches and ranks.
    """
    loss_sum = functional.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return loss_sum / num_items_in_batch


def build_engine(
    run: RunFolder, args, settings: ModelSettings, config, tokenizer, labels: tuple[str, ...], train: LabelledData
) -> "TrainerEngine":
    """Load the model with its head, count its parameters, and give it to a Trainer; as stages.build_engine does.

    Its forward pass is transformers' own: what the loop does more quickly (zerotune.models.cpu_kernels, the last
    layer's unpooled tokens, embedding rows that are not used) is left out.
    """
    if settings.attention == "auto" and is_encoder(config):
        settings = replace(settings, attention="sdpa")
    classifier = load_and_count(run, args.head, replace(settings, drop_unpooled=False), config, tokenizer, labels)
    return TrainerEngine(classifier, train, schedule_for(args, len(train.ids)), args, settings.precision, run)


class TrainerEngine(Trainer):
    """A Trainer that logs, evaluates, saves and stops where a `TrainerLoop` says, with the `Engine`'s members for it.

    All ranks call every method together.
    """

    deepspeed = None

    def __init__(
        self,
        classifier: SequenceClassifier,
        data: LabelledData,
        schedule: Schedule,
        args,
        precision: str,
        run: RunFolder,
    ):
        optimizer = optimizer_for(classifier, args, run.accelerator.device)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule.rate_factor(done + 1))
        self.loop: TrainerLoop | None = None  # made around this engine, and sets itself here
        self._data = data
        super().__init__(
            model=classifier,
            args=_training_arguments(args, precision, data, schedule, run),
            data_collator=self._collate,
            train_dataset=range(len(data.ids) + 1),  # indices, which the collator makes batches of; the last is filler
            compute_loss_func=mean_over_step,
            optimizers=(optimizer, scheduler),
            callbacks=[_AtSteps(self)],
        )

    @property
    def module(self) -> SequenceClassifier:
        """The model as it was given, without wrappers."""
        return self.model

    @property
    def scaler(self):
        """The loss scaler of fp16, else None."""
        return self.accelerator.scaler

    def forward(self, **inputs) -> torch.Tensor:
        """The model's output under the run's precision, which Accelerate has put around its forward."""
        return self.model(**inputs)

    def _stateful(self) -> dict:
        return {"optimizer": self.optimizer, "scheduler": self.lr_scheduler, "scaler": self.scaler}

    def checkpoint_bytes(self) -> int:
        """About how many bytes `save` writes: weights that train and two float32 moments."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    def save(self, folder: Path) -> list[Path]:
        """Write trainable weights, optimizer and the Trainer's state into `folder`. Returns this rank's files."""
        if not self.accelerator.is_main_process:
            return []
        self.state.save_to_json(folder / TRAINER_STATE_NAME)
        return [*save_training_state(folder, self.model, self._stateful()), folder / TRAINER_STATE_NAME]

    def load(self, folder: Path, weights_alone: bool = False) -> None:
        """Restore what `save` wrote, but for the step, which `train(resume_from_checkpoint=folder)` reads."""
        load_training_state(folder, self.model, {} if weights_alone else self._stateful())

    def gathered_state_dict(self) -> None:
        """None: the module holds its own weights."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called with the loss where `_AtSteps` has asked for it, and once with a summary of the training."""
        if "loss" in logs:
            self.loop.at_boundary(logs)
            self.control.should_training_stop |= self.loop.progress.stopped_early

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return _StepSampler(self.loop)

    def _collate(self, indices: list[int]) -> dict[str, torch.Tensor]:
        indices = np.array(indices)
        is_filler = indices == len(self._data.ids)
        rows = np.where(is_filler, np.argmin(self._data.lengths), indices)
        labels = np.where(is_filler, UNLABELLED, self._data.labels[rows])
        return {**self._data.batch(rows, torch.device("cpu")), "labels": torch.from_numpy(labels)}


def _training_arguments(
    args, precision: str, data: LabelledData, schedule: Schedule, run: RunFolder
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    share = args.batch_size // run.accelerator.num_processes
    micro_batch, num_micro_batches = cut_step(share, int(data.lengths.max()), args.tokens_per_device)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the launcher's word has had its say in `precision`
    arguments = TrainingArguments(
        output_dir=str(run.path / "checkpoints"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=num_micro_batches,
        max_steps=schedule.num_steps,
        max_grad_norm=args.max_grad_norm or 0.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=args.seed % 2**32,  # numpy's limit
        use_cpu=not on_gpu,
        ddp_backend="gloo" if run.accelerator.num_processes > 1 and not on_gpu else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        logging_nan_inf_filter=False,  # it would show the mean of earlier losses in place of one that is not finite
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # of one process that sees several the Trainer would make a DataParallel, of as many batches
    return arguments


class _StepSampler(Sampler):
    """The examples of an epoch's steps; the last step is filled up, so that all ranks get equally many rows.

    Accelerate would repeat examples for that. The order is the Trainer's by length, drawn from (seed, epoch), where its
    own sampler draws from the global generator: dropout moves that differently on each rank.
    """

    def __init__(self, loop: "TrainerLoop"):
        self.loop = loop

    def __len__(self) -> int:
        return self.loop.schedule.steps_per_epoch * self.loop.args.batch_size

    def __iter__(self) -> Iterator[int]:
        loop, num_steps = self.loop, self.loop.schedule.steps_per_epoch
        start = loop.progress.step // num_steps * num_steps
        for step in range(start + 1, start + num_steps + 1):
            indices = loop.step_indices(step).tolist()
            yield from indices + [len(loop.data.ids)] * (loop.args.batch_size - len(indices))


class _AtSteps(TrainerCallback):
    def __init__(self, engine: TrainerEngine):
        self.engine = engine

    def on_train_begin(self, args, state, control, **kwargs):
        self.engine.loop.before_training()

    def on_step_begin(self, args, state, control, **kwargs):
        self.engine.loop.before_step(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = self.engine.loop.after_step(state.global_step)


class TrainerLoop(Loop):
    """A `Loop` whose steps the Trainer makes: started, resumed, stopped, logged and evaluated in the same way."""

    NAME = "trainer"

    def __init__(self, engine: TrainerEngine, data, schedule, run, args, evaluate, stop_signal):
        super().__init__(engine, data, schedule, run, args, evaluate, stop_signal)
        engine.loop = self
        self._resumed_from: Path | None = None
        self._ticked = 0.0
        self._num_logged = 0  # examples whose loss the Trainer has told

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint that `checkpoints.defect` finds nothing wrong with."""
        super().resume(folder)
        self._resumed_from, self._num_logged = folder, self.progress.num_examples

    def train(self) -> Progress:
        """As Loop.train, and raises the same."""
        if not self._is_over():
            with self._progress_bar() as self._bar:
                self.engine.train(resume_from_checkpoint=self._resumed_from and str(self._resumed_from))
        return self.progress

    def before_training(self) -> None:
        """Start the clock of train_seconds."""
        self._ticked = time.perf_counter()

    def before_step(self, step: int) -> None:
        """Seed the step's dropout."""
        if self.has_dropout:
            torch.manual_seed(derive_seed(self.args.seed, step, self.accelerator.process_index))

    def after_step(self, step: int) -> bool:
        """Count a step. Returns whether the Trainer is to log it.

        The Trainer logs the mean loss since it last did: it does so a step earlier too, which leaves one step's loss.
        """
        self._count_step(step, self.step_indices(step))
        self._tick()
        self._bar.update()
        self._stop_wanted = self._any_rank_is_stopped()
        return self._stop_wanted or self._is_due(step) or self._is_due(step + 1)

    def at_boundary(self, logs: dict[str, float]) -> None:
        """Do what is due after the step that the Trainer has just logged."""
        step, norm = self.progress.step, float(logs.get("grad_norm", np.nan))
        self._check_finite(step, self.step_indices(step), logs["loss"], norm)
        self._count_loss(logs["loss"], self.progress.num_examples - self._num_logged)
        self._num_logged = self.progress.num_examples
        self._tick()
        self._at_boundary({"loss": logs["loss"], "grad_norm": norm})
        self._ticked = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.train_seconds += now - self._ticked
        self._ticked = now

    def _is_due(self, step: int) -> bool:
        schedule = self.schedule
        return schedule.logs_at(step) or schedule.evaluates_at(step) or schedule.saves_at(step)

    def _any_rank_is_stopped(self) -> bool:
        is_noted = self.stop_signal.name is not None
        if self.accelerator.num_processes == 1:
            return is_noted  # a GPU is not waited for
        noted = torch.tensor(float(is_noted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(noted, "sum"))

    def _epoch_steps(self, epoch: int) -> list[np.ndarray]:
        size, generator = self.args.batch_size, torch.Generator().manual_seed(derive_seed(self.args.seed, epoch))
        order = np.array(get_length_grouped_indices(self.data.lengths.tolist(), size, generator=generator))
        return [order[start : start + size] for start in range(0, len(order), size)]
