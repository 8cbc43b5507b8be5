"""Scores of two-label classification, with intervals. Label 1 is the positive class; every score lies in 0-1.

Light to import: the `evaluate` metric that computes the reported scores lives in classification_metric.py.
"""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import numpy as np

from zerotune.metrics.statistics import bootstrap_interval, wilson_interval

METRIC_NAMES = (
    "accuracy",
    "precision",
    "recall",
    "f1",
    "precision_macro",
    "recall_macro",
    "f1_macro",
    "accuracy_negative",
    "accuracy_positive",
)


# The prediction of an answer in which no label can be read: a miss of its label, and of no predicted class.
UNPARSABLE = -1


def confusion_matrix(labels: Sequence[int] | np.ndarray, predictions: Sequence[int] | np.ndarray) -> np.ndarray:
    """(items,) labels of 0 and 1 and predictions -> (2, 2) counts [[tn, fp], [fn, tp]]: a row per label.

    With predictions that are UNPARSABLE it is (2, 3): their counts stand in a third column.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    assert labels.shape == predictions.shape and labels.ndim == 1, (labels.shape, predictions.shape)
    assert np.isin(labels, (0, 1)).all() and np.isin(predictions, (0, 1, UNPARSABLE)).all(), "classes are 0 and 1"
    columns = np.where(predictions == UNPARSABLE, 2, predictions).astype(np.int64)
    confusion = np.bincount(3 * labels.astype(np.int64) + columns, minlength=6).reshape(2, 3)
    return confusion if confusion[:, 2].any() else confusion[:, :2]


def confusion_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """(..., 2, 2) or (..., 2, 3) counts -> each of METRIC_NAMES with shape (...).

    The definitions are scikit-learn's with both labels always counted and zero_division=0: a ratio over 0 is 0.
    This is the fast route for the choosing split and for resampling; the reported scores are scikit-learn's own.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    num_labelled, num_predicted = confusion.sum(axis=-1), confusion[..., :2].sum(axis=-2)
    precision, recall = _ratio(hits, num_predicted), _ratio(hits, num_labelled)
    f1 = _ratio(2 * hits, num_labelled + num_predicted)
    return {
        "accuracy": _ratio(hits.sum(axis=-1), num_labelled.sum(axis=-1)),
        "precision": precision[..., 1],
        "recall": recall[..., 1],
        "f1": f1[..., 1],
        "precision_macro": precision.mean(axis=-1),
        "recall_macro": recall.mean(axis=-1),
        "f1_macro": f1.mean(axis=-1),
        "accuracy_negative": recall[..., 0],
        "accuracy_positive": recall[..., 1],
    }


def confusion_intervals(confusion: np.ndarray, seed: int = 0) -> dict[str, list[float] | None]:
    """(2, 2) or (2, 3) counts -> NAME_ci95 for each of METRIC_NAMES, [low, high] or None where the denominator is 0.

    Proportions (accuracy, precision, recall, accuracy_negative, accuracy_positive): Wilson, each over its denominator.
    The others: percentile bootstrap over items, 10,000 resamples seeded by `seed`; at a perfect score it has no width.
    """
    confusion = np.asarray(confusion)
    (tn, fp), (_, tp) = confusion[:, :2].tolist()
    num_negative, num_positive = confusion.sum(axis=1).tolist()
    proportions = {
        "accuracy": (tn + tp, num_negative + num_positive),
        "precision": (tp, tp + fp),
        "recall": (tp, num_positive),
        "accuracy_negative": (tn, num_negative),
        "accuracy_positive": (tp, num_positive),
    }
    intervals: dict[str, list[float] | None] = {}
    for name in METRIC_NAMES:
        if name in proportions:
            interval = wilson_interval(*proportions[name])
        else:
            interval = bootstrap_interval(
                confusion.flatten(),
                lambda cells, name=name: confusion_scores(cells.reshape(-1, *confusion.shape))[name],
                seed=seed,
            )
        intervals[f"{name}_ci95"] = None if interval is None else list(interval)
    return intervals


def classification_metrics(
    labels: Sequence[int] | np.ndarray, predictions: Sequence[int] | np.ndarray, seed: int = 0
) -> dict[str, float | int | list | None]:
    """(items,) labels of 0 and 1 and predictions -> the flat object of metrics.json: each score, its `_ci95`, counts.

    Counts: count, count_negative, count_positive (by label) and confusion, as of `confusion_matrix`.
    A score over nothing (precision without a positive prediction) is 0.0 as in scikit-learn, and its `_ci95` is None.
    """
    # evaluate imports transformers' pipelines: seconds that no --help should pay.
    from zerotune.metrics.classification_metric import ClassificationMetric

    confusion = confusion_matrix(labels, predictions)
    assert confusion.sum() > 0, "no items to score"
    # evaluate creates its cache folder even when it keeps everything in memory.
    with TemporaryDirectory() as cache_dir:
        metric = ClassificationMetric(cache_dir=cache_dir, keep_in_memory=True, seed=seed)
        scores = metric.compute(predictions=np.asarray(predictions), references=np.asarray(labels))
    intervals = confusion_intervals(confusion, seed)
    metrics: dict[str, float | int | list | None] = {}
    for name in METRIC_NAMES:
        metrics[name], metrics[f"{name}_ci95"] = scores[name], intervals[f"{name}_ci95"]
    num_negative, num_positive = confusion.sum(axis=1).tolist()
    counts = {"count": num_negative + num_positive, "count_negative": num_negative, "count_positive": num_positive}
    return {**metrics, **counts, "confusion": confusion.tolist()}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
