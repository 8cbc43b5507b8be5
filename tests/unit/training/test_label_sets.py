"""Test training a classifier on texts with any number of labels: targets, loss and the decision."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch.nn import functional

from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.tasks.splits import Example
from zerotune.tasks.tokens import Encoded
from zerotune.training.class_weights import positive_weights
from zerotune.training.classification import (
    LabelledData,
    LabelSetData,
    classifier_data,
    likely_labels,
    log_sigmoid,
    logits,
)

CPU = torch.device("cpu")
# One row per example; the last one's are too large for float32 probabilities.
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [120.0, -150.0, 30.0]])
LABELS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=np.float32)


def data():
    encoded = Encoded(np.array([0, 1, 2], dtype=np.int32), np.array([0, 1, 2, 3]), 0, None)
    return LabelSetData(["a", "b", "c"], encoded, LABELS, pad_id=5)


def records():
    return data().scores(lambda input_ids, attention_mask: LOGITS[input_ids[:, 0]], np.arange(3), CPU)


def test_targets_are_0_or_1_for_each_label_and_the_divisor_is_the_number_of_texts():
    batch = data().batch(np.array([2, 0]), CPU)
    assert batch.targets.tolist() == [[1, 1, 0], [1, 0, 1]] and batch.targets.dtype == torch.float32
    assert data().num_targets(np.array([2, 0])) == 2 and (batch.target_weights == 1).all()


def test_balanced_weights_are_rows_without_over_rows_with_a_label_and_weigh_the_rows_that_have_it():
    weights = positive_weights(LABELS)
    assert weights.tolist() == [1 / 2, 2, 2]
    assert positive_weights(np.array([[1, 1], [1, 0]], dtype=np.float32)).tolist() == [1, 1], "a label of all rows"
    weighted, rows = replace(data(), class_weights=weights), np.array([2, 0])
    batch = weighted.batch(rows, CPU)
    assert batch.target_weights.tolist() == [[0.5, 2, 1], [0.5, 1, 2]] and batch.target_weights.dtype == torch.float32
    assert weighted.num_targets(rows) == 2
    losses = functional.binary_cross_entropy_with_logits(LOGITS[rows], batch.targets, reduction="none")
    wanted = functional.binary_cross_entropy_with_logits(
        LOGITS[rows], batch.targets, pos_weight=torch.from_numpy(weights), reduction="sum"
    )
    assert float((losses * batch.target_weights).sum()) == pytest.approx(float(wanted))


def test_the_loss_is_summed_over_labels_and_the_mean_over_texts():
    losses = functional.binary_cross_entropy_with_logits(LOGITS, torch.from_numpy(LABELS), reduction="none")
    assert data().mean_loss(records()) == pytest.approx(float(losses.sum(dim=1).mean()), rel=1e-6)


def test_a_text_has_the_labels_above_the_threshold():
    scores = log_sigmoid(logits(records()))
    np.testing.assert_allclose(scores, functional.logsigmoid(LOGITS), rtol=1e-6)
    assert likely_labels(scores).tolist() == [[True, False, True], [False, False, True], [True, False, True]]
    assert likely_labels(scores, 0.7).tolist() == [[True, False, False], [False, False, True], [True, False, True]]


def test_a_task_decides_on_the_kind_of_targets():
    name = tiny_model("bert")
    tokenizer, config = load_tokenizer(name, None), read_config(name, None)
    examples = [Example("x-0", "a film", (1,)), Example("x-1", "the film was good", ())]
    task = SimpleNamespace(multi_label=True, labels=("a", "b"))
    several = classifier_data(task, tokenizer, config, examples, 16, "head")
    assert several.labels.tolist() == [[0, 1], [0, 0]] and isinstance(several, LabelSetData)
    single = [Example("x-0", "a film", 1), Example("x-1", "the film was good", None)]
    one = classifier_data(SimpleNamespace(multi_label=False, labels=("a", "b")), tokenizer, config, single, 16, "head")
    assert one.labels.tolist() == [1, -100] and type(one) is LabelledData
    assert one.token_ids.tolist() == several.token_ids.tolist()
