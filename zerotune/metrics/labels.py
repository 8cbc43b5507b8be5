"""Score the labels that a model gives: accuracy, precision, recall and F1 with intervals, for two or more labels.

A label is its place in `label_names`; of two labels, the second is the positive class. Scores are in 0-1 (Matthews'
correlation in -1 to 1), and a ratio over 0 is 0. A macro score is the mean over the labels that some item has or is
predicted to have. scikit-learn computes the reported scores. `confusion_scores` computes the same ones from counts,
which is fast enough for thousands of resamples.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerotune.metrics.statistics import percentile_interval, resample_counts, wilson_interval

# The prediction of an answer that names no label: wrong, and not counted for any predicted label.
UNPARSABLE = -1
# Scores that a calibrated evaluation also reports without calibration.
UNCALIBRATED_SCORES = ("accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class PredictedLabels:
    """The labels that a model gives to some items, in their order.

    Attributes:
        predictions: numbers of labels, None if a written answer names none.
        details: further columns of predictions.jsonl, by name.
        uncalibrated: the predictions before calibration; None if nothing is calibrated.
        written: whether the labels were read from text that the model wrote.
    """

    predictions: list[int | None]
    details: dict[str, list]
    uncalibrated: list[int] | None = None
    written: bool = False


def label_metrics(labels: Sequence[int | None], predicted: PredictedLabels, label_names: Sequence[str]) -> dict:
    """Return the part of metrics.json that was measured; only counts if the items are unlabelled (all are None)."""
    if labels[0] is None:
        metrics: dict = {"count": len(labels)}
    else:
        metrics = classification_metrics(labels, predicted.predictions, label_names)
        if predicted.uncalibrated is not None:
            before = classification_metrics(labels, predicted.uncalibrated, label_names)
            kept = [name for name in before if name.removesuffix("_ci95") in UNCALIBRATED_SCORES]
            metrics |= {f"uncalibrated_{name}": before[name] for name in kept}
    if predicted.written:
        num_unparsable = predicted.predictions.count(None)
        metrics |= {"num_unparsable": num_unparsable, "unparsable_share": num_unparsable / len(labels)}
    return metrics


def classification_metrics(
    labels: Sequence[int], predictions: Sequence[int | None], label_names: Sequence[str], seed: int = 0
) -> dict[str, float | int | list | None]:
    """Return each score with its `_ci95`, the counts (count, count_LABEL), and the confusion matrix.

    Args:
        labels: [items], each 0 … len(label_names) - 1.
        predictions: [items], the same numbers, or None or UNPARSABLE.
        seed: of the bootstrap.
    """
    # takes a second to import
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

    predictions = [UNPARSABLE if prediction is None else prediction for prediction in predictions]
    confusion = confusion_matrix(labels, predictions, len(label_names))
    assert confusion.sum() > 0, "no items to score"
    precision, recall, f1, counts = precision_recall_fscore_support(
        labels, predictions, labels=range(len(label_names)), average=None, zero_division=0.0
    )
    with warnings.catch_warnings():  # it warns if all items have one label, all predicted right
        warnings.simplefilter("ignore", UserWarning)
        matthews = matthews_corrcoef(labels, predictions)
    summary = accuracy_score(labels, predictions), matthews
    scores = _named(*summary, precision, recall, f1, _occur(confusion), label_names)
    intervals = confusion_intervals(confusion, label_names, seed)
    metrics: dict[str, float | int | list | None] = {}
    for name, score in scores.items():
        metrics |= {name: float(score), f"{name}_ci95": intervals[f"{name}_ci95"]}
    metrics |= {"count": len(labels)}
    metrics |= {f"count_{name}": int(count) for name, count in zip(label_names, counts, strict=True)}
    return metrics | {"confusion": confusion.tolist()}


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int], num_labels: int) -> np.ndarray:
    """Count items by label and prediction: [num_labels, num_labels], a row per label and a column per prediction.

    If any prediction is UNPARSABLE, one more column counts those."""
    labels, predictions = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    assert labels.shape == predictions.shape and labels.ndim == 1, (labels.shape, predictions.shape)
    columns = np.where(predictions == UNPARSABLE, num_labels, predictions)
    assert ((labels >= 0) & (labels < num_labels)).all(), "a label has no name"
    assert ((columns >= 0) & (columns <= num_labels)).all(), "a prediction is no label"
    width = num_labels + 1
    confusion = np.bincount(width * labels + columns, minlength=num_labels * width).reshape(num_labels, width)
    return confusion if confusion[:, -1].any() else confusion[:, :-1]


def confusion_scores(confusion: np.ndarray, label_names: Sequence) -> dict[str, float]:
    """Return the scores of a confusion matrix by name; `label_names` may be the labels' numbers."""
    scores = _scores_of_counts(*_label_counts(confusion), label_names)
    return {name: float(score) for name, score in scores.items()}


