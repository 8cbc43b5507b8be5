"""Rows in which branches share a trunk: a paragraph once, then its questions, none of which sees another.

A branch's positions continue where the trunk ends. A token's view depends on positions and branches, never on columns:
it sees the tokens of the trunk and of its own branch up to its own position, in a sliding layer only those within the
window. So each branch gets the logits that it would get after the trunk in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zerotune.models.cpu_kernels import CAUSAL_ATTENTION
from zerotune.models.device import to_device

TRUNK, PADDING = 0, -1  # branches are numbered from 1
_MASKED_ATTENTION = ("sdpa", "eager", CAUSAL_ATTENTION)  # kernels that take a mask of any form
FULL, SLIDING = "full_attention", "sliding_attention"


def can_share(config, attention: str) -> bool:
    """Return whether a model's layers can be masked by branch with an attention kernel (of `attention_kernel`)."""
    return attention in _MASKED_ATTENTION and set(layer_types(config)) <= {FULL, SLIDING}


def layer_types(config) -> tuple[str, ...]:
    """Return the kinds of attention of a causal model's layers, each once."""
    types = getattr(config, "layer_types", None)
    if types:
        return tuple(sorted(set(types)))
    return (FULL if getattr(config, "sliding_window", None) is None else SLIDING,)


@dataclass(frozen=True)
class BranchRows:
    """A batch of rows, padded on the right.

    Attributes:
        input_ids: int64 [R, T].
        positions: int64 [R, T]; 0 in padding.
        branches: int64 [R, T]: TRUNK, the number of a branch in its row, or PADDING.
        rows, starts: row and first column of each branch, in the given order; int64 [N] each.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    rows: np.ndarray
    starts: np.ndarray

    @property
    def is_plain(self) -> bool:
        """Whether every row has one branch, so that a causal model needs no mask."""
        return len(self.rows) == len(self.input_ids)


def branch_rows(trunks: list[Sequence[int]], branches: list[list[Sequence[int]]], pad_id: int) -> BranchRows:
    """Lay out a trunk and its branches in each row, all given as token ids: [R] trunks and [R][branches of the row]."""
    lengths = [len(trunk) + sum(map(len, own)) for trunk, own in zip(trunks, branches, strict=True)]
    shape = (len(trunks), max(lengths))
    input_ids, positions = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    numbers = np.full(shape, PADDING, dtype=np.int64)
    rows, starts = [], []
    for row, (trunk, own) in enumerate(zip(trunks, branches, strict=True)):
        column = 0
        for number, tokens in enumerate([trunk, *own]):
            stop = column + len(tokens)
            first = len(trunk) if number else 0
            input_ids[row, column:stop] = tokens
            positions[row, column:stop] = np.arange(first, first + len(tokens))
            numbers[row, column:stop] = number
            if number:
                rows.append(row)
                starts.append(column)
            column = stop
    return BranchRows(input_ids, positions, numbers, np.array(rows), np.array(starts))


@dataclass(frozen=True)
class Places:
    """Positions and branches of tokens, [R, tokens] each, on a device."""

    positions: torch.Tensor
    branches: torch.Tensor

    @classmethod
    def of(cls, rows: BranchRows, device: torch.device, offset: int = 0) -> "Places":
        """Return the places of a batch's tokens, after `offset` tokens that all rows begin with."""
        return cls(to_device(rows.positions + offset, device), to_device(rows.branches, device))

    def and_then(self, other: "Places") -> "Places":
        """Return these places followed by others in each row."""
        return Places(
            torch.cat([self.positions, other.positions], dim=1), torch.cat([self.branches, other.branches], dim=1)
        )

    def of_rows(self, rows: torch.Tensor) -> "Places":
        """Return the places of some rows."""
        return Places(self.positions[rows], self.branches[rows])


def visible(queries: Places, keys: Places, window: int | None) -> torch.Tensor:
    """Return which keys each query sees, bool [R, 1, queries, keys].

    Args:
        window: how many positions back a query sees, its own included (a configuration's sliding_window); None for all.
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = (keys.branches[:, None, :] == TRUNK) & (queries.branches[:, :, None] != PADDING)
    seen |= keys.branches[:, None, :] == queries.branches[:, :, None]
    seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[:, None]


def branch_masks(config, queries: Places, keys: Places, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return transformers' attention_mask: [R, 1, queries, keys] of 0 or minus infinity, to be added to the scores.

    A model with two layer types gets a dict by type. Every query sees itself, even in padding.
    """
    masks = {}
    for kind in layer_types(config):
        seen = visible(queries, keys, config.sliding_window if kind == SLIDING else None)
        masks[kind] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return masks if len(masks) > 1 else next(iter(masks.values()))


def mask_dtype(model, device: torch.device) -> torch.dtype:
    """Return the type in which a model computes attention scores under the caller's autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.dtype
