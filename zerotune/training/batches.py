"""Group examples into steps, and cut steps into micro-batches. Pure functions of numbers.

A step's content depends only on (seed, epoch, lengths, batch size). World size and token budget only affect the cut.
"""

import math

import numpy as np

from zerotune.randomness import random_order

# Number of steps whose examples are sorted by length together: larger groups pad less but make each step less diverse.
STEPS_PER_LENGTH_GROUP = 100


class LengthBatches:
    """Batches independent examples by similar length.

    Subclasses provide `lengths` (tokens of each example) and `packs` (whether a batch is one row without padding).
    """

    lengths: np.ndarray
    packs: bool = False

    @property
    def scored_lengths(self) -> np.ndarray:
        """Cost of scoring each example, in tokens, [num_examples]."""
        return self.lengths

    def epoch_steps(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Call `epoch_steps` with these lengths."""
        return epoch_steps(self.lengths, batch_size, seed, epoch)

    def micro_batches(self, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
        """Call `micro_batches` with these lengths."""
        return micro_batches(step, self.lengths, budget, world_size, self.packs)

    def num_tokens(self, rows: np.ndarray) -> int:
        """Return the number of tokens in a batch of some examples, without padding."""
        return int(self.lengths[rows].sum())

    def num_padded_tokens(self, rows: np.ndarray) -> int:
        """Return the number of tokens in a batch of some examples, padding included."""
        return self.num_tokens(rows) if self.packs else int(self.lengths[rows].max()) * len(rows)


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the number of optimizer steps in one pass over the examples; the last step may be smaller."""
    return math.ceil(num_examples / batch_size)


def epoch_steps(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Split one epoch into optimizer steps of examples with similar lengths.

    Args:
        lengths: tokens of each example, [num_examples].
        batch_size: examples in a step over all devices.
    Returns:
        One index array per step; together they hold every index exactly once.
    """
    order = random_order(len(lengths), seed, f"examples of epoch {epoch}")
    group_size = batch_size * STEPS_PER_LENGTH_GROUP
    steps = []
    for start in range(0, len(order), group_size):
        group = order[start : start + group_size]
        group = group[np.argsort(lengths[group], kind="stable")]
        steps += [group[first : first + batch_size] for first in range(0, len(group), batch_size)]
    return [steps[index] for index in random_order(len(steps), seed, f"steps of epoch {epoch}")]


def _size(falling: np.ndarray, packs: bool) -> int:
    """Return the tokens of a batch of examples sorted by falling length, with padding unless it is packed."""
    return int(falling.sum() if packs else falling[0] * len(falling))


def cut_by_budget(lengths: np.ndarray, budget: int, packs: bool = False) -> list[slice]:
    """Cut examples that are sorted by falling length into runs of at most `budget` tokens.

    A single example longer than the budget gets its own run.

    Args:
        packs: count only the examples' own tokens; otherwise count padding too (longest × count).
    """
    runs, start, total = [], 0, 0
    for index, length in enumerate(lengths.tolist()):
        total += length
        size = total if packs else int(lengths[start]) * (index - start + 1)
        if size > budget and index > start:
            runs.append(slice(start, index))
            start, total = index, length
    return [*runs, slice(start, len(lengths))] if len(lengths) else []


def micro_batches(
    step: np.ndarray, lengths: np.ndarray, budget: int, world_size: int, packs: bool = False
) -> list[list[np.ndarray]]:
    """Cut one step into micro-batches for every rank: as few as the budget allows, and as even as possible.

    Args:
        step: indices of the step's examples, [batch].
        lengths: tokens of every example of the data set, [num_examples].
        budget: most tokens in one micro-batch, exceeded only by a single long example.
        packs: whether a micro-batch is one row without padding, so that only real tokens count.
    Returns:
        For each rank a list of index arrays. The lists are equally long, filled up with empty arrays, because
        collective operations (DDP, ZeRO-3) hang when one rank makes fewer passes than another.
    """
    order = step[np.argsort(-lengths[step], kind="stable")]
    sorted_lengths = lengths[order]
    num_rounds = math.ceil(len(cut_by_budget(sorted_lengths, budget, packs)) / world_size)
    runs = _even_runs(sorted_lengths, budget, num_rounds * world_size, packs)
    runs.sort(key=lambda run: -_size(sorted_lengths[run], packs))
    ranks: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    for turn in range(num_rounds):
        dealt = runs[turn * world_size : (turn + 1) * world_size]
        receivers = range(world_size) if turn % 2 == 0 else reversed(range(world_size))
        for position, rank in enumerate(receivers):
            ranks[rank].append(order[dealt[position]] if position < len(dealt) else order[:0])
    return ranks


def _even_runs(sorted_lengths: np.ndarray, budget: int, max_runs: int, packs: bool) -> list[slice]:
    """Cut into at most `max_runs` runs, with the largest as small as possible (binary search over its size)."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(cut_by_budget(sorted_lengths, middle, packs)) <= max_runs:
            high = middle
        else:
            low = middle + 1
    return cut_by_budget(sorted_lengths, low, packs)


def evaluation_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut examples into batches of similar lengths for evaluation, longest first.

    They depend only on lengths and budget, so that scores do not depend on the world size or on restarts.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[run] for run in cut_by_budget(lengths[order], budget)]
