"""The progress of a run: saved with every checkpoint, enough to resume."""

from dataclasses import dataclass, fields
from typing import Annotated, NotRequired

from annotated_types import Ge
from typing_extensions import TypedDict

from zerotune.records import Count


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: the last optimizer step that is done, counted from 1.
        best_step, best_value: step and value of the best evaluation on the validation split; greater is better.
        evaluations_without_gain: number of evaluations since the best one.
        train_seconds: time spent in steps, without evaluations and saves.
        loss_sum, num_targets: since the last evaluation, the sum of the training losses, and the number of targets that
            it sums over, or the sum of their weights.
        evaluated_step: the last step whose evaluation is done.
    """

    step: Count = 0
    best_step: Count | None = None
    best_value: float | None = None
    evaluations_without_gain: Count = 0
    stopped_early: bool = False
    train_seconds: Annotated[float, Ge(0)] = 0.0
    num_examples: Count = 0
    num_tokens: Count = 0
    loss_sum: float = 0.0
    num_targets: Annotated[float, Ge(0)] = 0.0
    evaluated_step: Count = 0

    @classmethod
    def of(cls, record: "ProgressRecord") -> "Progress":
        """Return the progress of a record. Fields that it lacks have their defaults, others are ignored."""
        return cls(**{each.name: record[each.name] for each in fields(cls) if each.name in record})

    def count_step(self, num_examples: int, num_tokens: int) -> None:
        """Count a finished step."""
        self.step += 1
        self.num_examples += num_examples
        self.num_tokens += num_tokens

    def count_loss(self, loss: float, num_targets: float) -> None:
        """Add a step's mean loss to the mean since the last evaluation."""
        self.loss_sum += loss * num_targets
        self.num_targets += num_targets

    def take_mean_loss(self) -> float:
        """Return the mean training loss since the last call."""
        mean = self.loss_sum / self.num_targets
        self.loss_sum, self.num_targets = 0.0, 0.0
        return mean

    def record_evaluation(self, value: float, patience: int | None) -> bool:
        """Record the value of this step's evaluation; greater is better.

        Returns:
            Whether it is the best so far; ties keep the earlier one.
        """
        self.evaluated_step = self.step
        improved = self.best_value is None or value > self.best_value
        if improved:
            self.best_step, self.best_value, self.evaluations_without_gain = self.step, value, 0
        else:
            self.evaluations_without_gain += 1
            self.stopped_early = patience is not None and self.evaluations_without_gain >= patience
        return improved


_REQUIRED = ("step", "best_step", "evaluated_step")
# Another version may have saved more or fewer of the other fields: `Progress.of` reads what is there.
ProgressRecord = TypedDict(
    "ProgressRecord",
    {name: form if name in _REQUIRED else NotRequired[form] for name, form in Progress.__annotations__.items()},
)
