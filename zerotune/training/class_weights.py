"""Label weights for the training loss, so that a rare label counts as much as a frequent one."""

import numpy as np


def balanced_weights(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Return rows / (labels × rows of the label) for each label: float64 [num_labels]; the mean over the rows is 1.

    These are scikit-learn's "balanced" weights (compute_class_weight).

    Args:
        labels: int64 class of each row. Every class must occur; a training split without one is refused earlier.
    """
    from sklearn.utils.class_weight import compute_class_weight

    return compute_class_weight("balanced", classes=np.arange(num_labels), y=labels)


def positive_weights(labels: np.ndarray) -> np.ndarray:
    """Return rows without a label / rows with it, for each label: float64 [num_labels]; 1 where every row has it.

    A label's loss is multiplied by its weight in rows that have it, so that rows with and without it count the same.

    Args:
        labels: 1 where a row has a label, else 0: [rows, num_labels]. Every label must occur.
    """
    num_with = labels.sum(axis=0, dtype=np.float64)
    return np.where(num_with < len(labels), (len(labels) - num_with) / num_with, 1.0)


def weights_of(labels: np.ndarray, class_weights: np.ndarray | None) -> np.ndarray:
    """Return the weight of each example's label, float64 [examples]; all 1 without class weights."""
    return np.ones(len(labels)) if class_weights is None else class_weights[labels]
