"""Scores and intervals against published examples, scikit-learn and scipy."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from zerotune.metrics.labels import (
    METRIC_NAMES,
    UNPARSABLE,
    classification_metrics,
    confusion_intervals,
    confusion_matrix,
    confusion_scores,
)
from zerotune.metrics.statistics import (
    bootstrap_interval,
    holm_adjusted,
    mcnemar,
    paired_counts,
    paired_difference_interval,
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
    result = mcnemar(*paired_arrays(3, only_a, only_b, 4))
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert (result.b, result.c) == (only_a, only_b)
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    # 2 * (C(8, 0) + C(8, 1)) / 2^8
    assert mcnemar(*paired_arrays(0, 1, 7, 0)).p_value == 2 * 9 / 256


def test_mcnemar_with_thousands_of_discordant_items_stays_finite():
    p_value = mcnemar(*paired_arrays(10_000, 1_000, 9_000, 5_000)).p_value
    assert 0.0 <= p_value < 1e-300


def test_paired_counts():
    assert paired_counts(*paired_arrays(4, 3, 2, 1)) == (4, 3, 2, 1)


def test_holm_worked_example():
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.6, 0.9]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_bootstrap_of_a_mean_matches_the_normal_limit():
    # 4,000 items, 60 % ones: standard error sqrt(0.24 / 4000) = 0.007746; 10,000 resamples place a 2.5 % quantile
    # within about 0.03 standard errors, and 0.002 is a quarter of one.
    low, high = bootstrap_interval([1600, 2400], lambda counts: counts[:, 1] / 4000)
    assert (low, high) == pytest.approx((0.6 - 1.96 * 0.007746, 0.6 + 1.96 * 0.007746), abs=0.002)


def test_bootstrap_is_the_one_over_items():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 400)
    predictions = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    rows = rng.integers(0, 400, (1500, 400))
    scores = [f1_score(labels[row], predictions[row]) for row in rows]
    expected = np.quantile(scores, [0.025, 0.975])
    # F1's standard error is 0.02 here; two bootstraps of 1,500 and 10,000 differ by about a tenth of it.
    assert confusion_intervals(confusion_matrix(labels, predictions))["f1_ci95"] == pytest.approx(expected, abs=0.007)


def test_confusion_is_labels_by_predictions():
    assert confusion_matrix([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]).tolist() == [[1, 2], [1, 3]]


def test_scores_by_hand():
    metrics = classification_metrics([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0])
    expected = {
        "accuracy": 4 / 7,
        "precision": 3 / 5,
        "recall": 3 / 4,
        "f1": 2 / 3,
        "precision_macro": (1 / 2 + 3 / 5) / 2,
        "recall_macro": (1 / 3 + 3 / 4) / 2,
        "f1_macro": (2 / 5 + 2 / 3) / 2,
        "accuracy_negative": 1 / 3,
        "accuracy_positive": 3 / 4,
    }
    assert {name: metrics[name] for name in METRIC_NAMES} == pytest.approx(expected)
    assert metrics["precision_ci95"] == pytest.approx(wilson_interval(3, 5))
    assert metrics["recall_ci95"] == metrics["accuracy_positive_ci95"] == pytest.approx(wilson_interval(3, 4))
    assert metrics["accuracy_negative_ci95"] == pytest.approx(wilson_interval(1, 3))
    assert (metrics["count"], metrics["count_negative"], metrics["count_positive"]) == (7, 3, 4)
    assert metrics["confusion"] == [[1, 2], [1, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_fast_scores_equal_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 2, (2, int(rng.integers(1, 30))))
    reported = classification_metrics(labels, predictions)
    fast = confusion_scores(confusion_matrix(labels, predictions))
    assert {name: float(fast[name]) for name in METRIC_NAMES} == pytest.approx({n: reported[n] for n in METRIC_NAMES})


def test_scores_over_nothing_are_zero_with_no_interval():
    metrics = classification_metrics([0, 0], [0, 0])
    for name in ("precision", "recall", "accuracy_positive"):
        assert (metrics[name], metrics[f"{name}_ci95"]) == (0.0, None)
    assert metrics["accuracy"] == metrics["accuracy_negative"] == 1.0
    assert metrics["f1_macro"] == 0.5


def test_intervals_repeat_by_seed_and_hold_the_score():
    labels, predictions = [0, 1] * 50, [0, 1, 1, 1] * 25
    first, again = classification_metrics(labels, predictions, 3), classification_metrics(labels, predictions, 3)
    assert first == again
    assert first["f1_ci95"] != classification_metrics(labels, predictions, 4)["f1_ci95"]
    for name in METRIC_NAMES:
        low, high = first[f"{name}_ci95"]
        assert 0 <= low <= first[name] <= high <= 1


def test_25_000_items_are_fast():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, (2, 25_000))
    classification_metrics(labels[:2], predictions[:2])
    start = time.perf_counter()
    classification_metrics(labels, predictions)
    # Measured 0.2 s; a loop over items for 10,000 resamples takes minutes.
    assert time.perf_counter() - start < 5


SCORE_WITHOUT_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from zerotune.metrics.labels import classification_metrics
assert classification_metrics([0, 1, 1], [0, 1, 0])["recall"] == 0.5
"""


