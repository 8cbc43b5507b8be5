"""Test scores of label sets by hand, against scikit-learn on resampled items, and for edge cases."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, hamming_loss, precision_score

from zerotune.metrics import statistics
from zerotune.metrics.evaluations import score_names
from zerotune.metrics.label_sets import label_set_metrics, label_set_scores
from zerotune.metrics.statistics import resample_counts, wilson_interval

NAMES = ("a", "b", "micro", "unused")
LABELS = [(0,), (0, 1), (), (1, 2), (2,)]
GIVEN = [(0,), (0,), (), (1,), (0, 2)]


def random_sets(num_items, seed):
    rng = np.random.default_rng(seed)
    actual = rng.random((num_items, 3)) < (0.5, 0.2, 0.1)
    return actual, actual ^ (rng.random((num_items, 3)) < 0.1)


def test_scores_by_hand():
    metrics = label_set_metrics(LABELS, GIVEN, NAMES)
    expected = {
        "exact_match": 2 / 5,
        "precision_micro": 4 / 5,  # four of the five given labels are right
        "recall_micro": 4 / 6,
        "f1_micro": 8 / 11,
        "precision_macro": (2 / 3 + 1 + 1) / 3,
        "recall_macro": (1 + 1 / 2 + 1 / 2) / 3,
        "f1_macro": (4 / 5 + 2 / 3 + 2 / 3) / 3,
        "hamming_loss": 3 / 20,
        "f1_label_a": 4 / 5,
        "f1_label_b": 2 / 3,
        "f1_label_micro": 2 / 3,
        "f1_label_unused": 0.0,
    }
    assert {name: metrics[name] for name in score_names(metrics)} == pytest.approx(expected)
    assert metrics["count"] == 5 and metrics["num_without_label"] == 1
    assert [metrics[f"count_{name}"] for name in NAMES] == [2, 2, 2, 0]
    assert metrics["exact_match_ci95"] == list(wilson_interval(2, 5))


def test_the_bootstrap_is_over_items():
    """Compare with scikit-learn on resampled items: standard errors are 0.01-0.03, and bootstraps differ by a tenth."""
    actual, given = random_sets(300, 2)
    rows = np.random.default_rng(7).integers(0, 300, (600, 300))
    by_hand = {
        "f1_micro": lambda row: f1_score(actual[row], given[row], average="micro"),
        "f1_macro": lambda row: f1_score(actual[row], given[row], average="macro"),
        "precision_micro": lambda row: precision_score(actual[row], given[row], average="micro"),
        "hamming_loss": lambda row: hamming_loss(actual[row], given[row]),
        "f1_label_c": lambda row: f1_score(actual[row][:, 2], given[row][:, 2]),
    }
    sets = ([tuple(np.flatnonzero(row)) for row in each] for each in (actual, given))
    metrics = label_set_metrics(*sets, ("a", "b", "c"))
    for name, score in by_hand.items():
        expected = np.quantile([score(row) for row in rows], [0.025, 0.975])
        margin = 0.15 * (expected[1] - expected[0])
        assert metrics[f"{name}_ci95"] == pytest.approx(expected, abs=margin), name


def test_resamples_in_parts_are_the_same(monkeypatch):
    actual, given = random_sets(50, 3)
    sets = [[tuple(np.flatnonzero(row)) for row in each] for each in (actual, given)]
    whole, (counts,) = label_set_metrics(*sets, "abc"), resample_counts([3, 4, 1], 0)
    monkeypatch.setattr(statistics, "MOST_DRAWN_TOGETHER", 1000)
    parts = list(resample_counts([3, 4, 1], 0))
    assert label_set_metrics(*sets, "abc") == whole and len(parts) > 1 and (np.concatenate(parts) == counts).all()


def test_items_without_labels_and_predictions_are_right_and_every_ratio_is_0():
    metrics = label_set_metrics([(), ()], [(), ()], ("a", "b"))
    assert metrics["exact_match"] == 1 and metrics["hamming_loss"] == 0
    assert metrics["f1_micro"] == metrics["f1_macro"] == metrics["f1_label_a"] == 0
    assert metrics["f1_macro_ci95"] == [0, 0] and metrics["num_without_label"] == 2


def test_a_macro_score_leaves_out_labels_that_no_item_has_or_is_given():
    actual, given = np.array([[1, 0, 0], [1, 0, 0]], dtype=bool), np.array([[1, 0, 0], [1, 1, 0]], dtype=bool)
    scores = label_set_scores(actual, given)
    assert scores["f1_macro"] == 0.5 and scores["f1_micro"] == pytest.approx(4 / 5)


def test_a_label_that_a_sample_lacks_is_left_out_of_its_means():
    sets = [(number % 20,) for number in range(40)]
    assert label_set_metrics(sets, sets, tuple("abcdefghijklmnopqrst"))["f1_macro_ci95"] == [1.0, 1.0]


def test_unlabelled_items_are_counted():
    assert label_set_metrics([None, None], [(0,), ()], ("a", "b")) == {"count": 2}
