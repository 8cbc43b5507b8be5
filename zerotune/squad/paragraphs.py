"""Batches of questions that share paragraphs: a row has a paragraph's tokens once, followed by its questions' tokens.

Pure functions of numbers, as in zerotune/training/batches.py. A "group" is the questions about one paragraph.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zerotune.randomness import random_order
from zerotune.training.batches import STEPS_PER_LENGTH_GROUP, cut_by_budget, micro_batches

# How many groups, sorted by length, are tried to fill a step exactly: later ones would add padding.
LOOK_AHEAD = 50


@dataclass(frozen=True)
class Groups:
    """Which examples share tokens, and how many.

    Attributes:
        group_of: group of each example, 0 … num_groups - 1, [num_examples].
        shared: tokens that a group's examples share, [num_groups].
        own: tokens of each example besides the shared ones, [num_examples].
    """

    group_of: np.ndarray
    shared: np.ndarray
    own: np.ndarray

    @cached_property
    def members(self) -> list[np.ndarray]:
        """Return each group's examples in their order, one index array per group."""
        order = np.argsort(self.group_of, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.group_of, minlength=len(self.shared)))[:-1])

    def row_length(self, examples: np.ndarray) -> int:
        """Count the tokens of a row with some examples of one group."""
        return int(self.shared[self.group_of[examples[0]]] + self.own[examples].sum())

    def by_group(self, examples: np.ndarray) -> list[np.ndarray]:
        """Split some examples by group; groups are in the order of their first examples."""
        found: dict[int, list[int]] = {}
        for example in examples.tolist():
            found.setdefault(int(self.group_of[example]), []).append(example)
        return [np.array(each) for each in found.values()]

    def num_tokens(self, examples: np.ndarray) -> int:
        """Count the tokens of a batch, a group's shared ones once."""
        return int(self.shared[np.unique(self.group_of[examples])].sum() + self.own[examples].sum())

    def num_padded_tokens(self, examples: np.ndarray) -> int:
        """Count the tokens of a batch with padding, where each group is one row."""
        rows = self.by_group(examples)
        return max(map(self.row_length, rows)) * len(rows)

    def rows(self, examples: np.ndarray, budget: int) -> list[np.ndarray]:
        """Split some examples into rows of one group each and at most `budget` tokens.

        A single example longer than the budget gets its own row. At most one of a group's rows takes less than
        half of the budget, so that no two of them are in the same batch.
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


def grouped_epoch_steps(groups: Groups, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Split one epoch into steps of `batch_size` examples, keeping groups together and their lengths similar.

    A group is split over steps if it has more examples than a step, or if no groups near it in length fill a step.

    Returns:
        One index array per step; together they hold every index exactly once. One of them may be smaller.
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
    """Append full steps made from the pieces in order. Returns the remaining pieces, too few for a step."""
    total = sum(map(len, waiting))
    while total >= batch_size:
        chosen = _exact_fill([len(piece) for piece in waiting[:LOOK_AHEAD]], batch_size)
        if chosen is None:  # take the first pieces, and a part of the next
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


def _exact_fill(sizes: list[int], batch_size: int) -> list[int] | None:
    """Return indices of pieces whose sizes add up to `batch_size`: the first piece, and the earliest that complete it.

    None if there are none.
    """
    reached = {sizes[0]: [0]}  # a sum of sizes -> the indices of its pieces
    for place, size in enumerate(sizes):
        if place:
            found = {total + size: [*chosen, place] for total, chosen in reached.items() if total + size <= batch_size}
            reached = found | reached
        if batch_size in reached:
            return reached[batch_size]
    return None


def grouped_micro_batches(groups: Groups, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Cut a step into micro-batches as `batches.micro_batches` does, made of rows with one group each.

    Args:
        step: the step's examples.
        budget: most padded tokens in one micro-batch, exceeded only by a single long example.
    Returns:
        For each rank a list of index arrays of examples.
    """
    rows = groups.rows(step, budget)
    lengths = np.array([groups.row_length(row) for row in rows])
    ranks = micro_batches(np.arange(len(rows)), lengths, budget, world_size)
    return [[_joined(rows, batch, step) for batch in rank] for rank in ranks]


def grouped_evaluation_batches(groups: Groups, budget: int) -> list[np.ndarray]:
    """Cut all examples into batches as `batches.evaluation_batches` does, made of rows with one group each.

    Returns:
        Index arrays of examples, the longest rows first.
    """
    rows = groups.rows(np.arange(len(groups.own)), budget)
    lengths = np.array([groups.row_length(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    return [_joined(rows, order[run], order) for run in cut_by_budget(lengths[order], budget)]


def row_costs(groups: Groups, budget: int) -> np.ndarray:
    """Return the tokens of each example's row in `grouped_evaluation_batches`, which are sorted by falling cost."""
    costs = np.zeros(len(groups.own), dtype=np.int64)
    for row in groups.rows(np.arange(len(groups.own)), budget):
        costs[row] = groups.row_length(row)
    return costs


def _joined(rows: list[np.ndarray], chosen: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Join the chosen rows; an empty array with the type of `like` if there are none."""
    return np.concatenate([rows[index] for index in chosen]) if len(chosen) else like[:0]
