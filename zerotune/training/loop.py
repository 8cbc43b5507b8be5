"""The mechanics of a training loop, behind an iterator that the script drives: resume, log, validate, save, stop.

    for step in loop:
        for batch in step:
            …forward, loss, engine.backward(loss * batch.weight, batch.is_last)
        engine.update(step.rate_factor)

A step is the same at any world size: the same examples, and one loss that is a sum divided by one global count.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from zerotune.errors import Preempted, Refused
from zerotune.models.loading import has_dropout
from zerotune.models.used_rows import decay_unused_rows
from zerotune.randomness import derive_seed
from zerotune.run.cpu import give_back_memory
from zerotune.run.folder import RunFolder
from zerotune.run.process import is_main_process
from zerotune.run.stopping import StopSignal
from zerotune.settings.groups import OptimisationSettings
from zerotune.terminal import show_progress
from zerotune.training import checkpoints
from zerotune.training.data import Batch, TrainingData
from zerotune.training.engine import Engine
from zerotune.training.progress import Progress
from zerotune.training.saving import Saver, resume
from zerotune.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class MicroBatch(Batch):
    """A rank's part of a step.

    Attributes:
        weight: factor for the sum of its losses: 1 / the number of targets of the whole step on all ranks, or 1 / the
            sum of their weights. 0 for a filler, which keeps a rank with less work in step with the others.
        is_last: whether it is this rank's last one of the step; the ranks exchange gradients with it.
    """

    weight: float
    is_last: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step: iterating over it gives this rank's micro-batches.

    Attributes:
        number: counted from 1.
        rows: the step's examples on all ranks, [batch size].
        rate_factor: share of the peak learning rates.
    """

    number: int
    rows: np.ndarray
    rate_factor: float
    micro_batches: Callable[[], Iterator[MicroBatch]]

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micro_batches()


