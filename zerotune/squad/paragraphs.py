"""Batches of examples that share a part: the questions of a paragraph. Pure functions of numbers, as in batching.py.

A row holds a group's shared tokens once and the own tokens of those of its examples that are in the batch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zerotune.randomness import random_order
from zerotune.training.batches import STEPS_PER_LENGTH_GROUP, cut_by_budget, micro_batches

# How far a step looks for groups that fill it, in groups sorted by length: further ones would pad it more.
LOOK_AHEAD = 50


@dataclass(frozen=True)
class Groups:
    """Which examples stand together, and what they take.

    Attributes:
        group_of: group of each example, 0 … num_groups - 1, [num_examples].
        shared: tokens that a group's examples share, [num_groups].
        own: tokens of each example beside them, [num_examples].
    """

    group_of: np.ndarray
    shared: np.ndarray
    own: np.ndarray

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The examples of each group in their order, num_groups index arrays."""
        order = np.argsort(self.group_of, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.group_of, minlength=len(self.shared)))[:-1])

    def row_length(self, examples: np.ndarray) -> int:
        """Tokens of a row of some examples of one group."""
        return int(self.shared[self.group_of[examples[0]]] + self.own[examples].sum())

    def by_group(self, examples: np.ndarray) -> list[np.ndarray]:
        """Some examples parted by their groups, which are in the order of their first examples."""
        found: dict[int, list[int]] = {}
        for example in examples.tolist():
            found.setdefault(int(self.group_of[example]), []).append(example)
        return [np.array(each) for each in found.values()]

    def num_tokens(self, examples: np.ndarray) -> int:
        """Tokens of a batch, shared ones once a group."""
        return int(self.shared[np.unique(self.group_of[examples])].sum() + self.own[examples].sum())

    def rows(self, examples: np.ndarray, budget: int) -> list[np.ndarray]:
        """The rows of some examples: a group each, in as many parts as keep within the budget.

        A single example longer than the budget gets a row of its own. Of a group's rows only one takes less than half
        of the budget, so that no two of them stand in one batch.
        """
        found = []
        for group in self.by_group(examples):
            group = group[np.argsort(-self.own[group], kind="stable")]
            start, length = 0, 0
            for place, example in enumerate(group):
                if length + self.own[example] > budget and place > start:
                    found.append(group[start:place])
                    start, length = place, 0
                length += int(self.own[example]) + (int(self.shared[self.group_of[example]]) if place == start else 0)
            found.append(group[start:])
        return found

    def num_padded_tokens(self, examples: np.ndarray) -> int:
        """Tokens of a batch with its padding, all of a group in one row."""
        rows = self.by_group(examples)
        return max(map(self.row_length, rows)) * len(rows)


def row_costs(groups: Groups, budget: int) -> np.ndarray:
    """Tokens of the row in which each example stands in grouped_evaluation_batches, [num_examples]: a batch holds them
    by falling cost."""
    costs = np.zeros(len(groups.own), dtype=np.int64)
    for row in groups.rows(np.arange(len(groups.own)), budget):
        costs[row] = groups.row_length(row)
    return costs


def grouped_epoch_steps(groups: Groups, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Split one epoch into steps of `batch_size` examples, whose groups stand together and are alike in length.

    A group is split over steps where it has more examples than a step, and where nothing near it fills a step.

    Returns:
        Index arrays, one a step, which together hold every index exactly once; one of them may be smaller.
    """
    order = random_order(len(groups.shared), seed, f"groups of epoch {epoch}")
    pieces = [groups.members[group] for group in order]
    counts = np.cumsum([len(piece) for piece in pieces])
    chunk_of = (counts - 1) // (batch_size * STEPS_PER_LENGTH_GROUP)
    steps: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    for chunk in np.unique(chunk_of):
        chosen = [pieces[index] for index in np.flatnonzero(chunk_of == chunk)]
        waiting = _fill_steps(sorted(waiting + chosen, key=groups.row_length), batch_size, steps)
    if waiting:
        steps.append(np.concatenate(waiting))
    return [steps[index] for index in random_order(len(steps), seed, f"steps of epoch {epoch}")]


def _fill_steps(waiting: list[np.ndarray], batch_size: int, steps: list[np.ndarray]) -> list[np.ndarray]:
    """Append whole steps made of the pieces in their order. Returns the pieces that fill no step."""
    total = sum(map(len, waiting))
    while total >= batch_size:
        chosen = _that_fill([len(piece) for piece in waiting[:LOOK_AHEAD]], batch_size)
        if chosen is None:  # the first ones, and a part of the next
            chosen, room = [], batch_size
            while room and len(waiting[len(chosen)]) <= room:
                room -= len(waiting[len(chosen)])
                chosen.append(len(chosen))
            if room:
                split = len(chosen)
                waiting[split : split + 1] = [waiting[split][:room], waiting[split][room:]]
                chosen.append(split)
        steps.append(np.concatenate([waiting[place] for place in chosen]))
        for place in reversed(chosen):
            del waiting[place]
        total -= batch_size
    return waiting


def _that_fill(sizes: list[int], batch_size: int) -> list[int] | None:
    """Places of pieces, the first among them, that add up to a step and end as early as can be; None without such."""
    reached = {sizes[0]: [0]}
    for place, size in enumerate(sizes):
        if place:
            found = {total + size: [*chosen, place] for total, chosen in reached.items() if total + size <= batch_size}
            reached = found | reached
        if batch_size in reached:
            return reached[batch_size]
    return None


def grouped_micro_batches(groups: Groups, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """As batching.micro_batches, of rows that hold a group each: index arrays of examples, for each rank a list.

    Args:
        budget: most padded tokens in one micro-batch, exceeded only by a single long example.
    """
    rows = groups.rows(step, budget)
    lengths = np.array([groups.row_length(row) for row in rows])
    ranks = micro_batches(np.arange(len(rows)), lengths, budget, world_size)
    return [[_joined(rows, batch, step) for batch in rank] for rank in ranks]


def grouped_evaluation_batches(groups: Groups, budget: int) -> list[np.ndarray]:
    """As batching.evaluation_batches, of rows that hold a group each: index arrays of examples, longest rows first."""
    rows = groups.rows(np.arange(len(groups.own)), budget)
    lengths = np.array([groups.row_length(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    return [_joined(rows, order[run], order) for run in cut_by_budget(lengths[order], budget)]


def _joined(rows: list[np.ndarray], chosen: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[index] for index in chosen]) if len(chosen) else like[:0]
