"""Intervals and paired tests: pure functions of counts and of per-item correctness."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtri

Interval = tuple[float, float]


@dataclass(frozen=True)
class McNemar:
    """b: items that only the first model got right; c: only the second; p_value: exact, two-sided."""

    b: int
    c: int
    p_value: float


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval | None:
    """Score interval of a proportion, without continuity correction; None where total is 0.

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
    # At 0 and at total the bound is 0 or 1 exactly; arithmetic alone leaves 1e-17.
    low = 0.0 if successes == 0 else float((centre - half_width) / scale)
    high = 1.0 if successes == total else float((centre + half_width) / scale)
    return low, high


def bootstrap_interval(
    counts: Sequence[int] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of a score that depends only on how many items are of each kind.

    counts: (kinds,) how many of the n items are of each kind (the cells of a confusion matrix, the distinct values
    of a per-item score). statistic: (num_resamples, kinds) resampled counts -> (num_resamples,) scores.
    Drawing n items with replacement is one multinomial draw over the kinds, so the cost does not grow with n.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    assert total > 0 and (counts >= 0).all(), counts
    resampled = np.random.default_rng(seed).multinomial(total, counts / total, size=num_resamples)
    scores = np.asarray(statistic(resampled))
    assert scores.shape == (num_resamples,), scores.shape
    low, high = np.quantile(scores, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap_mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap over items of the mean of a score, (items,); as `bootstrap_interval`."""
    kinds, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return bootstrap_interval(counts, lambda resampled: resampled @ kinds / len(values), seed)


@dataclass(frozen=True)
class PairedMeans:
    """Two models' mean score on the same items, second minus first: bootstrap interval, two-sided randomisation p."""

    first: float
    second: float
    difference: float
    difference_ci95: Interval
    p_value: float


def paired_means(first: np.ndarray, second: np.ndarray, seed: int = 0, num_resamples: int = 10_000) -> PairedMeans:
    """(items,) scores of the same items in the same order, of two models.

    Under the null an item's difference has either sign with equal chance: p is the share of random signs that give a
    difference as large, the observed one counted among them. Fisher 1935, The Design of Experiments, section 21.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert first.shape == second.shape and first.ndim == 1 and len(first), (first.shape, second.shape)
    differences = second - first
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    positive = np.random.default_rng(seed).binomial(counts, 0.5, size=(num_resamples, len(counts)))
    sums = np.abs((2 * positive - counts) @ sizes)
    # rounding must not part sums that are equal
    num_as_large = int((sums >= abs(differences.sum()) - 1e-9 * len(first)).sum())
    return PairedMeans(
        first=float(first.mean()),
        second=float(second.mean()),
        difference=float(differences.mean()),
        difference_ci95=bootstrap_mean_interval(differences, seed),
        p_value=(1 + num_as_large) / (1 + num_resamples),
    )


def paired_counts(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int, int, int]:
    """(items,) and (items,) booleans of the same items in the same order -> both right, only a, only b, neither."""
    correct_a, correct_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert correct_a.shape == correct_b.shape and correct_a.ndim == 1, (correct_a.shape, correct_b.shape)
    both, only_a = int((correct_a & correct_b).sum()), int((correct_a & ~correct_b).sum())
    only_b = int((~correct_a & correct_b).sum())
    return both, only_a, only_b, len(correct_a) - both - only_a - only_b


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """Exact two-sided test that two models are right equally often on the same items; (items,) booleans each.

    McNemar 1947, Psychometrika 12:153-157; exact form: under the null the smaller discordant count is
    Binomial(b + c, 1/2). Without discordant items p is 1.
    """
    _, b, c, _ = paired_counts(correct_a, correct_b)
    return McNemar(b, c, min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5))))


def paired_difference_interval(
    correct_a: np.ndarray, correct_b: np.ndarray, confidence: float = 0.95
) -> Interval | None:
    """Interval of accuracy(b) - accuracy(a) on the same items; (items,) booleans each. None without items.

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
    """Family-wise adjusted p-values, in the order given. Holm 1979, Scand. J. Stat. 6:65-70."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = float(min(1.0, running))
    return adjusted
