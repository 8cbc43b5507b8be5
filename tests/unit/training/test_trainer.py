"""The arithmetic of --engine trainer: cutting a step, its order, its mean loss. Whole runs: tests/scripts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from zerotune.training.loop import Progress
from zerotune.training.schedule import plan_schedule
from zerotune.training.trainer import TrainerLoop, _StepSampler, _training_arguments, cut_step, mean_over_step

NUM_EXAMPLES, BATCH_SIZE, STEPS_PER_EPOCH = 165, 8, 21


@pytest.mark.parametrize(
    ("num_examples", "longest", "budget", "expected"),
    [
        (32, 64, 2048, (32, 1)),
        (32, 256, 2048, (8, 4)),
        (32, 300, 2048, (4, 8)),  # 6 fit, and do not divide 32
        (12, 100, 700, (6, 2)),
        (7, 100, 600, (1, 7)),  # only 1 and 7 divide 7
        (4, 5000, 2048, (1, 4)),  # a single long example exceeds the budget
    ],
)
def test_a_step_is_cut_into_as_few_equal_micro_batches_as_fit(num_examples, longest, budget, expected):
    assert cut_step(num_examples, longest, budget) == expected


def test_parts_of_a_step_add_up_to_its_mean_loss():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 2, generator=generator), torch.tensor([0, 1, 1, 0, 1, -100, -100, -100])
    parts = [mean_over_step(logits[rows], labels[rows], torch.tensor(5)) for rows in (slice(0, 4), slice(4, 8))]
    assert sum(parts).item() == pytest.approx(functional.cross_entropy(logits[:5], labels[:5]).item(), rel=1e-6)
    assert mean_over_step(logits[5:], labels[5:], torch.tensor(5)).item() == 0  # a micro-batch of filler alone


def loop_at(step, seed=0):
    """A TrainerLoop without a Trainer, after a step."""
    loop = object.__new__(TrainerLoop)
    loop.args = SimpleNamespace(batch_size=BATCH_SIZE, seed=seed)
    flags = {"epochs": 3, "max_steps": None, "warmup_ratio": 0, "eval_every": 5, "checkpoint_every": 5, "log_every": 5}
    loop.schedule = plan_schedule(SimpleNamespace(**flags), STEPS_PER_EPOCH)
    loop.data = SimpleNamespace(ids=list(range(NUM_EXAMPLES)), lengths=np.arange(NUM_EXAMPLES) % 9 + 1)
    loop.progress, loop._steps = Progress(step=step), (-1, [])
    return loop


def test_an_epoch_has_every_example_once_and_then_filler():
    sampler = _StepSampler(loop_at(0))
    order = list(sampler)
    assert len(order) == len(sampler) == 168
    assert sorted(order[:NUM_EXAMPLES]) == list(range(NUM_EXAMPLES)) and order[NUM_EXAMPLES:] == [NUM_EXAMPLES] * 3


def test_the_order_depends_on_seed_and_epoch_alone():
    """A restart in the middle of an epoch draws that epoch's order, whose first steps the Trainer skips."""
    first, second = (list(_StepSampler(loop_at(step))) for step in (0, STEPS_PER_EPOCH))
    assert first != second
    torch.manual_seed(123)
    assert list(_StepSampler(loop_at(STEPS_PER_EPOCH + 3))) == second
    assert list(_StepSampler(loop_at(0, seed=1))) != first


def test_steps_are_grouped_by_length():
    loop = loop_at(0)
    spreads = [np.ptp(loop.data.lengths[loop.step_indices(step)]) for step in range(1, STEPS_PER_EPOCH + 1)]
    whole = [np.ptp(loop.data.lengths[start : start + BATCH_SIZE]) for start in range(0, NUM_EXAMPLES, BATCH_SIZE)]
    assert loop.data.lengths[loop.step_indices(1)].max() == 9  # the longest first, so that memory runs out at once
    assert np.mean(spreads) < np.mean(whole) / 3


def test_a_process_is_one_device_however_many_it_sees(tmp_path):
    """Else the Trainer makes a DataParallel of them, and takes as many batches."""
    args = SimpleNamespace(batch_size=8, tokens_per_device=100, max_grad_norm=1.0, seed=0)
    run = SimpleNamespace(path=tmp_path, accelerator=SimpleNamespace(num_processes=1))
    data, schedule = SimpleNamespace(lengths=np.array([5])), SimpleNamespace(num_steps=3)
    assert _training_arguments(args, "fp32", data, schedule, run).n_gpu == 1
