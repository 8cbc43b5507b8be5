"""Measure calibration: how far a model's probabilities are from its share of right answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class Bin:
    """The items whose predicted label has a probability in one range."""

    count: int
    num_right: int
    probability: float  # mean


def reliability_bins(probabilities: Sequence[float], right: Sequence[bool], num_bins: int = NUM_BINS) -> list[Bin]:
    """Return the bins that hold items, by rising probability: (0, 1/n], (1/n, 2/n] … of equal width.

    Args:
        probabilities: of the predicted label of each item, [items].
        right: whether that label is right, [items].
    """
    probabilities, right = np.asarray(probabilities, dtype=np.float64), np.asarray(right, dtype=bool)
    places = np.clip(np.ceil(probabilities * num_bins).astype(int) - 1, 0, num_bins - 1)
    chosen = [places == place for place in np.unique(places)]
    return [Bin(int(each.sum()), int(right[each].sum()), float(probabilities[each].mean())) for each in chosen]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean of |accuracy - mean probability| over bins, weighted by their items (Guo et al. 2017, eq. 3)."""
    total = sum(each.count for each in bins)
    return sum(abs(each.num_right - each.count * each.probability) for each in bins) / total
