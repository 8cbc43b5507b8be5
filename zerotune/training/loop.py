"""The training loop. A step is the same at any world size: the same examples, one loss over one global count."""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from zerotune.errors import Preempted, Refused
from zerotune.randomness import derive_seed
from zerotune.run.cpu import give_back_memory
from zerotune.run.process import is_main_process
from zerotune.training import checkpoints
from zerotune.training.scratch import ScratchSaves


@dataclass
class Progress:
    """Where a run is. Saved with every checkpoint, enough to go on from it."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    train_seconds: float = 0.0
    num_examples: int = 0
    num_tokens: int = 0
    # since the last evaluation: the sum of the training loss, and the examples or answer tokens that it is a sum over
    loss_sum: float = 0.0
    num_targets: int = 0
    evaluated_step: int = 0  # the last one whose evaluation is done

    def record_evaluation(self, value: float, patience: int | None) -> bool:
        """Note an evaluation's value, greater is better.

        Returns:
            Whether it is the best so far; ties keep the earlier one.
        """
        improved = self.best_value is None or value > self.best_value
        if improved:
            self.best_step, self.best_value, self.evaluations_without_gain = self.step, value, 0
        else:
            self.evaluations_without_gain += 1
            self.stopped_early = patience is not None and self.evaluations_without_gain >= patience
        return improved


class LateReading:
    """Numbers that a device has yet to compute, on their way to the host: reading waits for nothing queued later."""

    def __init__(self, values: torch.Tensor):
        self._host = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until they have arrived."""
        if self._arrived:
            self._arrived.synchronize()
        return self._host.tolist()


