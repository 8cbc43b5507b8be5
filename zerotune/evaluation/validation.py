"""Evaluate the validation split during training."""

from functools import partial

import numpy as np

from zerotune.evaluation.scoring import Scorer, score_items
from zerotune.metrics.label_sets import label_set_scores
from zerotune.metrics.labels import confusion_matrix, confusion_scores
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import LabelledData, LabelSetData, likely_labels, log_sigmoid, logits
from zerotune.training.engine import Engine
from zerotune.training.generation import AnswerData


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
    batches = evaluation_batches(data.scored_lengths, tokens_per_device)
    records = score_validation(engine, data, batches, stop_signal)
    log_probabilities = data.log_probabilities(records)
    predictions, num_labels = log_probabilities.argmax(axis=1), log_probabilities.shape[1]
    scores = confusion_scores(confusion_matrix(data.labels, predictions, num_labels), range(num_labels))
    chosen = {name: scores[name] for name in ("accuracy", "f1_macro", "matthews")}
    return {"loss": data.mean_loss(records)} | chosen, predictions


def validate_label_sets(engine: Engine, data: LabelSetData, tokens_per_device: int, stop_signal) -> dict[str, float]:
    """Return loss, exact_match, f1_micro and f1_macro of the validation split of texts with any number of labels.

    All ranks take part; raises Preempted as `validate_labels` does."""
    batches = evaluation_batches(data.scored_lengths, tokens_per_device)
    records = score_validation(engine, data, batches, stop_signal)
    scores = label_set_scores(data.labels > 0, likely_labels(log_sigmoid(logits(records))))
    chosen = {name: float(scores[name]) for name in ("exact_match", "f1_micro", "f1_macro")}
    return {"loss": data.mean_loss(records)} | chosen


def score_validation(
    engine: Engine,
    data,
    batches: list[np.ndarray],
    stop_signal,
    activity: str = "validation",
    score: Scorer | None = None,
) -> list[dict]:
    """Return the record of each example; all ranks take part.

    Args:
        batches, activity: as for `score_items`.
        score: by default the data's own `scores`.
    Raises:
        Preempted: a rank was asked to stop.
    """
    accelerator = engine.accelerator
    score = score or (lambda rows: data.scores(engine.forward, rows, accelerator.device))
    on_batch = partial(stop_signal.raise_when_noted, accelerator)
    return score_items(score, batches, accelerator, on_batch=on_batch, activity=activity)
