"""Test the schedule against golden values, and against transformers' where the two agree."""

import pytest
import torch
from default_settings import optimisation_settings, run_settings
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from zerotune.training.schedule import Schedule, plan_schedule

FLAGS = {
    "epochs": 3,
    "max_steps": None,
    "warmup_ratio": 0.06,
    "eval_every": None,
    "checkpoint_every": None,
    "log_every": 10,
}


def schedule(num_steps, warmup_steps, **changes):
    values = {"steps_per_epoch": 5, "eval_every": 5, "checkpoint_every": 4, "log_every": 3, **changes}
    return Schedule(num_steps=num_steps, warmup_steps=warmup_steps, **values)


def test_the_rate_rises_over_the_warmup_and_falls_to_the_end():
    rates = [schedule(8, 3).rate_factor(step) for step in range(1, 9)]
    # Warmup: 1/4, 2/4, 3/4. Then 5 steps down from 1; the step after the last would have 0.
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2])


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert [schedule(4, 0).rate_factor(step) for step in range(1, 5)] == [1, 0.75, 0.5, 0.25]


GOLDEN = {
    "linear": [1, 0.75, 0.5, 0.25],
    "cosine": [1, 0.853553, 0.5, 0.146447],  # (1 + cos(0, 45, 90 and 135 degrees)) / 2
    "constant": [1, 1, 1, 1],
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_after_the_same_warmup_the_shapes_differ(shape):
    rates = [schedule(6, 2, shape=shape).rate_factor(step) for step in range(1, 7)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *GOLDEN[shape]], rel=1e-5)


def transformers_rates(name, num_steps, warmup_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup_steps, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(8, 0), (8, 3), (100, 6), (5, 4), (1, 0)])
@pytest.mark.parametrize(
    ("shape", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_after_the_warmup_it_is_the_schedule_of_transformers(shape, name, num_steps, warmup_steps):
    """Its warmup starts at 0, so its first step changes nothing; ours starts at 1 / (warmup + 1)."""
    ours = [schedule(num_steps, warmup_steps, shape=shape).rate_factor(step) for step in range(1, num_steps + 1)]
    theirs = transformers_rates(name, num_steps, warmup_steps)
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    expected = [(done + 1) / (warmup_steps + 1) for done in range(warmup_steps)]
    assert ours[:warmup_steps] == pytest.approx(expected)
    assert theirs[:warmup_steps] == pytest.approx([done / warmup_steps for done in range(warmup_steps)])


@given(num_steps=st.integers(1, 300), share=st.floats(0, 1), shape=st.sampled_from(list(GOLDEN)))
def test_every_step_has_a_rate_above_0_and_the_peak_is_1(num_steps, share, shape):
    warmup_steps = round(num_steps * share)
    rates = [schedule(num_steps, warmup_steps, shape=shape).rate_factor(step) for step in range(1, num_steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)
    assert warmup_steps == num_steps or max(rates) == 1


def test_things_are_due_at_their_steps_and_at_the_end():
    plan = schedule(11, 0)
    steps = range(1, 12)
    assert [step for step in steps if plan.evaluates_at(step)] == [5, 10, 11]
    assert [step for step in steps if plan.saves_at(step)] == [4, 8, 11]
    assert [step for step in steps if plan.logs_at(step)] == [1, 3, 6, 9, 11]
    by_clock = schedule(11, 0, checkpoint_every=None)
    assert [step for step in steps if by_clock.saves_at(step)] == [11]
    assert [plan.epoch(step) for step in steps] == [0] * 5 + [1] * 5 + [2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (300, 18, None)),
        ({"max_steps": 50}, (50, 3, None)),
        ({"max_steps": 1000}, (300, 18, None)),
        ({"warmup_ratio": 0.0, "eval_every": 7}, (300, 0, 7)),
        ({"warmup_ratio": 1.0, "epochs": 1, "schedule": "cosine"}, (100, 100, None)),
    ],
)
def test_flags_make_the_plan(changes, expected):
    plan = plan_schedule(optimisation_settings(**changes), run_settings("run"), num_examples=32 * 99 + 1)
    assert (plan.num_steps, plan.warmup_steps, plan.eval_every) == expected
    assert (plan.steps_per_epoch, plan.checkpoint_every, plan.log_every) == (100, None, 10)
    assert plan.shape == changes.get("schedule", "linear")


@pytest.mark.parametrize(
    ("changes", "num_validation", "expected"),
    [
        ({}, 100, [25, 50, 75, 100]),
        ({}, 500, [100]),  # a tenth of the time would pay for 1.9, so one
        ({}, 400, [50, 100]),
        ({}, 3000, [100]),  # at least one
        ({}, None, [100]),  # the answers are written
        ({"patience": 2}, 100, [100]),
        ({"batch_size": 128}, 100, [13, 25]),  # at least ten steps apart
        ({"batch_size": 1024}, 100, [4]),
        ({"eval_every": 30}, 100, [30, 60, 90, 120]),
    ],
)
def test_an_epoch_has_as_many_evaluations_as_cost_a_tenth_of_it(changes, num_validation, expected):
    plan = plan_schedule(optimisation_settings(**changes), run_settings("run"), 32 * 99 + 1, num_validation)
    last = max(plan.steps_per_epoch, expected[-1])
    assert [step for step in range(1, last + 1) if plan.evaluates_at(step)] == expected
    second = [step - plan.steps_per_epoch for step in range(last + 1, 2 * last + 1) if plan.evaluates_at(step)]
    assert second == expected or "eval_every" in changes