def test_no_network_and_no_litter(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", SCORE_WITHOUT_NETWORK]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path not in (home, temporary)) == []


def test_metrics_module_is_light_to_import():
    heavy = "{'torch', 'evaluate', 'sklearn', 'matplotlib', 'datasets', 'transformers'}"
    command = [sys.executable, "-c", f"import sys, zerotune.metrics.labels; print({heavy} & set(sys.modules))"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


# --- answers in which no label can be read ---

UNPARSED_LABELS = [0, 0, 0, 0, 1, 1, 1]
UNPARSED_PREDICTIONS = [0, 0, 1, UNPARSABLE, 1, UNPARSABLE, UNPARSABLE]


def test_an_unparsable_answer_is_a_miss_and_of_no_predicted_class():
    """By hand: negative 2 of 4 found, 2 of 2 such predictions right; positive 1 of 3 found, 1 of 2 right."""
    metrics = classification_metrics(UNPARSED_LABELS, UNPARSED_PREDICTIONS)
    wanted = {
        "accuracy": 3 / 7,
        "precision": 1 / 2,
        "recall": 1 / 3,
        "f1": 2 / 5,
        "precision_macro": (1 + 1 / 2) / 2,
        "recall_macro": (1 / 2 + 1 / 3) / 2,
        "f1_macro": (2 / 3 + 2 / 5) / 2,
        "accuracy_negative": 1 / 2,
        "accuracy_positive": 1 / 3,
    }
    assert {name: metrics[name] for name in METRIC_NAMES} == pytest.approx(wanted)
    assert metrics["confusion"] == [[2, 1, 1], [0, 1, 2]]
    assert (metrics["count"], metrics["count_negative"], metrics["count_positive"]) == (7, 4, 3)
    for name, successes, total in (("accuracy", 3, 7), ("precision", 1, 2), ("recall", 1, 3)):
        assert metrics[f"{name}_ci95"] == pytest.approx(list(wilson_interval(successes, total)))
    fast = confusion_scores(confusion_matrix(UNPARSED_LABELS, UNPARSED_PREDICTIONS))
    assert {name: float(value) for name, value in fast.items()} == pytest.approx(wanted)
    low, high = metrics["f1_ci95"]
    assert low < wanted["f1"] < high


def test_a_third_column_without_items_changes_nothing():
    confusion = np.array([[5, 2], [1, 7]])
    wider = np.concatenate([confusion, np.zeros((2, 1), dtype=int)], axis=1)
    assert confusion_scores(confusion) == confusion_scores(wider)
    wilson = ("accuracy_ci95", "precision_ci95", "recall_ci95", "accuracy_negative_ci95", "accuracy_positive_ci95")
    ours, theirs = confusion_intervals(confusion), confusion_intervals(wider)
    assert {name: ours[name] for name in wilson} == {name: theirs[name] for name in wilson}
