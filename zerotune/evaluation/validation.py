"""Evaluate the validation split during training."""

import numpy as np

from zerotune.evaluation.scoring import score_items
from zerotune.metrics.label_sets import label_set_scores
from zerotune.metrics.labels import confusion_matrix, confusion_scores
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import LabelledData
from zerotune.training.engine import Engine
from zerotune.training.generation import AnswerData
from zerotune.training.label_sets import LabelSetData, likely_labels, log_sigmoid, logits


def validate_labels(
    engine: Engine, data: LabelledData | AnswerData, tokens_per_device: int, stop_signal
) -> dict[str, float]:
    """Return loss, accuracy, f1_macro and matthews of the validation split with the current weights.

    All ranks take part.

    Raises:
        Preempted: a rank was asked to stop.
    """
    return predict_labels(engine, data, tokens_per_device, stop_signal)[0]


def predict_labels(
    engine: Engine, data: LabelledData | AnswerData, tokens_per_device: int, stop_signal
) -> tuple[dict[str, float], np.ndarray]:
    """Return the scores of `validate_labels` and the predicted labels, int64 [num_examples]; all ranks take part.

    Raises:
        Preempted: a rank was asked to stop.
    """
    records = _score(engine, data, tokens_per_device, stop_signal)
    log_probabilities = data.log_probabilities(records)
    predictions, num_labels = log_probabilities.argmax(axis=1), log_probabilities.shape[1]
    scores = confusion_scores(confusion_matrix(data.labels, predictions, num_labels), range(num_labels))
    chosen = {name: scores[name] for name in ("accuracy", "f1_macro", "matthews")}
    return {"loss": data.mean_loss(records)} | chosen, predictions


def validate_label_sets(engine: Engine, data: LabelSetData, tokens_per_device: int, stop_signal) -> dict[str, float]:
    """Return loss, exact_match, f1_micro and f1_macro of the validation split of texts with any number of labels.

    All ranks take part; raises Preempted as `validate_labels` does."""
    records = _score(engine, data, tokens_per_device, stop_signal)
    scores = label_set_scores(data.labels > 0, likely_labels(log_sigmoid(logits(records))))
    chosen = {name: float(scores[name]) for name in ("exact_match", "f1_micro", "f1_macro")}
    return {"loss": data.mean_loss(records)} | chosen


def _score(engine: Engine, data: LabelledData | AnswerData, tokens_per_device: int, stop_signal) -> list[dict]:
    """Return the record of each example; all ranks take part."""
    accelerator = engine.accelerator
    batches = evaluation_batches(data.scored_lengths, tokens_per_device)
    return score_items(
        lambda rows: data.scores(engine.forward, rows, accelerator.device),
        batches,
        accelerator,
        on_batch=lambda: stop_signal.raise_when_noted(accelerator),
        activity="validation",
    )
