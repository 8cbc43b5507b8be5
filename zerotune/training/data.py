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
        targets: targets of the loss. int64: classes [rows], start and end columns [windows, 2], or answer tokens
            [tokens]. For texts with several labels, 0 or 1 for each label: float32 [rows, labels].
        target_weights: factor of each target's loss, float32 [rows], [rows, labels] or [tokens]; None for SQuAD, where
            all count the same.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    target_weights: torch.Tensor | None = None


class TrainingData(Protocol):
    """A tokenised split that can be trained on. "Rows" are indices of examples, int64 [number of rows].

    Attributes:
        ids: stable id of each example, [num_examples].
        lengths: tokens of each example, int64 [num_examples].
        token_ids: every token id of the examples, at least once: int32 [any number].
        pad_id: token id that fills short rows.
        num_truncated: number of texts that were cut to fit.
        packs: whether a batch is one packed row (zerotune/models/packed.py); the model must be set up for it.
    """

    ids: list[str]
    lengths: np.ndarray
    token_ids: np.ndarray
    pad_id: int
    num_truncated: int
    packs: bool

    def epoch_steps(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Split one epoch into the rows of each optimizer step; together they hold every example exactly once."""

    def micro_batches(self, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
        """Cut a step into micro-batches of at most `budget` padded tokens: equally many per rank, some maybe empty."""

    def num_tokens(self, rows: np.ndarray) -> int:
        """Count the tokens that the model reads in a batch of some examples, without padding."""

    def num_padded_tokens(self, rows: np.ndarray) -> int:
        """Count the tokens of a batch of some examples, including padding (a packed batch has none)."""

    def num_targets(self, rows: np.ndarray) -> float:
        """Return the divisor for the sum of some examples' losses: the number of examples, windows or answer tokens.

        With weights per target it is their sum, except for texts with several labels.
        """

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the model inputs and targets of some examples."""
