"""Test the bins of a reliability diagram and the calibration error from them."""

import pytest

from zerotune.metrics.calibration import expected_calibration_error, reliability_bins


def test_bins_and_their_error_by_hand():
    bins = reliability_bins([0.5, 0.55, 0.6, 0.95, 1.0], [True, False, True, True, False], num_bins=10)
    # (0.4, 0.5], (0.5, 0.6] and (0.9, 1]: the edge belongs to the lower bin
    assert [(each.count, each.num_right) for each in bins] == [(1, 1), (2, 1), (2, 1)]
    assert [each.probability for each in bins] == pytest.approx([0.5, 0.575, 0.975])
    assert expected_calibration_error(bins) == pytest.approx((0.5 + 2 * 0.075 + 2 * 0.475) / 5)


def test_probabilities_that_come_true_have_no_error():
    bins = reliability_bins([0.75] * 4 + [1.0] * 3, [True, True, True, False] + [True] * 3)
    assert expected_calibration_error(bins) == pytest.approx(0)
