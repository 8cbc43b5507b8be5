"""Test the engine's arithmetic: a step with any number of micro-batches and ranks is one AdamW step on one sum."""

from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from zerotune.training.engine import Engine, build_optimizer, keep_until_reduced, tensors_in

RATES, DECAY, MAX_NORM = (0.1, 0.5), 0.1, 0.7
INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(6, generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    """A linear model with a context like DDP's, which records when gradients stay local."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, 1)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.exchanges = []

    def forward(self, inputs):
        return self.head(self.body(inputs))[:, 0]

    @contextmanager
    def no_sync(self):
        self.exchanges.append("local")
        yield


def make_engine(num_processes=1, max_norm=MAX_NORM, optimizer="adamw"):
    model = Model()
    groups = [
        {"params": list(part.parameters()), "lr": rate, "weight_decay": DECAY}
        for part, rate in zip((model.body, model.head), RATES, strict=True)
    ]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=num_processes,
        process_index=0,
        deepspeed_plugin=None,
        prepare=lambda *parts: parts,
        unwrap_model=lambda model: model,
    )
    return Engine(accelerator, model, build_optimizer(optimizer, groups, "cpu"), "fp32", max_norm)


def test_a_gradient_keeps_its_memory_until_another_stream_has_reduced_it():
    """DeepSpeed lets go of a matrix larger than a bucket before that. To see it take effect wants GPUs and bad luck."""
    calls, stream = [], object()
    zero = SimpleNamespace(
        overlap_comm=True,
        reduction_stream=stream,
        average_tensor=lambda tensor, dtype: calls.append(("average", dtype)),
    )
    keep_until_reduced(zero)
    gradient = SimpleNamespace(record_stream=lambda given: calls.append(("record", given)))
    zero.average_tensor(gradient, torch.bfloat16)
    assert calls == [("record", stream), ("average", torch.bfloat16)]
    zero.overlap_comm = False
    zero.average_tensor(gradient, torch.float32)
    assert calls[2:] == [("average", torch.float32)]


def test_deepspeed_has_what_that_relies_on():
    assert list(signature(DeepSpeedZeroOptimizer.average_tensor).parameters)[:2] == ["self", "tensor"]
    assert {"reduction_stream", "overlap_comm"} <= set(DeepSpeedZeroOptimizer.__init__.__code__.co_names)


def backward(engine, cuts):
    """Accumulate gradients of micro-batches whose losses add up to the mean over all rows."""
    for number, rows in enumerate(cuts):
        is_last = number == len(cuts) - 1
        with engine.gradients_stay_local(is_last):
            loss = (engine.forward(inputs=INPUTS[rows]) - TARGETS[rows]).square().sum() / len(TARGETS)
            engine.backward(loss, is_last)


CUTS = {"whole": [[0, 1, 2, 3, 4, 5]], "cut": [[0, 1, 2], [3], [4, 5]]}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("max_norm", [None, MAX_NORM, 1e6])
def test_a_step_is_torchs_adamw_on_the_mean_loss(cut, max_norm):
    engine, plain = make_engine(max_norm=max_norm), Model()
    groups = [
        {"params": list(part.parameters()), "lr": rate * 0.25}
        for part, rate in zip((plain.body, plain.head), RATES, strict=True)
    ]
    reference = torch.optim.AdamW(groups, weight_decay=DECAY)
    for _ in range(3):
        backward(engine, CUTS[cut])
        loss = (plain(INPUTS) - TARGETS).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm or float("inf"))
        engine.update(0.25)
        reference.step()
        reference.zero_grad()
        found_loss, found_norm = engine.take_loss_and_norm()
        torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norm, norm, rtol=1e-5, atol=0)
        for (name, ours), theirs in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
            assert ours.grad is None


def test_gradients_are_multiplied_where_the_ranks_average_them():
    """DDP divides the sum over ranks by their number, but each rank's loss is its part of one sum."""
    one, two = make_engine(1), make_engine(2)
    for engine in (one, two):
        backward(engine, CUTS["whole"])
    for ours, doubled in zip(one.trainable, two.trainable, strict=True):
        torch.testing.assert_close(doubled.grad, 2 * ours.grad)
    one.update(1.0)
    two.update(1.0)
    assert one.take_loss_and_norm()[0] == two.take_loss_and_norm()[0], "the logged loss is this rank's part"


@pytest.mark.parametrize(("num_processes", "expected"), [(1, []), (2, ["local", "local"])])
def test_ranks_exchange_gradients_with_the_last_micro_batch_alone(num_processes, expected):
    engine = make_engine(num_processes)
    backward(engine, CUTS["cut"])
    assert engine.module.exchanges == expected


def test_under_a_loss_scaler_the_average_becomes_a_sum_after_unscaling(monkeypatch):
    """Multiplying the loss instead could overflow where one process would not."""
    engine, plain = make_engine(2, max_norm=None), make_engine(1, max_norm=None)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    backward(engine, CUTS["cut"])
    backward(plain, CUTS["cut"])
    for ours, theirs in zip(engine.trainable, plain.trainable, strict=True):
        torch.testing.assert_close(ours.grad, 8 * theirs.grad)
    wanted = 2 * torch.nn.utils.get_total_norm([p.grad for p in plain.trainable])
    engine.update(1.0)
    torch.testing.assert_close(engine.take_loss_and_norm()[1], wanted)


def test_a_step_without_an_update_is_a_bug():
    engine = make_engine()
    backward(engine, CUTS["whole"])
    with pytest.raises(AssertionError, match=r"every step must end with engine\.update"):
        engine.take_loss_and_norm()


def test_an_engine_that_is_freed_holds_nothing():
    engine = make_engine()
    engine.accelerator.free_memory = lambda: None
    backward(engine, CUTS["whole"])
    engine.update(1.0)
    backward(engine, CUTS["whole"])
    logits = engine.forward(inputs=torch.ones(2, 3))  # a script's last ones, whose graph holds the weights
    weights = engine.trainable
    gradients = [each.grad for each in weights]
    moments = list(tensors_in(engine.optimizer.state))
    assert len(moments) == 3 * len(gradients), "two, and a count"
    engine.free()
    assert engine.model is None and engine.optimizer is None and engine.trainable == []
    assert logits.requires_grad and not any(
        each.untyped_storage().nbytes() for each in [*weights, *gradients, *moments]
    )
