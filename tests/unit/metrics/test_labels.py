"""Test label scores against scikit-learn and by hand, for two labels and for more."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef, precision_recall_fscore_support

from zerotune.metrics.evaluations import score_names
from zerotune.metrics.labels import (
    UNPARSABLE,
    PredictedLabels,
    classification_metrics,
    confusion_intervals,
    confusion_matrix,
    confusion_scores,
    label_metrics,
)
from zerotune.metrics.statistics import wilson_interval

TWO = ("negative", "positive")
THREE = ("refund", "login", "other request")
SCORES = [
    "accuracy", "precision", "recall", "f1", "precision_macro", "recall_macro", "f1_macro", "matthews",
    "accuracy_negative",    "accuracy_positive",
]  # fmt: skip


def test_bootstrap_is_the_one_over_items():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 400)
    predictions = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    rows = rng.integers(0, 400, (1500, 400))
    scores = [f1_score(labels[row], predictions[row]) for row in rows]
    expected = np.quantile(scores, [0.025, 0.975])
    # F1's standard error is 0.02 here; bootstraps of 1,500 and of 10,000 resamples differ by about a tenth of it.
    intervals = confusion_intervals(confusion_matrix(labels, predictions, 2), TWO)
    assert intervals["f1_ci95"] == pytest.approx(expected, abs=0.007)


def test_confusion_is_labels_by_predictions():
    assert confusion_matrix([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0], 2).tolist() == [[1, 2], [1, 3]]


def test_scores_by_hand():
    metrics = classification_metrics([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0], TWO)
    expected = {
        "accuracy": 4 / 7,
        "precision": 3 / 5,
        "recall": 3 / 4,
        "f1": 2 / 3,
        "precision_macro": (1 / 2 + 3 / 5) / 2,
        "recall_macro": (1 / 3 + 3 / 4) / 2,
        "f1_macro": (2 / 5 + 2 / 3) / 2,
        "matthews": (1 * 3 - 1 * 2) / (2 * 5 * 3 * 4) ** 0.5,
        "accuracy_negative": 1 / 3,
        "accuracy_positive": 3 / 4,
    }
    assert {name: metrics[name] for name in SCORES} == pytest.approx(expected)
    assert metrics["precision_ci95"] == pytest.approx(wilson_interval(3, 5))
    assert metrics["recall_ci95"] == metrics["accuracy_positive_ci95"] == pytest.approx(wilson_interval(3, 4))
    assert metrics["accuracy_negative_ci95"] == pytest.approx(wilson_interval(1, 3))
    assert (metrics["count"], metrics["count_negative"], metrics["count_positive"]) == (7, 3, 4)
    assert metrics["confusion"] == [[1, 2], [1, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_fast_scores_equal_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 2, (2, int(rng.integers(1, 30))))
    reported = classification_metrics(labels, predictions, TWO)
    fast = confusion_scores(confusion_matrix(labels, predictions, 2), TWO)
    assert {name: float(fast[name]) for name in SCORES} == pytest.approx({n: reported[n] for n in SCORES})


def test_scores_over_nothing_are_zero_with_no_interval():
    metrics = classification_metrics([0, 0], [0, 0], TWO)
    for name in ("precision", "recall", "accuracy_positive"):
        assert (metrics[name], metrics[f"{name}_ci95"]) == (0.0, None)
    assert metrics["accuracy"] == metrics["accuracy_negative"] == 1.0
    assert metrics["f1_macro"] == 1.0  # only one label occurs


def test_a_label_that_a_sample_lacks_is_left_out_of_its_means():
    confusion = np.diag([50, 49, 1])  # all right: a third of the samples have no item of the last label
    intervals = confusion_intervals(confusion, THREE)
    assert all(intervals[f"{name}_macro_ci95"] == [1.0, 1.0] for name in ("f1", "precision", "recall"))
    assert np.isclose(confusion_scores(confusion, THREE)["f1_macro"], 1.0)


def test_intervals_repeat_by_seed_and_hold_the_score():
    labels, predictions = [0, 1] * 50, [0, 1, 1, 1] * 25
    first, again = (classification_metrics(labels, predictions, TWO, 3) for _ in range(2))
    assert first == again
    assert first["f1_ci95"] != classification_metrics(labels, predictions, TWO, 4)["f1_ci95"]
    for name in SCORES:
        low, high = first[f"{name}_ci95"]
        assert 0 <= low <= first[name] <= high <= 1


def test_25_000_items_are_fast():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, (2, 25_000))
    classification_metrics(labels[:2], predictions[:2], TWO)
    start = time.perf_counter()
    classification_metrics(labels, predictions, TWO)
    # Measured 0.2 s; a loop over items for 10,000 resamples takes minutes.
    assert time.perf_counter() - start < 5


SCORE_WITHOUT_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from zerotune.metrics.labels import classification_metrics
assert classification_metrics([0, 1, 1], [0, 1, 0], ("no", "yes"))["recall"] == 0.5
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
    heavy = "{'torch', 'sklearn', 'matplotlib', 'datasets', 'transformers'}"
    command = [sys.executable, "-c", f"import sys, zerotune.metrics.labels; print({heavy} & set(sys.modules))"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


# --- answers in which no label can be read ---

UNPARSED_LABELS = [0, 0, 0, 0, 1, 1, 1]
UNPARSED_PREDICTIONS = [0, 0, 1, UNPARSABLE, 1, UNPARSABLE, UNPARSABLE]


def test_an_unparsable_answer_is_a_miss_and_of_no_predicted_class():
    """By hand: 2 of 4 negatives are found, and 2 of 2 such predictions are right; 1 of 3 positives, and 1 of 2."""
    metrics = classification_metrics(UNPARSED_LABELS, UNPARSED_PREDICTIONS, TWO)
    wanted = {
        "accuracy": 3 / 7,
        "precision": 1 / 2,
        "recall": 1 / 3,
        "f1": 2 / 5,
        "precision_macro": (1 + 1 / 2) / 2,
        "recall_macro": (1 / 2 + 1 / 3) / 2,
        "f1_macro": (2 / 3 + 2 / 5) / 2,
        "matthews": matthews_corrcoef(UNPARSED_LABELS, [-1 if one is None else one for one in UNPARSED_PREDICTIONS]),
        "accuracy_negative": 1 / 2,
        "accuracy_positive": 1 / 3,
    }
    assert {name: metrics[name] for name in SCORES} == pytest.approx(wanted)
    assert metrics["confusion"] == [[2, 1, 1], [0, 1, 2]]
    assert (metrics["count"], metrics["count_negative"], metrics["count_positive"]) == (7, 4, 3)
    for name, successes, total in (("accuracy", 3, 7), ("precision", 1, 2), ("recall", 1, 3)):
        assert metrics[f"{name}_ci95"] == pytest.approx(list(wilson_interval(successes, total)))
    fast = confusion_scores(confusion_matrix(UNPARSED_LABELS, UNPARSED_PREDICTIONS, 2), TWO)
    assert fast == pytest.approx(wanted)
    low, high = metrics["f1_ci95"]
    assert low < wanted["f1"] < high


def test_a_third_column_without_items_changes_nothing():
    confusion = np.array([[5, 2], [1, 7]])
    wider = np.concatenate([confusion, np.zeros((2, 1), dtype=int)], axis=1)
    assert confusion_scores(confusion, TWO) == confusion_scores(wider, TWO)
    assert confusion_intervals(confusion, TWO) == confusion_intervals(wider, TWO)


def test_unlabelled_calibrated_and_written_answers():
    """Test the entries of metrics.json besides the predictions' scores."""
    assert label_metrics([None, None], PredictedLabels([0, 1], {}), TWO) == {"count": 2}
    written = label_metrics([0, 1, 1, 1], PredictedLabels([0, None, 1, None], {}, written=True), TWO)
    assert (written["num_unparsable"], written["unparsable_share"], written["accuracy"]) == (2, 0.5, 0.5)
    calibrated = label_metrics([0, 1], PredictedLabels([0, 1], {}, uncalibrated=[1, 1]), TWO)
    before = {name: value for name, value in calibrated.items() if name.startswith("uncalibrated_")}
    assert calibrated["accuracy"] == 1.0 and before["uncalibrated_accuracy"] == 0.5
    wanted = {
        f"uncalibrated_{name}{end}" for name in ("accuracy", "precision", "recall", "f1") for end in ("", "_ci95")
    }
    assert set(before) == wanted