class Loop:
    """Training from a step to the end of the schedule, all ranks together.

    Args:
        engine: zerotune.training.engine.Engine.
        data: the train split, a LabelledData, an AnswerData or a GenerationData: ids, lengths, loss_sum,
            num_targets, num_tokens, epoch_steps and micro_batches.
        schedule: zerotune.training.schedule.Schedule.
        run: zerotune.run.folder.RunFolder.
        args: batch_size, tokens_per_device, learning_rate (peak, to be logged), seed, patience, keep_checkpoints,
            scratch_dir.
        evaluate: (step) -> dict of eval_* values and "choose_by", greater is better; all ranks take part.
        stop_signal: a StopSignal, set up as early as can be.
    """

    NAME = "loop"  # of --engine, for task.json

    def __init__(self, engine, data, schedule, run, args, evaluate, stop_signal):
        self.engine, self.data, self.schedule, self.run, self.args = engine, data, schedule, run, args
        self.evaluate, self.stop_signal = evaluate, stop_signal
        self.accelerator = engine.accelerator
        self.progress = Progress()
        self.checkpoint_root = Path(run.path) / "checkpoints"
        self.has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in engine.module.modules()) or _drops(
            engine
        )
        self._steps: tuple[int, list[np.ndarray]] = (-1, [])
        self._unread: tuple[int, np.ndarray, int | None, LateReading] | None = None
        self._stop_wanted = False
        self._arrived: int | None = None  # the step of the newest checkpoint whose files all ranks have moved
        self.scratch = None
        if args.scratch_dir:
            self.scratch = ScratchSaves(args.scratch_dir, self.checkpoint_root, args.keep_checkpoints, self.accelerator)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint that `checkpoints.defect` finds nothing wrong with."""
        self.engine.load(folder)
        self.progress = Progress(**checkpoints.read_progress(folder)["progress"])
        self.run.forget_metrics_after(self.progress.step)

    def train(self) -> Progress:
        """Train to the end of the schedule, or until patience runs out.

        Raises:
            Preempted: SIGTERM or SIGUSR1 reached a rank; a checkpoint has been saved.
            Refused: the loss is not finite, or the disk is full.
        """
        progress = self.progress
        self.engine.model.train()
        if self.schedule.evaluates_at(progress.step) and progress.evaluated_step < progress.step:
            self._evaluate_and_save()  # which a stop had cut short
        with self._progress_bar() as bar:
            while not self._is_over():
                started = time.perf_counter()
                self._one_step(progress.step + 1)
                status = self._read_status_where_due()
                if self.accelerator.device.type == "cpu":
                    give_back_memory()
                progress.train_seconds += time.perf_counter() - started
                bar.update()
                self._at_boundary(status)
        self.close_saves()
        return progress

    def _is_over(self) -> bool:
        return self.progress.step >= self.schedule.num_steps or self.progress.stopped_early

    def _progress_bar(self) -> tqdm:
        total, done = self.schedule.num_steps, self.progress.step
        seconds = 0.1 if sys.stderr.isatty() else 30  # each turn of the bar is a line of a job's log
        hidden = not is_main_process()
        return tqdm(total=total, initial=done, mininterval=seconds, disable=hidden, desc="train", unit="step")

    def _one_step(self, step: int) -> None:
        indices = self.step_indices(step)
        mine = self.data.micro_batches(indices, self.args.tokens_per_device, self.accelerator.num_processes)
        loss_sum = self._accumulate(step, indices, mine[self.accelerator.process_index])
        norm = self.engine.step(self.schedule.rate_factor(step))
        moving = self.scratch.step if self.scratch else None
        flags = (self.stop_signal.name is not None, moving is not None and self.scratch.has_arrived)
        status = torch.stack([loss_sum, *(torch.full_like(loss_sum, float(flag)) for flag in flags)])
        if self.accelerator.num_processes > 1:
            status = self.accelerator.reduce(status, "sum")
        self._read_status()
        norm = torch.as_tensor(norm, dtype=status.dtype, device=status.device)
        self._unread = (step, indices, moving, LateReading(torch.cat([status, norm[None]])))
        self._count_step(step, indices)

    def _count_step(self, step: int, indices: np.ndarray) -> None:
        self.progress.step = step
        self.progress.num_examples += len(indices)
        self.progress.num_tokens += self.data.num_tokens(indices)

    def _accumulate(self, step: int, indices: np.ndarray, micros: list[np.ndarray]) -> torch.Tensor:
        """Forward and backward of this rank's micro-batches. Returns its part of the mean loss, a float32 scalar."""
        total = torch.zeros((), device=self.accelerator.device)
        num_targets = self.data.num_targets(indices)
        for number, micro in enumerate(micros):
            is_last = number == len(micros) - 1
            # an empty micro-batch keeps the ranks in step: the step's shortest example, with no weight
            rows = micro if len(micro) else indices[np.argmin(self.data.lengths[indices])][None]
            if self.has_dropout:
                torch.manual_seed(derive_seed(self.args.seed, step, self.accelerator.process_index, number))
            with self.engine.gradients_stay_local(is_last):
                loss = self.data.loss_sum(self.engine, rows) * (float(len(micro) > 0) / num_targets)
                self.engine.backward(loss, is_last)
            total += loss.detach()
        return total

    def step_indices(self, step: int) -> np.ndarray:
        """The examples of a step, [batch]."""
        epoch = self.schedule.epoch(step)
        if self._steps[0] != epoch:
            self._steps = (epoch, self._epoch_steps(epoch))
        return self._steps[1][(step - 1) % self.schedule.steps_per_epoch]

    def _epoch_steps(self, epoch: int) -> list[np.ndarray]:
        return self.data.epoch_steps(self.args.batch_size, self.args.seed, epoch)

    def _read_status(self) -> dict | None:
        """Look at the last step's loss: one step late where nothing needs it sooner, so that a GPU never waits."""
        if self._unread is None:
            return None
        (step, indices, moving, reading), self._unread = self._unread, None
        loss, num_stops, num_arrived, norm = reading.read()
        self._check_finite(step, indices, loss, norm)
        self._count_loss(loss, self.data.num_targets(indices))
        self._stop_wanted = self._stop_wanted or num_stops > 0
        self._arrived = moving if num_arrived == self.accelerator.num_processes else None
        return {"loss": loss, "grad_norm": norm}

    def _count_loss(self, loss: float, num_targets: int) -> None:
        self.progress.loss_sum += loss * num_targets
        self.progress.num_targets += num_targets

    def _check_finite(self, step: int, indices: np.ndarray, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise Refused(self._not_finite(f"the loss of step {step} is {loss}", indices))
        if not (self.engine.scaler or math.isfinite(norm)):  # a loss scaler skips such steps and lowers its scale
            raise Refused(self._not_finite(f"the gradient norm of step {step} is {float(norm)}", indices))

    def _not_finite(self, found: str, indices: np.ndarray) -> str:
        ids = [self.data.ids[index] for index in indices]
        self.close_saves()
        good, _ = checkpoints.newest_whole(self.checkpoint_root)
        return (
            f"{found}; batch ids {', '.join(ids)}; last good checkpoint: {good or 'none'}; "
            "start again in another --output-dir with a lower --learning-rate, or with --precision bf16 or fp32"
        )

    def _read_status_where_due(self) -> dict | None:
        schedule, step = self.schedule, self.progress.step
        due = schedule.logs_at(step) or schedule.evaluates_at(step) or schedule.saves_at(step)
        on_cpu = self.accelerator.device.type == "cpu"  # where reading late gains nothing
        return self._read_status() if due or self._stop_wanted or on_cpu else None

    def _at_boundary(self, status: dict | None) -> None:
        """Log, evaluate, save and stop, where they are due."""
        schedule, step = self.schedule, self.progress.step
        if self._arrived is not None and self._arrived == self.scratch.step:
            self.scratch.finish()
        if schedule.logs_at(step):
            self._log_step(status)
        self._evaluate_and_save()
        if self._stop_wanted and step < schedule.num_steps:
            self.close_saves()
            name = self.stop_signal.name or "a signal on another rank"
            raise Preempted(f"stopped by {name} after step {step} and saved: the same command goes on from there")

    def _evaluate_and_save(self) -> None:
        """Raises Preempted where the evaluation was stopped: the step is saved, and evaluated when the run goes on."""
        schedule, step = self.schedule, self.progress.step
        try:
            improved = schedule.evaluates_at(step) and self._evaluate()
        except Preempted:
            self.save()
            self.close_saves()
            raise
        if improved or schedule.saves_at(step) or self.progress.stopped_early or self._stop_wanted:
            self.save()

    def _log_step(self, status: dict) -> None:
        progress = self.progress
        row = {
            "step": progress.step,
            "epoch": progress.step / self.schedule.steps_per_epoch,
            "loss": status["loss"],
            "learning_rate": self.args.learning_rate * self.schedule.rate_factor(progress.step),
            "grad_norm": status["grad_norm"] if math.isfinite(status["grad_norm"]) else None,
            "tokens": progress.num_tokens,
            "tokens_per_s": progress.num_tokens / progress.train_seconds,
        }
        self.run.log(row)

    def _evaluate(self) -> bool:
        values = self.evaluate(self.progress.step)
        self.engine.model.train()
        if not math.isfinite(values["eval_loss"]):
            step = self.progress.step
            found = f"the evaluation after step {step} has a loss of {values['eval_loss']}"
            raise Refused(self._not_finite(found, self.step_indices(step)))
        progress = self.progress
        values = {"train_loss": progress.loss_sum / progress.num_targets, **values}
        progress.loss_sum, progress.num_targets, progress.evaluated_step = 0.0, 0, progress.step
        improved = progress.record_evaluation(values.pop("choose_by"), self.args.patience)
        self.run.log({"step": progress.step, "epoch": progress.step / self.schedule.steps_per_epoch, **values})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        if is_main_process():
            tqdm.write(f"step {progress.step}: {shown}{'  (best so far)' if improved else ''}")
            sys.stdout.flush()
        return improved

    def save(self) -> None:
        """Save a checkpoint of this step and delete those that are no longer kept."""
        progress = {"step": self.progress.step, "progress": asdict(self.progress)}
        progress["num_processes"] = self.accelerator.num_processes
        num_bytes = self.engine.checkpoint_bytes()
        if self.scratch:
            self.scratch.start(progress, self.engine.save, num_bytes)
            return
        checkpoints.save(self.checkpoint_root, progress, self.engine.save, num_bytes, self.accelerator)
        if is_main_process():
            checkpoints.prune(self.checkpoint_root, self.args.keep_checkpoints, self.progress.step)

    def close_saves(self) -> None:
        """Wait for a checkpoint that is on its way from scratch; there are no further ones."""
        if self.scratch:
            self.scratch.close()


def _drops(engine) -> bool:
    """Attention dropout is a number in the configuration, not a module."""
    config = engine.module.config
    return any(getattr(config, name, 0) for name in ("attention_dropout", "attention_probs_dropout_prob", "dropout"))
