"""Score sets of labels, where an item has none, one or several: exact match, precision, recall and F1, hamming loss.

An item is right (`exact_match`) if it is given all of its labels and no other. A micro score counts each pair of an
item and a label; a macro score is the mean over the labels that some item has or is given. Scores are in 0-1, and a
ratio over 0 is 0. scikit-learn computes the reported scores; the bootstrap computes the same ones from counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerotune.metrics.labels import ratio
from zerotune.metrics.statistics import percentile_interval, resample_counts, wilson_interval

LabelSet = Sequence[int]


@dataclass(frozen=True)
class PredictedLabelSets:
    """The labels that a model gives to some items, in their order.

    Attributes:
        predictions: the label numbers of each item, in rising order.
        scores: natural log-probability of each label by itself, [items, labels].
    """

    predictions: list[tuple[int, ...]]
    scores: list[list[float]]


def label_set_metrics(
    labels: Sequence[LabelSet | None], predictions: Sequence[LabelSet], label_names: Sequence[str], seed: int = 0
) -> dict[str, float | int | list]:
    """Return the part of metrics.json that was measured; only the count if the items are unlabelled (all are None).

    Each score has its `_ci95` beside it: Wilson's for exact_match, the share of right items; for the others a
    percentile bootstrap over items, whose labels are not independent. count_LABEL is the number of items with that
    label, num_without_label the number with none.

    Args:
        labels, predictions: the label numbers of each item, each 0 … len(label_names) - 1.
        seed: of the bootstrap.
    """
    if labels[0] is None:
        return {"count": len(labels)}
    actual, given = (membership(sets, len(label_names)) for sets in (labels, predictions))
    scores, num_right = label_set_scores(actual, given), int((actual == given).all(axis=1).sum())
    intervals = _bootstrap_intervals(actual, given, seed)
    intervals["exact_match"] = wilson_interval(num_right, len(labels))
    names = {number: name for number, name in enumerate(label_names)}
    metrics: dict[str, float | int | list] = {}
    for score, value in scores.items():
        name = f"f1_label_{names[score]}" if isinstance(score, int) else score
        metrics |= {name: float(value), f"{name}_ci95": list(intervals[score])}
    counts = actual.sum(axis=0)
    metrics |= {"count": len(labels), "num_without_label": int((~actual.any(axis=1)).sum())}
    return metrics | {f"count_{name}": int(counts[number]) for number, name in names.items()}


def membership(sets: Sequence[LabelSet], num_labels: int) -> np.ndarray:
    """Return which labels each set holds, bool [items, num_labels]."""
    found = np.zeros((len(sets), num_labels), dtype=bool)
    for item, numbers in enumerate(sets):
        found[item, list(numbers)] = True
    return found


def label_set_scores(actual: np.ndarray, given: np.ndarray) -> dict[str | int, float]:
    """Return each score by its name, and the F1 of each label by its number.

    Args:
        actual, given: the labels that each item has and is given, bool [items, labels].
    """
    # takes a second to import
    from sklearn.metrics import accuracy_score, hamming_loss, precision_recall_fscore_support

    occur = np.flatnonzero(actual.any(axis=0) | given.any(axis=0))
    scores: dict[str | int, float] = {"exact_match": accuracy_score(actual, given)}
    for average in ("micro", "macro"):
        if len(occur):
            found = precision_recall_fscore_support(actual, given, labels=occur, average=average, zero_division=0.0)
        else:
            found = 0.0, 0.0, 0.0
        scores |= {f"{name}_{average}": value for name, value in zip(_RATIOS, found, strict=False)}
    scores["hamming_loss"] = hamming_loss(actual, given)
    by_label = precision_recall_fscore_support(actual, given, average=None, zero_division=0.0)[2]
    return scores | dict(enumerate(by_label.tolist()))


_RATIOS = ("precision", "recall", "f1")


def _bootstrap_intervals(actual: np.ndarray, given: np.ndarray, seed: int) -> dict[str | int, tuple[float, float]]:
    """Return the bootstrap interval, over items, of each score of `label_set_scores` except exact match."""
    num_items, num_labels = actual.shape
    # items with the same labels and predictions are of one kind
    kinds, counts = np.unique(np.concatenate([actual, given], axis=1), axis=0, return_counts=True)
    actual, given = kinds[:, :num_labels], kinds[:, num_labels:]
    columns = np.concatenate([actual & given, actual, given], axis=1).astype(np.float64)
    sums = np.concatenate([part @ columns for part in resample_counts(counts, seed)])
    hits, has, gets = (sums[:, start : start + num_labels] for start in (0, num_labels, 2 * num_labels))
    samples: dict[str | int, np.ndarray] = {}
    for average in ("micro", "macro"):
        if average == "micro":
            counted = [each.sum(axis=1, keepdims=True) for each in (hits, has, gets)]
        else:
            counted = [hits, has, gets]
        right, wanted, chosen = counted
        found = ratio(right, chosen), ratio(right, wanted), ratio(2 * right, wanted + chosen)
        num_occurring = (wanted + chosen > 0).sum(axis=1, dtype=np.float64)
        for name, values in zip(_RATIOS, found, strict=True):
            samples[f"{name}_{average}"] = ratio(values.sum(axis=1), num_occurring)
    samples["hamming_loss"] = (has + gets - 2 * hits).sum(axis=1) / (num_items * num_labels)
    samples |= dict(enumerate(ratio(2 * hits, has + gets).T))
    return {name: percentile_interval(values) for name, values in samples.items()}