# --- more than two labels ---


@pytest.mark.parametrize("share_unparsable", [0.0, 0.2])
def test_three_labels_agree_with_scikit_learn(share_unparsable):
    rng = np.random.default_rng(2)
    labels, predictions = rng.integers(0, 3, (2, 200))
    predictions = np.where(rng.random(200) < share_unparsable, UNPARSABLE, predictions)
    metrics = classification_metrics(labels, predictions, THREE)
    macro = precision_recall_fscore_support(labels, predictions, labels=[0, 1, 2], average="macro", zero_division=0.0)
    assert score_names(metrics) == [
        "accuracy", "precision_macro", "recall_macro", "f1_macro", "matthews", *(f"accuracy_{name}" for name in THREE)
    ]  # fmt: skip
    assert [metrics[f"{name}_macro"] for name in ("precision", "recall", "f1")] == pytest.approx(macro[:3])
    assert confusion_scores(np.array(metrics["confusion"]), THREE) == pytest.approx(
        {name: metrics[name] for name in score_names(metrics)}
    )
    assert [metrics[f"count_{name}"] for name in THREE] == np.bincount(labels).tolist()
    right = int((predictions[labels == 1] == 1).sum())
    assert metrics["accuracy_login_ci95"] == pytest.approx(wilson_interval(right, metrics["count_login"]))
    for name in score_names(metrics):
        low, high = metrics[f"{name}_ci95"]
        assert low < metrics[name] < high, name


def test_a_label_that_never_occurs_is_left_out_of_the_macro_means():
    """scikit-learn does the same if no labels are given."""
    metrics = classification_metrics([0, 0, 1], [0, 0, 1], THREE)
    assert metrics["accuracy"] == 1.0 and metrics["f1_macro"] == f1_score([0, 0, 1], [0, 0, 1], average="macro") == 1.0
    assert (metrics["accuracy_other request"], metrics["accuracy_other request_ci95"]) == (0.0, None)


def test_a_label_without_a_name_is_a_bug():
    with pytest.raises(AssertionError, match="a label has no name"):
        confusion_matrix([0, 3], [0, 1], 3)
    with pytest.raises(AssertionError, match="a prediction is no label"):
        confusion_matrix([0, 1], [0, -2], 3)


def test_150_labels_are_fast():
    """A bootstrap over all 22,500 cells of the matrix would take 1.8 GB, so only cells with items are drawn."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 150, 4_500)
    predictions = np.where(rng.random(4_500) < 0.9, labels, rng.integers(0, 150, 4_500))
    start = time.perf_counter()
    metrics = classification_metrics(labels, predictions, [f"intent-{number}" for number in range(150)])
    assert time.perf_counter() - start < 20 and metrics["f1_macro"] > 0.85
