"""Test the validation split's metrics during training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zerotune.errors import Preempted
from zerotune.evaluation.validation import validate_labels
from zerotune.tasks.tokens import Encoded
from zerotune.training.classification import LabelledData

CPU = torch.device("cpu")
# The model's class probabilities for each example; its prediction for the third is wrong.
PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])
LABELS = np.array([0, 1, 0, 2])
NEVER = SimpleNamespace(raise_when_noted=lambda accelerator: None)


def engine(calls):
    """Return an engine with a model that reads an example's number from its first token."""

    def forward(input_ids, attention_mask):
        calls.append(input_ids[:, 0].tolist())
        return PROBABILITIES[input_ids[:, 0]].log() + 3.0

    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=CPU)
    return SimpleNamespace(accelerator=accelerator, forward=forward)


def data():
    ids, offsets = np.array([0, 9, 1, 2, 9, 9, 3], dtype=np.int32), np.array([0, 2, 3, 6, 7])
    return LabelledData(["a", "b", "c", "d"], Encoded(ids, offsets, 0, None), LABELS, pad_id=5)


@pytest.mark.parametrize("tokens_per_device", [1, 4, 100])
def test_metrics_by_hand_at_any_budget(tokens_per_device):
    calls = []
    found = validate_labels(engine(calls), data(), tokens_per_device, NEVER)
    assert sorted(number for call in calls for number in call) == [0, 1, 2, 3]
    assert len(calls) == {1: 4, 4: 3, 100: 1}[tokens_per_device]
    assert found == {
        "loss": pytest.approx(-np.log([0.5, 0.75, 0.25, 0.75]).mean(), rel=1e-6),
        "accuracy": 0.75,
        "f1_macro": pytest.approx((2 / 3 + 2 / 3 + 1) / 3),
        "matthews": pytest.approx(0.7),  # (3 · 4 - 5) / √(16 - 6)²
    }
    assert {type(value) for value in found.values()} == {float}


def test_it_stops_after_a_batch_where_asked_to():
    def stop(accelerator):
        raise Preempted("asked to stop")

    calls = []
    with pytest.raises(Preempted):
        validate_labels(engine(calls), data(), 1, SimpleNamespace(raise_when_noted=stop))
    assert len(calls) == 1
