"""The schedule of a run: learning rate, evaluations, checkpoints. Pure functions of the step number."""

import math
from dataclasses import dataclass

from zerotune.settings.groups import OptimisationSettings, RunSettings
from zerotune.training.batches import num_steps_per_epoch

# Default evaluations of an epoch: as many as fit in EVALUATION_SHARE of its time, but at most MOST_EVALUATIONS, and at
# least FEWEST_STEPS steps apart. Evaluating a row costs a third of training on it, which also has a backward pass.
EVALUATION_SHARE, MOST_EVALUATIONS, FEWEST_STEPS = 0.1, 4, 10


@dataclass(frozen=True)
class Schedule:
    """Steps are counted from 1. `num_steps` is the planned length; patience may end the run earlier.

    Attributes:
        eval_every: steps between evaluations; None: an epoch has `evaluations_per_epoch`, the last one at its end.
        checkpoint_every: steps between checkpoints; None if they are due by the clock.
        shape: of the learning rate after the warmup: "linear", "cosine" or "constant".
    """

    num_steps: int
    steps_per_epoch: int
    warmup_steps: int
    eval_every: int | None
    checkpoint_every: int | None
    log_every: int
    shape: str = "linear"
    evaluations_per_epoch: int = 1

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak rate at a step: linear from 0 over the warmup, then as `shape` says.

        "linear" falls to 0 at the end, and so does "cosine", along half a cosine (Loshchilov & Hutter 2017,
        arXiv:1608.03983, equation 5, without restarts); "constant" stays at the peak.
        """
        done = step - 1
        if done < self.warmup_steps:
            return (done + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        left = (self.num_steps - done) / max(1, self.num_steps - self.warmup_steps)
        return left if self.shape == "linear" else (1 - math.cos(math.pi * left)) / 2

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, from 0."""
        return (step - 1) // self.steps_per_epoch

    def evaluates_at(self, step: int) -> bool:
        """Return whether the validation split is evaluated after this step."""
        if self.eval_every is not None:
            return step % self.eval_every == 0 or step == self.num_steps
        before, num = (step - 1) % self.steps_per_epoch, self.evaluations_per_epoch
        crosses = before * num // self.steps_per_epoch < (before + 1) * num // self.steps_per_epoch
        return crosses or step == self.num_steps

    def saves_at(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step, regardless of the clock."""
        return step == self.num_steps or (self.checkpoint_every is not None and step % self.checkpoint_every == 0)

    def logs_at(self, step: int) -> bool:
        """Return whether metrics.jsonl gets a line for this step."""
        return step == 1 or step % self.log_every == 0 or step == self.num_steps


def plan_schedule(
    optimisation: OptimisationSettings, run: RunSettings, num_examples: int, num_validation: int | None = None
) -> Schedule:
    """Return the schedule of --epochs over a training split of `num_examples`, cut short by --max-steps.

    Args:
        num_validation: examples of the validation split; None if evaluating costs more than a forward pass over them.
    """
    steps_per_epoch = num_steps_per_epoch(num_examples, optimisation.batch_size)
    num_steps = steps_per_epoch * optimisation.epochs
    if optimisation.max_steps is not None:
        num_steps = min(num_steps, optimisation.max_steps)
    return Schedule(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(num_steps * optimisation.warmup_ratio),
        eval_every=optimisation.eval_every,
        checkpoint_every=run.checkpoint_every.steps,
        log_every=run.log_every,
        shape=optimisation.schedule,
        evaluations_per_epoch=_evaluations_per_epoch(steps_per_epoch, num_examples, num_validation, optimisation),
    )


def _evaluations_per_epoch(
    steps_per_epoch: int, num_examples: int, num_validation: int | None, optimisation: OptimisationSettings
) -> int:
    """Return the number of evaluations per epoch without --eval-every; one with --patience, as published recipes do."""
    if num_validation is None or optimisation.patience is not None:
        return 1
    affordable = int(EVALUATION_SHARE * 3 * num_examples / max(1, num_validation))
    return max(1, min(MOST_EVALUATIONS, affordable, steps_per_epoch // FEWEST_STEPS))