class LateReading:
    """An asynchronous copy of a device's numbers to the host. Reading it does not wait for work queued later."""

    def __init__(self, values: torch.Tensor):
        self._host = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the numbers and return them."""
        if self._arrived:
            self._arrived.synchronize()
        return self._host.tolist()


@dataclass(frozen=True)
class _Unread:
    """A step whose loss has not been read yet."""

    number: int
    rows: np.ndarray
    on_its_way: Path | None
    reading: LateReading


class TrainingLoop:
    """The steps of a run, from its newest checkpoint to the end of the schedule, all ranks together.

    Args:
        run: the open run folder.
        data: the training split.
        validate: () -> metrics of the validation split with the current weights, including "loss" and that of
            --choose-by; all ranks take part. It may raise Preempted.
        stop_signal: set up as early as possible.
    """

    def __init__(
        self,
        run: RunFolder,
        engine: Engine,
        data: TrainingData,
        schedule: Schedule,
        optimisation: OptimisationSettings,
        validate: Callable[[], dict[str, float]],
        stop_signal: StopSignal,
    ):
        self.run, self.engine, self.data, self.schedule = run, engine, data, schedule
        self.optimisation, self.validate, self.stop_signal = optimisation, validate, stop_signal
        self.accelerator = engine.accelerator
        self.progress = Progress()
        self.saver = Saver(engine, run)
        self.has_dropout = has_dropout(engine.module)
        self._epoch_steps: tuple[int, list[np.ndarray]] = (-1, [])
        self._unread: _Unread | None = None
        self._stop_wanted = False
        self._save_wanted = False  # by the clock
        self._arrived: Path | None = None  # the newest checkpoint whose files all ranks have written in the background

    def __iter__(self) -> Iterator[Step]:
        """Yield the remaining steps. Between steps, log, validate, save and stop when due.

        Raises:
            Preempted: a rank was asked to stop; a checkpoint has been saved.
            Refused: the checkpoint cannot be resumed, a loss or gradient norm is not finite, or the disk is full.
        """
        self.progress = progress = resume(self.engine, self.run, self.optimisation.optimizer)
        self.run.forget_metrics_after(progress.step, progress.evaluated_step)
        self.run.note_training_start()
        self.engine.model.train()
        self.stop_signal.can_save = True
        if self.schedule.evaluates_at(progress.step) and progress.evaluated_step < progress.step:
            self._evaluate_and_save()  # a stop interrupted this evaluation
        total, hidden = self.schedule.num_steps, not is_main_process()
        with show_progress("train", total, progress.step, unit="step", hidden=hidden) as bar:
            while not self.is_over:
                started = time.perf_counter()
                step = self._step(progress.step + 1)
                yield step
                self._take_status(step)
                status = self._read_status_where_due()
                if self.accelerator.device.type == "cpu":
                    give_back_memory()
                progress.train_seconds += time.perf_counter() - started
                bar.update()
                self._at_boundary(status)
        self.saver.close()
        self.stop_signal.can_save = False

    @property
    def is_over(self) -> bool:
        """Whether the schedule's last step is done, or patience has run out."""
        return self.progress.step >= self.schedule.num_steps or self.progress.stopped_early

    # --- a step ---

    def step_rows(self, number: int) -> np.ndarray:
        """Return the examples of a step, [batch size]."""
        epoch = self.schedule.epoch(number)
        if self._epoch_steps[0] != epoch:
            steps = self.data.epoch_steps(self.optimisation.batch_size, self.optimisation.seed, epoch)
            wanted = self.schedule.steps_per_epoch
            assert len(steps) == wanted, f"epoch_steps returned {len(steps)} steps of an epoch that has {wanted}"
            self._epoch_steps = (epoch, steps)
        return self._epoch_steps[1][(number - 1) % self.schedule.steps_per_epoch]

    def _step(self, number: int) -> Step:
        rows = self.step_rows(number)
        return Step(number, rows, self.schedule.rate_factor(number), lambda: self._micro_batches(number, rows))

    def _micro_batches(self, step: int, rows: np.ndarray) -> Iterator[MicroBatch]:
        data, accelerator = self.data, self.accelerator
        rank = accelerator.process_index
        mine = data.micro_batches(rows, self.optimisation.tokens_per_device, accelerator.num_processes)[rank]
        num_targets = data.num_targets(rows)
        for number, own in enumerate(mine):
            is_last = number == len(mine) - 1
            weight = float(len(own) > 0) / num_targets
            filler = rows[np.argmin(data.lengths[rows])][None]  # the step's shortest example
            if self.has_dropout:
                torch.manual_seed(derive_seed(self.optimisation.seed, step, rank, number))
            with self.engine.gradients_stay_local(is_last):
                batch = data.batch(own if len(own) else filler, accelerator.device)
                yield MicroBatch(**vars(batch), weight=weight, is_last=is_last)

    # --- a step's loss, read one step late unless it is needed sooner, so that a GPU never waits for the host ---

    def _take_status(self, step: Step) -> None:
        """Queue the readout of a step's loss and gradient norm, and of the ranks' flags.

        Flags: a stop was requested, checkpoint files have arrived, a checkpoint is due by rank 0's clock.
        """
        loss, norm = self.engine.take_loss_and_norm()
        on_its_way = self.saver.on_its_way
        is_due = self.accelerator.is_main_process and self.saver.is_due_by_clock
        flags = (self.stop_signal.name is not None, self.saver.has_arrived, is_due)
        status = torch.stack([loss, *(torch.full_like(loss, float(flag)) for flag in flags)])
        if self.accelerator.num_processes > 1:
            status = self.accelerator.reduce(status, "sum")
        self._read_status()
        norm = torch.as_tensor(norm, dtype=status.dtype, device=status.device)
        self._unread = _Unread(step.number, step.rows, on_its_way, LateReading(torch.cat([status, norm[None]])))
        self.progress.count_step(len(step.rows), self.data.num_tokens(step.rows))

    def _read_status(self) -> dict | None:
        """Return loss and gradient norm of the step that is still unread, or None."""
        if self._unread is None:
            return None
        unread, self._unread = self._unread, None
        loss, num_stops, num_arrived, num_due, norm = unread.reading.read()
        self._check_finite(unread.number, unread.rows, loss, norm)
        self.progress.count_loss(loss, self.data.num_targets(unread.rows))
        self._stop_wanted = self._stop_wanted or num_stops > 0
        self._save_wanted = self._save_wanted or num_due > 0
        self._arrived = unread.on_its_way if num_arrived == self.accelerator.num_processes else None
        return {"loss": loss, "grad_norm": norm}

    def _read_status_where_due(self) -> dict | None:
        schedule, step = self.schedule, self.progress.step
        due = schedule.logs_at(step) or schedule.evaluates_at(step) or schedule.saves_at(step) or self._save_wanted
        on_cpu = self.accelerator.device.type == "cpu"  # where reading late gains nothing
        return self._read_status() if due or self._stop_wanted or on_cpu else None

    def _check_finite(self, step: int, rows: np.ndarray, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise Refused(self._not_finite(f"the loss of step {step} is {loss}", rows))
        if not (self.engine.scaler or math.isfinite(norm)):  # a loss scaler skips such steps and lowers its scale
            raise Refused(self._not_finite(f"the gradient norm of step {step} is {float(norm)}", rows))

    def _not_finite(self, found: str, rows: np.ndarray) -> str:
        ids = [self.data.ids[row] for row in rows]
        self.saver.close()
        good, _ = checkpoints.newest_whole(self.saver.root, self.run.run_id)
        return (
            f"{found}; batch ids {', '.join(ids)}; last good checkpoint: {good or 'none'}; "
            "start again in another --output-dir with a lower --learning-rate, or with --precision bf16 or fp32"
        )

    # --- between two steps ---

    def _at_boundary(self, status: dict | None) -> None:
        """Log, validate, save and stop if due.

        Args:
            status: loss and grad_norm of the last step; None if they are still unread.
        """
        schedule, step = self.schedule, self.progress.step
        if self._arrived is not None and self._arrived == self.saver.on_its_way:
            self.saver.finish()
        if schedule.logs_at(step):
            self._log_step(status)
        self._evaluate_and_save()
        if self._stop_wanted and step < schedule.num_steps:
            self.saver.close()
            raise self.stop_signal.stopped(f"stopped by {{name}} after step {step} and saved: {{way_out}}")

    def _evaluate_and_save(self) -> None:
        """Validate and save if due.

        If a stop interrupts the evaluation, save the step and raise Preempted; the resumed run evaluates it."""
        schedule, step = self.schedule, self.progress.step
        try:
            improved = schedule.evaluates_at(step) and self._evaluate()
        except Preempted:
            self.saver.save(self.progress)
            self.saver.close()
            raise
        if schedule.saves_at(step) or self.progress.stopped_early or self._stop_wanted or self._save_wanted:
            self.saver.save(self.progress)
            self._save_wanted = False
        elif improved:
            self.saver.save(self.progress, weights_alone=True)

    def _log_step(self, status: dict) -> None:
        progress = self.progress
        row = {
            "step": progress.step,
            "epoch": progress.step / self.schedule.steps_per_epoch,
            "loss": status["loss"],
            "learning_rate": self.optimisation.learning_rate * self.engine.rate_factor,
            "grad_norm": status["grad_norm"] if math.isfinite(status["grad_norm"]) else None,
            "tokens": progress.num_tokens,
            "tokens_per_s": progress.num_tokens / progress.train_seconds,
        }
        self.run.log(row)

    def _evaluate(self) -> bool:
        """Validate the weights of this step. Returns whether they are the best so far."""
        progress, optimisation = self.progress, self.optimisation
        self.engine.model.eval()
        self.apply_unused_decay(progress.step)
        values = self.validate()
        self.engine.model.train()
        if not math.isfinite(values["loss"]):
            found = f"the evaluation after step {progress.step} has a loss of {values['loss']}"
            raise Refused(self._not_finite(found, self.step_rows(progress.step)))
        value = -values["loss"] if optimisation.choose_by == "loss" else values[optimisation.choose_by]
        improved = progress.record_evaluation(value, optimisation.patience)
        shown = {"train_loss": progress.take_mean_loss()} | {f"eval_{name}": each for name, each in values.items()}
        self.run.log({"step": progress.step, "epoch": progress.step / self.schedule.steps_per_epoch, **shown})
        line = "  ".join(f"{name} {each:{'.4f' if abs(each) < 1e6 else '.4g'}}" for name, each in shown.items())
        if is_main_process():
            tqdm.write(f"step {progress.step}: {line}{'  (best so far)' if improved else ''}")
            sys.stdout.flush()
        return improved

    def apply_unused_decay(self, step: int) -> None:
        """Apply the weight decay that AdamW would have applied by this step to the embedding's untrained rows."""
        factors = [self.schedule.rate_factor(earlier) for earlier in range(1, step + 1)]
        rate, decay = self.optimisation.learning_rate, self.optimisation.weight_decay
        decay_unused_rows(self.engine.module, factors, rate, decay)
