"""Texts with any number of labels, for a classifier head that decides on each label independently."""

from dataclasses import dataclass

import numpy as np
import torch

from zerotune.metrics.label_sets import membership
from zerotune.models.device import to_device
from zerotune.tasks.splits import Example
from zerotune.training.classification import LabelledData, encode_examples, labelled_data
from zerotune.training.data import Batch

# A text gets the labels whose probability is above this; task.json records it.
THRESHOLD = 0.5


def classifier_data(
    task, tokenizer, config, examples: list[Example], max_length: int, truncation: str, cached: bool = True
) -> "LabelledData | LabelSetData":
    """Tokenise examples as `labelled_data` does, with one label or a set of labels each, as the task has it.

    Args:
        task: zerotune.tasks.texts.TextTask.
    """
    if not task.multi_label:
        return labelled_data(tokenizer, config, examples, max_length, truncation, cached)
    encoded = encode_examples(tokenizer, config, examples, max_length, truncation, cached)
    labels = membership([example.labels for example in examples], len(task.labels)).astype(np.float32)
    return LabelSetData([example.id for example in examples], encoded, labels, tokenizer.pad_token_id)


@dataclass(frozen=True)
class LabelSetData(LabelledData):
    """Texts ready for a classification head, with any number of labels each.

    Attributes:
        labels: 1 where an example has a label, else 0: float32 [num_examples, num_labels]; all 0 if unknown.
        class_weights: weight of each label in the loss of the examples that have it, float64 [num_labels].
    """

    def num_targets(self, rows: np.ndarray) -> float:
        """Return the divisor for the sum of some examples' losses: their number."""
        return float(len(rows))

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the inputs of a `SequenceClassifier`, with targets of 0 or 1 and their weights, [rows, labels] each."""
        labels, weights = self.labels[rows], self.class_weights
        weights = np.ones_like(labels) if weights is None else np.where(labels > 0, weights, 1).astype(np.float32)
        return Batch(self.inputs(rows, device), to_device(labels, device), to_device(weights, device))

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each example: the logit of each label."""
        return [{"logits": values} for values in forward(**self.inputs(rows, device)).float().tolist()]

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss per example, given all examples' records: binary cross entropy, summed over labels."""
        found = logits(records)
        return float((np.logaddexp(0, found) - self.labels * found).sum(axis=1).mean())


def logits(records: list[dict]) -> np.ndarray:
    """Return the labels' logits from some records, float32 [items, labels]."""
    return np.array([record["logits"] for record in records], dtype=np.float32)


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return each label's natural log-probability, independent of the others, from its logit: [items, labels]."""
    return -np.logaddexp(0, -logits)


def likely_labels(log_probabilities: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Return where a label's probability is above the threshold, bool [items, labels]."""
    return log_probabilities > np.log(np.float32(threshold))
