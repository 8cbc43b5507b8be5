"""Compute intervals and paired tests, by pure functions of counts and of per-item scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtri

Interval = tuple[float, float]
NUM_RESAMPLES = 10_000
MOST_DRAWN_TOGETHER = 2**24  # counts of resamples in memory at once: 128 MiB


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval | None:
    """Return the score interval of a proportion, without continuity correction; None if total is 0.

    Wilson 1927, J. Am. Stat. Assoc. 22:209-212; method 3 of Newcombe 1998, Stat. Med. 17:857-872.
    """
    assert 0 <= successes <= total, (successes, total)
    if total == 0:
        return None
    z = float(ndtri(0.5 + confidence / 2))
    proportion = successes / total
    centre = proportion + z**2 / (2 * total)
    half_width = z * np.sqrt(proportion * (1 - proportion) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # At 0 and at total the bound is exactly 0 or 1; rounding would leave 1e-17.
    low = 0.0 if successes == 0 else float((centre - half_width) / scale)
    high = 1.0 if successes == total else float((centre + half_width) / scale)
    return low, high


def bootstrap_interval(
    counts: Sequence[int] | np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of a score that depends only on how many items are of each kind.

    Args:
        counts: [kinds], how many items are of each kind (such as the distinct values of a per-item score).
        statistic: resampled counts [NUM_RESAMPLES, kinds] -> scores [NUM_RESAMPLES].

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    return percentile_interval(statistic(np.concatenate(list(resample_counts(counts, seed)))))


def resample_counts(counts: Sequence[int] | np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Draw all n items with replacement NUM_RESAMPLES times, and yield the numbers of each kind, [resamples, kinds].

    One multinomial draw over the kinds does that, so the cost does not grow with n. The rows come in parts, which
    bounds the memory when there are thousands of kinds.
    """
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    assert total > 0 and (counts >= 0).all(), counts
    generator, most = np.random.default_rng(seed), max(1, MOST_DRAWN_TOGETHER // len(counts))
    for start in range(0, NUM_RESAMPLES, most):
        yield generator.multinomial(total, counts / total, size=min(most, NUM_RESAMPLES - start))


def percentile_interval(scores: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the quantiles of resampled scores, [NUM_RESAMPLES], that leave out an equal share at both ends."""
    scores = np.asarray(scores)
    assert scores.shape == (NUM_RESAMPLES,), scores.shape
    low, high = np.quantile(scores, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap_mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval, over items, of the mean of a score, [items]."""
    kinds, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return bootstrap_interval(counts, lambda resampled: resampled @ kinds / len(values), seed)


@dataclass(frozen=True)
class PairedMeans:
    """The mean scores of two models on the same items; the difference is second minus first.

    The interval is a bootstrap interval; p_value is that of a two-sided randomisation test."""

    first: float
    second: float
    difference: float
    difference_ci95: Interval
    p_value: float


def paired_means(first: np.ndarray, second: np.ndarray, seed: int = 0) -> PairedMeans:
    """Compare two models' scores of the same items in the same order, [items] each.

    Under the null hypothesis an item's difference is as likely to have one sign as the other: p is the share of random
    signs that give a difference at least as large, counting the observed one among them. Fisher 1935, The Design of
    Experiments, section 21.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert first.shape == second.shape and first.ndim == 1 and len(first), (first.shape, second.shape)
    differences = second - first
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    positive = np.random.default_rng(seed).binomial(counts, 0.5, size=(NUM_RESAMPLES, len(counts)))
    sums = np.abs((2 * positive - counts) @ sizes)
    # equal sums may differ by rounding
    num_as_large = int((sums >= abs(differences.sum()) - 1e-9 * len(first)).sum())
    return PairedMeans(
        first=float(first.mean()),
        second=float(second.mean()),
        difference=float(differences.mean()),
        difference_ci95=bootstrap_mean_interval(differences, seed),
        p_value=(1 + num_as_large) / (1 + NUM_RESAMPLES),
    )


def paired_counts(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int, int, int]:
    """Count the items that both models, only a, only b, and neither got right; [items] booleans in the same order."""
    correct_a, correct_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert correct_a.shape == correct_b.shape and correct_a.ndim == 1, (correct_a.shape, correct_b.shape)
    both, only_a = int((correct_a & correct_b).sum()), int((correct_a & ~correct_b).sum())
    only_b = int((~correct_a & correct_b).sum())
    return both, only_a, only_b, len(correct_a) - both - only_a - only_b


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of two models being right equally often on the same items.

    McNemar 1947, Psychometrika 12:153-157; exact form: under the null hypothesis the smaller of the two counts is
    Binomial(only_a + only_b, 1/2). It is 1 if the models never differ. One below the smallest normal float (2e-308)
    is given as that float, because an exact p-value is never 0.
    """
    p_value = 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))
    return min(1.0, max(p_value, float(np.finfo(np.float64).tiny)))


def paired_difference_interval(
    correct_a: np.ndarray, correct_b: np.ndarray, confidence: float = 0.95
) -> Interval | None:
    """Return the interval of accuracy(b) - accuracy(a) on the same items, [items] booleans each; None without items.

    Newcombe's paired Wilson interval (square-and-add with the correlation phi, its numerator lowered by n/2 where it is
    positive): method 10 of Newcombe 1998, Stat. Med. 17:2635-2650.
    """
    both, only_a, only_b, neither = paired_counts(correct_a, correct_b)
    total = both + only_a + only_b + neither
    if total == 0:
        return None
    right_a, right_b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = (wilson_interval(right, total, confidence) for right in (right_a, right_b))
    below_a, above_a = right_a / total - low_a, high_a - right_a / total
    below_b, above_b = right_b / total - low_b, high_b - right_b / total
    covariance = both * neither - only_a * only_b
    numerator = covariance if covariance <= 0 else max(covariance - total / 2, 0)
    margins = right_a * (total - right_a) * right_b * (total - right_b)
    phi = numerator / margins**0.5 if margins else 0.0
    difference = (right_b - right_a) / total
    down = np.sqrt(max(below_b**2 - 2 * phi * below_b * above_a + above_a**2, 0.0))
    up = np.sqrt(max(above_b**2 - 2 * phi * above_b * below_a + below_a**2, 0.0))
    return float(difference - down), float(difference + up)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing them all, in the order given. Holm 1979, Scand. J. Stat. 6:65-70."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = float(min(1.0, running))
    return adjusted
