"""Test the arithmetic of --engine trainer: cutting a step, its order, its mean loss. tests/scripts has whole runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from default_settings import optimisation_settings, run_settings
from torch.nn import functional

from zerotune.settings.groups import DataSettings, ModelSettings, TrainSettings
from zerotune.training.loop import TrainingLoop
from zerotune.training.schedule import plan_schedule
from zerotune.training.trainer import (
    TrainerOrder,
    _remaining_rows,
    _training_arguments,
    cut_step,
    mean_over_step,
)

NUM_EXAMPLES, BATCH_SIZE, STEPS_PER_EPOCH = 165, 8, 21


@pytest.mark.parametrize(
    ("num_examples", "longest", "budget", "expected"),
    [
        (32, 64, 2048, (32, 1)),
        (32, 256, 2048, (8, 4)),
        (32, 300, 2048, (4, 8)),  # 6 fit, but do not divide 32
        (12, 100, 700, (6, 2)),
        (7, 100, 600, (1, 7)),  # only 1 and 7 divide 7
        (4, 5000, 2048, (1, 4)),  # a single long example exceeds the budget
    ],
)
def test_a_step_is_cut_into_as_few_equal_micro_batches_as_fit(num_examples, longest, budget, expected):
    assert cut_step(num_examples, longest, budget) == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_parts_of_a_step_add_up_to_its_mean_loss(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 2, generator=generator), torch.tensor([0, 1, 1, 0, 1, -100, -100, -100])
    parts = [
        mean_over_step(logits[rows], labels[rows], torch.tensor(5), smoothing) for rows in (slice(0, 4), slice(4, 8))
    ]
    wanted = functional.cross_entropy(logits[:5], labels[:5], label_smoothing=smoothing)
    assert sum(parts).item() == pytest.approx(wanted.item(), rel=1e-6)
    # a micro-batch with nothing but filler
    assert mean_over_step(logits[5:], labels[5:], torch.tensor(5), smoothing).item() == 0


def order(seed=0):
    lengths = np.arange(NUM_EXAMPLES) % 9 + 1
    encoded = SimpleNamespace(lengths=lengths)
    return TrainerOrder([str(row) for row in range(NUM_EXAMPLES)], encoded, np.zeros(NUM_EXAMPLES), 0)


def loop_of(seed=0):
    """Return a TrainingLoop with only the parts that determine the rows of its steps."""
    loop = object.__new__(TrainingLoop)
    loop.optimisation = optimisation_settings(batch_size=BATCH_SIZE, seed=seed, epochs=3)
    loop.data, loop._epoch_steps = order(), (-1, [])
    loop.schedule = plan_schedule(loop.optimisation, run_settings("run"), NUM_EXAMPLES)
    return loop


def test_an_epoch_has_every_example_once_and_then_filler():
    rows = _remaining_rows(loop_of(), 1, BATCH_SIZE)
    assert len(rows) == 3 * 168
    assert sorted(rows[:NUM_EXAMPLES]) == list(range(NUM_EXAMPLES)) and rows[NUM_EXAMPLES:168] == [NUM_EXAMPLES] * 3


def test_the_order_depends_on_seed_and_epoch_alone():
    """A restart in the middle of an epoch continues with that epoch's order."""
    rows = _remaining_rows(loop_of(), 1, BATCH_SIZE)
    torch.manual_seed(123)
    middle = STEPS_PER_EPOCH + 3
    assert _remaining_rows(loop_of(), middle, BATCH_SIZE) == rows[(middle - 1) * BATCH_SIZE :]
    assert rows[:168] != rows[168:336] and _remaining_rows(loop_of(seed=1), 1, BATCH_SIZE) != rows


def test_steps_are_grouped_by_length():
    data = order()
    steps = data.epoch_steps(BATCH_SIZE, 0, 0)
    spreads = [np.ptp(data.lengths[rows]) for rows in steps]
    whole = [np.ptp(data.lengths[start : start + BATCH_SIZE]) for start in range(0, NUM_EXAMPLES, BATCH_SIZE)]
    assert len(steps) == STEPS_PER_EPOCH
    assert data.lengths[steps[0]].max() == 9  # the longest come first, so memory runs out at once or never
    assert np.mean(spreads) < np.mean(whole) / 3


def test_a_process_is_one_device_however_many_it_sees(tmp_path):
    """Otherwise the Trainer would wrap the devices in DataParallel and multiply the batch by their number."""
    optimisation = optimisation_settings(batch_size=8, tokens_per_device=100)
    settings = TrainSettings(
        "imdb", "classify", ModelSettings("m"), DataSettings(), optimisation, run_settings(tmp_path)
    )
    assert _training_arguments(settings, SimpleNamespace(lengths=np.array([5])), 3).n_gpu == 1