def confusion_intervals(
    confusion: np.ndarray, label_names: Sequence[str], seed: int = 0
) -> dict[str, list[float] | None]:
    """Return NAME_ci95, [low, high], for each score of a confusion matrix; None if its denominator is 0.

    Proportions (accuracy, precision, recall, accuracy_LABEL) have a Wilson interval, each over its denominator. The
    other scores have a percentile bootstrap over items, whose width is 0 if every item is right.
    """
    hits, labelled, predicted = (counts.astype(int).tolist() for counts in _label_counts(confusion))
    proportions = {f"accuracy_{name}": (hits[row], labelled[row]) for row, name in enumerate(label_names)}
    proportions |= {"accuracy": (sum(hits), sum(labelled))}
    proportions |= {"precision": (hits[1], predicted[1]), "recall": (hits[1], labelled[1])}
    intervals = {}
    for name, scores in _resampled_scores(confusion, label_names, seed).items():
        interval = wilson_interval(*proportions[name]) if name in proportions else percentile_interval(scores)
        intervals[f"{name}_ci95"] = None if interval is None else list(interval)
    return intervals


def _resampled_scores(confusion: np.ndarray, label_names: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Return each score in every bootstrap sample of the items, [resamples]."""
    rows, columns = np.nonzero(confusion)  # an empty cell stays empty in every sample
    in_row, in_column = (places[:, None] == np.arange(len(label_names)) for places in (rows, columns))
    chosen = np.concatenate([in_row & in_column, in_row, in_column], axis=1).astype(np.float64)
    samples = resample_counts(confusion[rows, columns], seed)
    counts = np.concatenate([cells @ chosen for cells in samples])
    return _scores_of_counts(*np.split(counts, 3, axis=1), label_names)


def _occur(confusion: np.ndarray) -> np.ndarray:
    """Return whether any item has, or is predicted to have, each label: bool [labels]."""
    _, labelled, predicted = _label_counts(confusion)
    return labelled + predicted > 0


def _label_counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how many items of each label are right, have the label, and are predicted to have it: [labels] each."""
    confusion = np.asarray(confusion, dtype=np.float64)
    return np.diagonal(confusion), confusion.sum(axis=1), confusion[:, : len(confusion)].sum(axis=0)


def _scores_of_counts(
    hits: np.ndarray, labelled: np.ndarray, predicted: np.ndarray, label_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return each score, [...], of the counts of `_label_counts`, [..., labels]."""
    accuracy = ratio(hits.sum(axis=-1), labelled.sum(axis=-1))
    matthews = matthews_correlation(hits, labelled, predicted)
    f1 = ratio(2 * hits, labelled + predicted)
    occur = labelled + predicted > 0  # in this very sample
    return _named(accuracy, matthews, ratio(hits, predicted), ratio(hits, labelled), f1, occur, label_names)


def matthews_correlation(hits: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation for any number of labels (Gorodkin 2004, equation 8), [...].

    Args:
        hits, labelled, predicted: of `_label_counts`, [..., labels]; items that are predicted to have no label are a
            class of their own.
    """
    num_items, num_right = labelled.sum(axis=-1), hits.sum(axis=-1)
    unread = num_items - predicted.sum(axis=-1)
    covariance = num_right * num_items - (labelled * predicted).sum(axis=-1)
    of_predicted = num_items**2 - (predicted**2).sum(axis=-1) - unread**2
    of_labels = num_items**2 - (labelled**2).sum(axis=-1)
    return ratio(covariance, np.sqrt(of_predicted * of_labels))


def _named(accuracy, matthews, precision, recall, f1, occur, label_names: Sequence) -> dict[str, np.ndarray]:
    """Return the scores by name, from accuracy and Matthews' correlation, [...], and each label's precision, recall
    and F1, [..., labels]."""
    by_label = {"precision": precision, "recall": recall, "f1": f1}
    positive = {name: values[..., 1] for name, values in by_label.items()} if len(label_names) == 2 else {}
    num_occurring = occur.sum(axis=-1, dtype=np.float64)
    macro = {f"{name}_macro": ratio(values.sum(axis=-1), num_occurring) for name, values in by_label.items()}
    accuracies = {f"accuracy_{name}": recall[..., label] for label, name in enumerate(label_names)}
    return {"accuracy": accuracy} | positive | macro | {"matthews": matthews} | accuracies


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return a quotient of floats of one shape, 0 wherever the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
