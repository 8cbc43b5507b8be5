"""Classifier heads that answer for the items of an evaluation."""

from functools import partial

import numpy as np
import torch

from zerotune.evaluation.options import TextEvaluation, training_description
from zerotune.evaluation.scoring import PreparedModel, Scorer
from zerotune.metrics.label_sets import PredictedLabelSets
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.final_folder import load_final_or_base
from zerotune.models.precision import autocast
from zerotune.models.pretrained import check_token_ids, is_trained_classifier, most_tokens
from zerotune.tasks.splits import Example
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import check_last_tokens, log_probabilities
from zerotune.training.label_sets import THRESHOLD, classifier_data, likely_labels, log_sigmoid, logits


def head_scorer(model, data, device: torch.device, precision: str) -> Scorer:
    """Return a scorer that gives the records of `data.scores`, computed under the precision's autocast.

    Args:
        data: zerotune.training.data.ValidationData.
    """

    def score(rows: np.ndarray) -> list[dict]:
        with autocast(device.type, precision):
            return data.scores(model, rows, device)

    return score


def likeliest(records: list[dict]) -> PredictedLabels:
    """Return the likeliest label of each item."""
    scores = log_probabilities(records)
    return PredictedLabels(scores.argmax(axis=1).tolist(), {"scores": scores.tolist()})


def likely(records: list[dict], threshold: float) -> PredictedLabelSets:
    """Return the labels of each item whose probability is above the threshold."""
    scores = log_sigmoid(logits(records))
    predictions = [tuple(np.flatnonzero(row).tolist()) for row in likely_labels(scores, threshold)]
    return PredictedLabelSets(predictions, scores.tolist())


def prepare_head(
    evaluation: TextEvaluation, task, examples: list[Example], config, device: torch.device
) -> PreparedModel:
    """Load a model with a classifier head: a final/ folder's, a published one, or an untrained one."""
    loaded = evaluation.model
    model, tokenizer, record = load_final_or_base(loaded, task.labels)
    record = record or {}
    trained = bool(record) or is_trained_classifier(config)
    default = min(task.max_length, most_tokens(config) or task.max_length)
    max_length = evaluation.text.max_length or record.get("max_length", default)
    truncation = record.get("truncation", evaluation.text.truncation)
    data = classifier_data(task, tokenizer, config, examples, max_length, truncation)
    check_token_ids(loaded.name, config, data.token_ids)
    check_last_tokens(loaded.name, config, tokenizer, data)
    description = {
        "setting": "classifier head" if trained else "untrained head",
        "head": "classify",
        **training_description(record, loaded.name, evaluation.seed),
        "max_length": max_length,
        "truncation": truncation,
        "prompt_format": None,
        "num_truncated": data.num_truncated,
    }
    read = likeliest
    if task.multi_label:
        description["threshold"] = (record.get("thresholds") or {}).get("probability", THRESHOLD)
        read = partial(likely, threshold=description["threshold"])
    return PreparedModel(
        score=head_scorer(model.to(device), data, device, loaded.precision),
        costs=data.lengths,
        batches=evaluation_batches(data.lengths, evaluation.tokens_per_device),
        description=description,
        read=read,
    )
