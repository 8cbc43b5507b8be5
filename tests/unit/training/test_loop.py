"""Test the loop with a real engine around a linear model: its arithmetic, when it stops, and how it resumes."""

import json
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from default_settings import optimisation_settings, run_settings
from torch import nn
from waiting import wait_until

from zerotune.errors import Preempted, Refused
from zerotune.models.loading import has_dropout
from zerotune.run.folder import RunFolder
from zerotune.run.stopping import StopSignal
from zerotune.settings.groups import Interval
from zerotune.training import checkpoints, scratch, snapshot
from zerotune.training.batches import LengthBatches, epoch_steps
from zerotune.training.data import Batch
from zerotune.training.engine import Engine, build_optimizer
from zerotune.training.loop import TrainingLoop
from zerotune.training.progress import Progress
from zerotune.training.schedule import Schedule

NUM_EXAMPLES, WIDTH, BATCH = 23, 4, 5
GENERATOR = torch.Generator().manual_seed(3)
FEATURES = torch.randn(NUM_EXAMPLES, WIDTH, generator=GENERATOR)
TARGETS = torch.randn(NUM_EXAMPLES, generator=GENERATOR)
LENGTHS = np.random.default_rng(4).integers(1, 30, NUM_EXAMPLES)
RATE, DECAY, MAX_NORM, INITIAL = 0.05, 0.1, 0.7, 0.5


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.config = SimpleNamespace()
        self.linear, self.dropout = nn.Linear(WIDTH, 1), nn.Dropout(dropout)
        with torch.no_grad():
            self.linear.weight.fill_(INITIAL)
            self.linear.bias.zero_()

    no_sync = nullcontext  # DDP has this method

    def forward(self, features):
        return self.linear(self.dropout(features))[:, 0]


class Stop(StopSignal):
    """A StopSignal that leaves the process's own handlers alone."""

    def __init__(self):
        self.can_save, self._noted, self._file = False, None, None


class Accelerator:
    """One process on a CPU."""

    device, num_processes, process_index, is_main_process = torch.device("cpu"), 1, 0, True
    is_local_main_process, deepspeed_plugin = True, None

    def prepare(self, *parts):
        return parts

    def unwrap_model(self, model):
        return model

    def wait_for_everyone(self):
        pass


class Data(LengthBatches):
    ids = tuple(f"train-{number}" for number in range(NUM_EXAMPLES))
    lengths = LENGTHS

    def num_targets(self, rows):
        return len(rows)

    def batch(self, rows, device):
        return Batch({"features": FEATURES[rows]}, TARGETS[rows])


def make_loop(
    folder,
    values=None,
    num_steps=12,
    dropout=0.0,
    stop=None,
    scratch_dir=None,
    resume="auto",
    minutes=None,
    **flags,
):
    """Make a loop that evaluates after every second step and saves after every fifth.

    Args:
        values: results of the evaluations; the greatest is the best.
    """
    given = {"batch_size": BATCH, "tokens_per_device": 40, "learning_rate": RATE, "seed": 7}
    model = Model(dropout)
    groups = [{"params": list(model.parameters()), "lr": RATE, "weight_decay": DECAY}]
    engine = Engine(Accelerator(), model, build_optimizer("adamw", groups, "cpu"), "fp32", MAX_NORM)
    every = Interval(steps=5) if minutes is None else Interval(minutes=minutes)
    schedule = Schedule(
        num_steps, 5, 2, eval_every=flags.get("eval_every", 2), checkpoint_every=every.steps, log_every=1
    )
    stop = stop or Stop()

    def validate():
        step = loop.progress.step
        value = values[step // 2 - 1] if values else step
        if callable(value):
            value = value(stop)
        return {"loss": -float(value), "accuracy": float(value)}

    folder.mkdir(exist_ok=True)
    settings = run_settings(
        folder,
        scratch_dir=scratch_dir,
        resume=resume,
        checkpoint_every=every,
        keep_checkpoints=2 if minutes is None else 9,
    )
    run = RunFolder(settings, Accelerator())
    run.run_id = "of these tests"  # run.json gives every start the same id
    loop = TrainingLoop(run, engine, Data(), schedule, optimisation_settings(**given | flags), validate, stop)
    return loop


def train(loop):
    """Train on the mean squared error, to the end or until `loop` stops."""
    for step in loop:
        for batch in step:
            errors = loop.engine.forward(**batch.inputs) - batch.targets
            loop.engine.backward(errors.square().sum() * batch.weight, batch.is_last)
        loop.engine.update(step.rate_factor)
    return loop.progress


def logged(loop, name="loss"):
    rows = [json.loads(line) for line in loop.run.metrics_path.read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.engine.module.parameters()])


