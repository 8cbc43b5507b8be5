"""The training loop's view of its data: examples with lengths, cut into steps, micro-batches and model inputs."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Model inputs of some examples, on the device.

    Attributes:
        inputs: keyword arguments of the model's forward.
        targets: what the loss compares the model's output with, int64: classes [rows], start and end columns
            [windows, 2], or the tokens of the answers [tokens]. Where a text may have several labels, 0 or 1 for each:
            float32 [rows, labels].
        target_weights: what each target's loss is multiplied by, float32 [rows], [rows, labels] or [tokens]; None for
            SQuAD, where all count the same.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    target_weights: torch.Tensor | None = None


class TrainingData(Protocol):
    """A tokenised split that can be trained on. "Rows" are indices of examples, int64 [number of rows].

    Attributes:
        ids: stable id of each example, [num_examples].
        lengths: tokens of each example, int64 [num_examples].
        packs: whether a batch is one packed row (zerotune/models/packed.py), which the model must be told.
    """

    ids: list[str]
    lengths: np.ndarray
    packs: bool

    def epoch_steps(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Split one epoch into optimizer steps: rows of each, which together hold every example exactly once."""

    def micro_batches(self, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
        """Cut a step into micro-batches of at most `budget` padded tokens: for every rank equally many, maybe empty."""

    def num_tokens(self, rows: np.ndarray) -> int:
        """Count the tokens that the model reads of some examples in one batch, without padding."""

    def num_targets(self, rows: np.ndarray) -> float:
        """Return the divisor of the sum of some examples' losses: the number of labels, windows or answer tokens.

        Where they have weights, the sum of those.
        """

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the model inputs and the targets of some examples."""
