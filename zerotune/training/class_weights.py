"""Weights of labels in the training loss, with which a rare label counts as much as a frequent one."""

import numpy as np


def balanced_weights(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Return rows / (labels × rows of the label) for each label: float64 [num_labels]; the mean over the rows is 1.

    These are scikit-learn's "balanced" weights (compute_class_weight).

    Args:
        labels: int64 class of each row; each class has a row, for a training split without one is refused.
    """
    from sklearn.utils.class_weight import compute_class_weight

    return compute_class_weight("balanced", classes=np.arange(num_labels), y=labels)


def positive_weights(labels: np.ndarray) -> np.ndarray:
    """Return rows without a label / rows with it, for each label: float64 [num_labels]; 1 where every row has it.

    The loss of a label that a text has is multiplied by it, so that having a label and not having it count the same.

    Args:
        labels: 1 where a row has a label, else 0: [rows, num_labels]; each label has a row.
    """
    num_with = labels.sum(axis=0, dtype=np.float64)
    return np.where(num_with < len(labels), (len(labels) - num_with) / num_with, 1.0)


def weights_of(labels: np.ndarray, class_weights: np.ndarray | None) -> np.ndarray:
    """Return the weight of each example by its label, float64 [labels]: 1 where there are no class weights."""
    return np.ones(len(labels)) if class_weights is None else class_weights[labels]