def saved_steps(loop):
    """Return the steps of all saved weights, with or without the state to resume from them."""
    return sorted(int(path.name.rpartition("-")[2]) for path in loop.saver.root.iterdir())


def name_of(folder):
    return folder and folder.name


# --- arithmetic ---


def by_hand(num_steps):
    """Take Loshchilov & Hutter's AdamW steps on each step's mean loss, clipped by the global norm, in float64."""
    weight, bias = torch.full((WIDTH,), 0.5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    parameters = torch.cat([weight, bias[None]])
    first, second, losses, norms = torch.zeros(5), torch.zeros(5), [], []
    inputs = torch.cat([FEATURES, torch.ones(NUM_EXAMPLES, 1)], 1).double()
    for step in range(1, num_steps + 1):
        indices = epoch_steps(LENGTHS, BATCH, 7, (step - 1) // 5)[(step - 1) % 5]
        error = inputs[indices] @ parameters - TARGETS[indices]
        losses.append(float(error.square().mean()))
        gradient = 2 * inputs[indices].T @ error / len(indices)
        norms.append(float(gradient.norm()))
        gradient = gradient * min(1.0, MAX_NORM / norms[-1])
        rate = RATE * (step / 3 if step <= 2 else (num_steps - step + 1) / (num_steps - 2))
        parameters = parameters * (1 - rate * DECAY)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        parameters = parameters - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return losses, norms, parameters


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_a_run_is_adamw_on_the_mean_loss_whatever_the_token_budget(tmp_path, budget):
    loop = make_loop(tmp_path, tokens_per_device=budget)
    progress = train(loop)
    losses, norms, parameters = by_hand(12)
    assert logged(loop) == pytest.approx(losses, rel=1e-5)
    assert logged(loop, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert max(norms) > MAX_NORM > min(norms)  # some steps are clipped and some are not
    torch.testing.assert_close(weights(loop), parameters.float(), rtol=1e-5, atol=1e-6)
    assert progress.num_examples == 2 * NUM_EXAMPLES + sum(map(len, epoch_steps(LENGTHS, BATCH, 7, 2)[:2]))
    assert logged(loop, "tokens")[4] == LENGTHS.sum()  # an epoch sees every token once
    assert logged(loop, "learning_rate")[:3] == pytest.approx([RATE / 3, RATE * 2 / 3, RATE])


# --- evaluations ---


def test_an_evaluation_is_best_when_it_is_better_and_the_earliest_of_equals():
    progress = Progress()
    improved = []
    for step, value in enumerate([0.5, 0.5, 0.7, 0.6, 0.7, 0.7], start=1):
        progress.step = step
        improved.append(progress.record_evaluation(value, patience=3))
    assert improved == [True, False, True, False, False, False]
    assert (progress.best_step, progress.best_value) == (3, 0.7)
    assert (progress.evaluations_without_gain, progress.stopped_early) == (3, True)


def test_without_patience_nothing_stops_early():
    progress = Progress()
    for step in range(1, 50):
        progress.step = step
        progress.record_evaluation(-step, None)
    assert progress.best_step == 1 and not progress.stopped_early


@pytest.mark.parametrize(
    ("values", "patience", "last", "best"),
    [
        ([1, 2, 3, 4, 5, 6], 1, 12, 12),
        ([3, 2, 1, 9, 9, 9], 2, 6, 2),
        ([3, 2, 4, 1, 4, 9], 2, 10, 6),
        ([3, 3, 3, 3, 3, 3], 1, 4, 2),
        ([3, 2, 1, 0, 0, 0], None, 12, 2),
    ],
)
def test_patience_ends_a_run_and_the_best_checkpoint_is_there(tmp_path, values, patience, last, best):
    loop = make_loop(tmp_path, values, patience=patience)
    progress = train(loop)
    assert (progress.step, progress.best_step) == (last, best)
    assert {best, last} <= set(saved_steps(loop))
    assert progress.stopped_early == (last < 12)
    found, _ = checkpoints.newest_whole(loop.saver.root)
    assert checkpoints.read_progress(found)["progress"]["best_step"] == best


def test_the_mean_training_loss_weighs_steps_by_their_targets():
    progress = Progress()
    progress.count_loss(2.0, 3)
    progress.count_loss(4.0, 1)
    assert progress.take_mean_loss() == 2.5
    progress.count_loss(7.0, 2)
    assert progress.take_mean_loss() == 7.0


def test_rows_that_are_not_trained_decay_by_the_steps_that_are_done(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("zerotune.training.loop.decay_unused_rows", lambda model, *given: seen.append(given))
    loop = make_loop(tmp_path, num_steps=4)
    train(loop)
    factors = [loop.schedule.rate_factor(step) for step in (1, 2, 3, 4)]
    assert seen == [(factors[:2], RATE, 0.01), (factors, RATE, 0.01)]


def test_the_logged_loss_is_the_sum_over_the_ranks(tmp_path):
    """The imaginary other rank reports the same values as this one."""
    loop = make_loop(tmp_path, tokens_per_device=10**6, num_steps=1)
    loop.accelerator.num_processes = 2
    loop.accelerator.reduce = lambda value, how: {"sum": 2 * value, "mean": value}[how]
    own = loop.data.micro_batches(loop.step_rows(1), 10**6, 2)[0]
    assert len(own) == 1 and 0 < len(own[0]) < BATCH
    error = INITIAL * FEATURES[own[0]].sum(1) - TARGETS[own[0]]
    train(loop)
    assert logged(loop)[0] == pytest.approx(2 * float(error.square().sum()) / BATCH, rel=1e-5)


# --- stopping and resuming ---


def stop_now(stop):
    stop._noted = "SIGTERM"
    return 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(tmp_path, dropout):
    whole = make_loop(tmp_path / "whole", [0] * 6, dropout=dropout)
    train(whole)
    stopped = make_loop(tmp_path / "stopped", [0, stop_now, 0, 0, 0, 0], dropout=dropout)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 5 and saved"):
        train(stopped)
    torch.manual_seed(99)
    again = make_loop(tmp_path / "stopped", [0] * 6, dropout=dropout)
    assert checkpoints.newest_whole(again.saver.root)[0].name == "step-00000005"
    train(again)
    assert logged(again) == logged(whole) and weights(again).equal(weights(whole))
    assert logged(again, "eval_loss") == logged(whole, "eval_loss")
    assert (dropout > 0) == has_dropout(again.engine.module)
    if dropout:
        assert logged(again) != pytest.approx(by_hand(12)[0])


@pytest.mark.parametrize("stop_at", [None, 6])
def test_scratch_changes_no_number_and_all_of_it_has_arrived_at_the_end(tmp_path, stop_at):
    values = [stop_now if stop_at == step else step % 3 for step in range(2, 14, 2)]
    whole = make_loop(tmp_path / "whole", values)
    through = make_loop(tmp_path / "through", values, scratch_dir=tmp_path / "scratch")
    for loop in (whole, through):
        with pytest.raises(Preempted) if stop_at else nullcontext():
            train(loop)
    assert logged(through) == logged(whole) and weights(through).equal(weights(whole))
    assert saved_steps(through) == saved_steps(whole) and whole.progress.step == (stop_at + 1 if stop_at else 12)
    found = [checkpoints.newest_whole(loop.saver.root)[0].name for loop in (through, whole)]
    assert found[0] == found[1] and list((tmp_path / "scratch").iterdir()) == []


def test_a_checkpoint_from_scratch_counts_at_the_step_after_its_arrival(tmp_path, monkeypatch):
    """The checkpoint of step 5 is held back until the evaluation after step 6; the next save is at step 10."""
    seen, let_go, copy = [], threading.Event(), scratch._copy

    def copy_when_let_go(file, to):
        if "00000005" in str(to):
            assert let_go.wait(60)
        return copy(file, to)

    monkeypatch.setattr(scratch, "_copy", copy_when_let_go)

    def look(stop):
        if loop.progress.step == 6:
            let_go.set()
            wait_until(lambda: loop.saver.has_arrived, "the checkpoint of step 5 has arrived")
        newest, _ = checkpoints.newest_whole(loop.saver.root)
        seen.append((loop.progress.step, name_of(loop.saver.on_its_way), name_of(newest)))
        return 0

    loop = make_loop(tmp_path / "run", [look] * 6, scratch_dir=tmp_path / "scratch")
    train(loop)
    assert seen[2:4] == [(6, "step-00000005", None), (8, None, "step-00000005")]


def test_minutes_count_from_the_last_checkpoint_by_rank_0s_clock(tmp_path, monkeypatch):
    """A step takes 40 seconds here, so two minutes are over after the third step since the last checkpoint.

    Memory is short, so no save is delayed by the one before.
    """
    monkeypatch.setattr("zerotune.training.saving.free_memory", lambda: 0)
    monkeypatch.setattr("zerotune.training.saving.time", SimpleNamespace(monotonic=lambda: 40 * loop.progress.step))
    loop = SimpleNamespace(progress=Progress())
    loop = make_loop(tmp_path / "run", [0] * 6, num_steps=11, minutes=2)
    train(loop)
    # rank 0 raises a step's flag before the step is counted
    assert [step for step in saved_steps(loop) if step != 2] == [4, 8, 11]


@pytest.mark.parametrize(("rank", "saves"), [(0, [4, 7]), (1, [7])])
def test_a_rank_saves_when_the_status_says_that_rank_0s_clock_does(tmp_path, monkeypatch, rank, saves):
    loop = make_loop(tmp_path / "run", [-step for step in range(6)], num_steps=7, minutes=1e9)
    ticks = {4}
    monkeypatch.setattr(type(loop.saver), "is_due_by_clock", property(lambda saver: loop.progress.step + 1 in ticks))
    loop.accelerator.is_main_process = rank == 0
    wanted = []
    monkeypatch.setattr(loop.saver, "save", lambda progress, weights_alone=False: wanted.append(progress.step))
    train(loop)
    assert [step for step in wanted if step != 2] == saves


def test_a_save_by_the_clock_is_put_off_until_the_one_before_is_written(tmp_path, monkeypatch):
    let_go, write = threading.Event(), snapshot._write
    monkeypatch.setattr(snapshot, "_write", lambda *given: (let_go.wait(60), write(*given))[1])

    def look(stop):
        if loop.progress.step == 6:
            let_go.set()
            wait_until(lambda: loop.saver.has_arrived, "the checkpoint of step 1 has arrived")
        return -loop.progress.step

    values = [-1, -1, look, -1, -1, -1]
    loop = make_loop(tmp_path / "run", values, num_steps=7, minutes=1e-9, eval_every=6)
    train(loop)
    assert sorted(map(name_of, loop.saver.root.iterdir())) == ["best-00000006", "step-00000001", "step-00000007"]


def test_a_checkpoint_written_while_training_continues_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Step 5's is held back until the evaluation after step 8, the best step; that one is saved as weights only."""
    let_go, write = threading.Event(), snapshot._write

    def write_when_let_go(files, event, aside, num_bytes):
        if aside.name.endswith("step-00000005"):
            assert let_go.wait(60)
        return write(files, event, aside, num_bytes)

    monkeypatch.setattr(snapshot, "_write", write_when_let_go)
    values = [1, 1, 1, lambda stop: let_go.set() or 2, 0, 0]
    whole = make_loop(tmp_path / "whole", values)
    train(whole)
    assert let_go.is_set() and whole.progress.best_step == 8
    found = {path.name: {file.name for file in path.iterdir()} for path in whole.saver.root.iterdir()}
    records = {"manifest.json", "progress.json", "COMPLETE"}
    assert found["best-00000008"] == {"model.safetensors"} | records
    assert found["step-00000010"] == found["step-00000012"] == {"model.safetensors", "optimizer.pt"} | records
    assert found.keys() == {"best-00000008", "step-00000010", "step-00000012"}

    killed = make_loop(tmp_path / "killed", values)
    for step in killed:
        for batch in step:
            errors = killed.engine.forward(**batch.inputs) - batch.targets
            killed.engine.backward(errors.square().sum() * batch.weight, batch.is_last)
        killed.engine.update(step.rate_factor)
        if step.number == 10:  # step 5 counts; no checkpoint records the weights of step 8
            break
    again = make_loop(tmp_path / "killed", values)
    assert checkpoints.newest_whole(again.saver.root)[0].name == "step-00000005"
    train(again)
    assert logged(again) == logged(whole) and weights(again).equal(weights(whole))
    assert again.progress.best_step == 8


def test_a_damaged_checkpoint_does_not_hold_the_best_weights_of_its_step(tmp_path):
    """A stop during the evaluation of step 4 saves it; it is damaged; step 4 turns out to be the best."""

    def preempted(stop):
        raise Preempted("stopped")

    values = [1, 2, 0, 0, 0, 0]
    stopped = make_loop(tmp_path / "run", [1, preempted, 0, 0, 0, 0])
    with pytest.raises(Preempted):
        train(stopped)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"torn")
    again, whole = make_loop(tmp_path / "run", values), make_loop(tmp_path / "whole", values)
    train(again)
    train(whole)
    best = checkpoints.weights_folder(again.saver.root, 4)
    assert again.progress.best_step == 4 and checkpoints.defect(best, again.run.run_id) is None
    assert checkpoints.newest_whole(again.saver.root)[1] == []
    assert logged(again) == logged(whole) and weights(again).equal(weights(whole))


def test_where_memory_is_short_training_waits_for_a_save_and_says_so(tmp_path, monkeypatch, capsys):
    whole = make_loop(tmp_path / "whole", [0] * 6)
    train(whole)
    assert "training waits" not in capsys.readouterr().out
    need = whole.engine.snapshot_bytes()
    for free, waits in ((2 * need, False), (2 * need - 1, True)):
        monkeypatch.setattr("zerotune.training.saving.free_memory", lambda free=free: free)
        loop = make_loop(tmp_path / str(free), [0] * 6)
        assert ("training waits while a checkpoint is written: a copy" in capsys.readouterr().out) == waits
        train(loop)
        assert loop.saver.on_its_way is None and saved_steps(loop) == saved_steps(whole)
        assert logged(loop) == logged(whole) and weights(loop).equal(weights(whole))


def test_what_was_logged_after_the_checkpoint_is_logged_once(tmp_path):
    loop = make_loop(tmp_path, [0] * 6, num_steps=7)
    train(loop)
    root = loop.saver.root
    again = make_loop(tmp_path, [0] * 6, num_steps=7, resume=str(checkpoints.step_folder(root, 5)))
    train(again)
    assert logged(again, "step") == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]


def test_a_stop_during_an_evaluation_saves_the_step_and_evaluates_it_later(tmp_path):
    def stopped(stop):
        raise Preempted("stopped")

    whole = make_loop(tmp_path / "whole", [1, 5, 2, 3, 4, 0])
    train(whole)
    first = make_loop(tmp_path / "parts", [1, stopped])
    with pytest.raises(Preempted):
        train(first)
    assert saved_steps(first)[-1] == 4 and first.progress.evaluated_step == 2
    again = make_loop(tmp_path / "parts", [1, 5, 2, 3, 4, 0])
    train(again)
    assert again.progress.best_step == whole.progress.best_step == 4
    assert logged(again, "step") == logged(whole, "step") and logged(again) == logged(whole)
    assert logged(again, "eval_loss") == logged(whole, "eval_loss") and weights(again).equal(weights(whole))


# --- numbers that are not finite ---


@contextmanager
def infinite_features(indices):
    kept = FEATURES[indices].clone()
    FEATURES[indices] = float("inf")
    try:
        yield
    finally:
        FEATURES[indices] = kept


def test_a_loss_that_is_not_finite_names_step_ids_and_checkpoint(tmp_path):
    step_8 = epoch_steps(LENGTHS, BATCH, 7, 1)[2]
    loop = make_loop(tmp_path, [0] * 6)
    with pytest.raises(Refused) as refusal, ExitStack() as stack:
        for step in loop:
            if step.number == 8:
                stack.enter_context(infinite_features(step_8[:1]))
            for batch in step:
                errors = loop.engine.forward(**batch.inputs) - batch.targets
                loop.engine.backward(errors.square().sum() * batch.weight, batch.is_last)
            loop.engine.update(step.rate_factor)
    line = str(refusal.value)
    assert line.startswith("the loss of step 8 is ")
    assert f"batch ids {', '.join(f'train-{index}' for index in step_8)};" in line
    assert f"last good checkpoint: {loop.saver.root / 'step-00000005'};" in line
    assert logged(loop, "step")[-1] == 7


def test_an_evaluation_that_is_not_finite_is_not_saved(tmp_path):
    loop = make_loop(tmp_path, [1, float("nan"), 2])
    with pytest.raises(Refused, match="the evaluation after step 4 has a loss of nan"):
        train(loop)
    assert saved_steps(loop) == [2]
