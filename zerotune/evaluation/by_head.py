"""Evaluate models by their classifier heads."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from zerotune.evaluation.options import TextEvaluation, training_description
from zerotune.evaluation.scoring import PreparedModel, Scorer
from zerotune.metrics.label_sets import PredictedLabelSets
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.classifier import SequenceClassifier
from zerotune.models.divided import onto_device
from zerotune.models.final_folder import load_final_or_base
from zerotune.models.loading import read_onto
from zerotune.models.model_files import read_record
from zerotune.models.packed import packs_rows, use_packed_attention
from zerotune.models.precision import autocast
from zerotune.models.pretrained import check_token_ids, is_trained_classifier, most_tokens
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.splits import Example
from zerotune.tasks.texts import TextTask
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import (
    THRESHOLD,
    LabelledData,
    check_last_tokens,
    classifier_data,
    likely_labels,
    log_probabilities,
    log_sigmoid,
    logits,
)


def head_scorer(model, data, device: torch.device, precision: str) -> Scorer:
    """Return a scorer that gives the records of `data.scores`, computed under the precision's autocast.

    Args:
        data: tokenised items with a method `scores`, such as LabelledData.
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


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier on its device, and how it reads texts.

    Attributes:
        config: of the checkpoint.
        settings: those it was loaded with.
        record: task.json, {} for a model that zerotune did not tune.
    """

    task: TextTask
    model: SequenceClassifier
    tokenizer: Any
    config: Any
    settings: ModelSettings
    record: dict
    max_length: int
    truncation: str

    def data(self, examples: list[Example], cached: bool = True) -> LabelledData:
        """Tokenise examples. Raises Refused if a token has no embedding or would be read as padding."""
        cut = self.max_length, self.truncation
        found = classifier_data(self.task, self.tokenizer, self.config, examples, *cut, cached)
        check_token_ids(self.settings.name, self.config, found.token_ids)
        check_last_tokens(self.settings.name, self.config, self.tokenizer, found)
        return replace(found, packs=packs_rows(self.settings, self.config, trains=False))

    def scorer(self, data: LabelledData, device: torch.device) -> Scorer:
        """Return a scorer of tokenised examples."""
        return head_scorer(self.model, data, device, self.settings.precision)


def load_head(evaluation: TextEvaluation, task, config, device: torch.device) -> LoadedClassifier:
    """Load a model with a classifier head: a final/ folder's, a published one, or an untrained one."""
    model, tokenizer, record = load_final_or_base(read_onto(evaluation.model, device, evaluates=True), task.labels)
    record = record or {}
    max_length, truncation = head_lengths(evaluation, task, config, record)
    if packs_rows(evaluation.model, config, trains=False):
        use_packed_attention(model.stock_model)
    model = onto_device(model, model.stock_model, evaluation.model, device)
    return LoadedClassifier(task, model, tokenizer, config, evaluation.model, record, max_length, truncation)


def head_lengths(evaluation: TextEvaluation, task, config, record: dict | None = None) -> tuple[int, str]:
    """Return the most tokens of a text, and which part of a longer text is read.

    Args:
        record: task.json, {} for a model that zerotune did not tune; None: read it here.
    """
    if record is None:
        record = read_record(evaluation.model.name, evaluation.model.revision) or {}
    default = min(task.max_length, most_tokens(config) or task.max_length)
    max_length = evaluation.text.max_length or record.get("max_length", default)
    return max_length, record.get("truncation", evaluation.text.truncation)


def prepare_head(
    evaluation: TextEvaluation, task, examples: list[Example], config, device: torch.device
) -> PreparedModel:
    """Load a model with a classifier head, and prepare it for examples."""
    classifier = load_head(evaluation, task, config, device)
    record, data = classifier.record, classifier.data(examples)
    description = {
        "setting": "classifier head" if record or is_trained_classifier(config) else "untrained head",
        "head": "classify",
        **training_description(record, evaluation.model.name, evaluation.seed),
        "max_length": classifier.max_length,
        "truncation": classifier.truncation,
        "prompt_format": None,
        "num_truncated": data.num_truncated,
    }
    read = likeliest
    if task.multi_label:
        description["threshold"] = (record.get("thresholds") or {}).get("probability", THRESHOLD)
        read = partial(likely, threshold=description["threshold"])
    return PreparedModel(
        score=classifier.scorer(data, device),
        costs=data.lengths,
        batches=evaluation_batches(data.lengths, evaluation.tokens_per_device),
        description=description,
        read=read,
        in_step=evaluation.model.divides_layers,
    )
