"""Test intervals and paired tests against published examples and scipy."""

import numpy as np
import pytest
from scipy.stats import binomtest

from zerotune.metrics.statistics import (
    bootstrap_interval,
    holm_adjusted,
    mcnemar_p_value,
    paired_counts,
    paired_difference_interval,
    paired_means,
    wilson_interval,
)


def paired_arrays(both, only_a, only_b, neither):
    counts = (both, only_a, only_b, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


# Table I of Newcombe 1998, Stat. Med. 17:857-872, method 3.
@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (17, 40), (872, 872), (812, 872)])
def test_wilson_agrees_with_scipy(successes, total):
    expected = binomtest(successes, total).proportion_ci(0.9, method="wilson")
    assert wilson_interval(successes, total, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_edges_are_exact_and_nothing_is_none():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    assert wilson_interval(0, 0) is None


# Newcombe 1998, Stat. Med. 17:2635-2650, method 10; the paper's difference is first minus second.
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((18, 12, 2, 18), 0.0562, 0.3290), ((53, 0, 0, 1), -0.0729, 0.0729)],
)
def test_paired_difference_published(table, low, high):
    first, second = paired_arrays(*table)
    assert paired_difference_interval(second, first) == pytest.approx((low, high), abs=1e-4)
    assert paired_difference_interval(first, second) == pytest.approx((-high, -low), abs=1e-4)


def test_paired_difference_edges():
    empty = np.array([], dtype=bool)
    assert paired_difference_interval(empty, empty) is None
    low, high = paired_difference_interval(*paired_arrays(0, 0, 10, 0))
    assert 0 < low < 1 and high == pytest.approx(1.0)


@pytest.mark.parametrize("only_a", [0, 1, 5, 12, 86])
@pytest.mark.parametrize("only_b", [0, 1, 7, 12, 150])
def test_mcnemar_agrees_with_the_exact_binomial_test(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    # 2 * (C(8, 0) + C(8, 1)) / 2^8
    assert mcnemar_p_value(1, 7) == 2 * 9 / 256


def test_mcnemar_with_thousands_of_discordant_items_stays_finite():
    assert 0.0 < mcnemar_p_value(1_000, 9_000) < 1e-300  # an exact p-value is never 0


def test_paired_counts():
    assert paired_counts(*paired_arrays(4, 3, 2, 1)) == (4, 3, 2, 1)


def test_holm_worked_example():
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.6, 0.9]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_bootstrap_of_a_mean_matches_the_normal_limit():
    # 4,000 items, 60 % ones: the standard error is sqrt(0.24 / 4000) = 0.007746. 10,000 resamples place a 2.5 %
    # quantile within about 0.03 standard errors, and 0.002 is a quarter of one.
    low, high = bootstrap_interval([1600, 2400], lambda counts: counts[:, 1] / 4000)
    assert (low, high) == pytest.approx((0.6 - 1.96 * 0.007746, 0.6 + 1.96 * 0.007746), abs=0.002)


def test_paired_means_by_hand():
    """Three items differ by 1/2 each in the same direction: 2 of 8 sign patterns are as extreme."""
    first, second = np.array([0.0, 0.5, 0.25, 1.0]), np.array([0.5, 1.0, 0.75, 1.0])
    found = paired_means(first, second)
    assert (found.first, found.second) == (0.4375, 0.8125) and found.difference == 0.375
    assert found.p_value == pytest.approx(0.25, abs=0.02)  # 10,000 draws: standard error 0.004
    low, high = found.difference_ci95
    assert 0 <= low < 0.375 < high <= 0.5
    assert paired_means(first, first).p_value == 1.0
    assert paired_means(np.zeros(50), np.ones(50)).p_value == 1 / 10_001  # only the observed signs are as extreme
