"""Test train/imdb.py --engine trainer: it matches the loop on the loop's steps, at any world size, and resumes exactly.

The bounds and their reasons are in comparing.py.
"""

import csv
import math
import shutil

import pytest
from comparing import OFTEN, assert_same_bits, assert_same_curve, killed_at, newest_step, steps_of
from launching import REPOSITORY
from tiny_models import tiny_model

from zerotune.tasks.sample import sample_rows
from zerotune.training.checkpoints import step_folder

# Short reviews in an epoch of 8 steps, the last of which has a single row; a step has 2 micro-batches.
FLAGS = ["--engine", "trainer", "--max-length", 40, "--tokens-per-device", 320]
ON_LOOP_STEPS = "tests/scripts/trainer_on_loop_steps.py"


@pytest.fixture(scope="module")
def train(workplace):
    """Run train/imdb.py to its end in float32, and check every rank's exit status."""
    files = {}
    for name, num_rows, seed in (("train", 600, 11), ("test", 120, 12)):
        files[name] = workplace.folder / f"{name}.csv"
        with files[name].open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *sample_rows(num_rows, seed)])

    def run(name, *more, script="train/imdb.py", world=1, expect=0, **disturbance):
        own = ["--train-file", files["train"], "--test-file", files["test"], *FLAGS]
        flags = workplace.train_flags(name, *own, *more)
        ended = workplace.server.start(script, flags, workplace.folder / name, world=world, **disturbance).wait()
        assert set(ended.codes) == {expect}, f"{ended.codes}\n{ended.text()}"
        return ended

    return run


@pytest.fixture(scope="module")
def undisturbed(train):
    return train("trainer-undisturbed", *OFTEN)


def test_a_run_by_the_trainer_leaves_what_a_run_by_the_loop_leaves(train, undisturbed):
    loop = train("trainer-not", *OFTEN, "--engine", "loop")
    for name in ("state.json", "final/task.json", "eval/final/metrics.json", "run.json", "parameters.json"):
        assert undisturbed.read_json(name).keys() == loop.read_json(name).keys()
    ours, theirs = (run.read_lines("metrics.jsonl") for run in (undisturbed, loop))
    assert [(row["step"], row["epoch"], row.keys()) for row in ours] == [
        (row["step"], row["epoch"], row.keys()) for row in theirs
    ]
    assert [run.read_json("final/task.json")["engine"] for run in (undisturbed, loop)] == ["trainer", "loop"]
    assert undisturbed.read_json("run.json")["flags"]["engine"] == "trainer"
    assert undisturbed.read_json("state.json") == {"state": "finished", "reason": None}
    (last,) = (row for row in ours if row["step"] == 8 and "tokens" in row)
    assert undisturbed.read_json("run.json")["timings"]["train_tokens_per_s"] == pytest.approx(last["tokens_per_s"])


LORA = ["--method", "lora"]
# LoRA trains without dropout, so an encoder's steps, for which the loop has its own kernels, can be compared too
METHODS = {
    "full": [],
    "lora": [*LORA, "--label-smoothing", 0.2, "--schedule", "cosine"],
    "encoder": [*LORA, "--model", tiny_model("distilbert")],
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_on_the_steps_of_the_loop_it_has_the_curve_of_the_loop(train, method, world):
    """Losses, gradient norms, learning rates and weights agree: optimizer, schedule, clipping and mean are the same."""
    loop = train(f"loop-{method}-{world}", "--engine", "loop", *METHODS[method])
    run = train(f"trainer-{method}-{world}", *METHODS[method], script=ON_LOOP_STEPS, world=world)
    assert_same_curve(run, loop)
    evaluations = [one.evaluations() for one in (run, loop)]
    assert evaluations[0] and evaluations[0] == [pytest.approx(row, rel=1e-5) for row in evaluations[1]]


def test_two_processes_log_the_loss_of_one(train, undisturbed):
    """For a stock model on two processes, the Trainer would log twice the loss."""
    run = train("trainer-two", *OFTEN, world=2)
    assert run.read_json("run.json")["world"]["num_processes"] == 2
    assert_same_curve(run, undisturbed)
    assert steps_of(run)[0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert [row["id"] for row in run.read_lines("eval/final/predictions.jsonl")] == [
        row["id"] for row in undisturbed.read_lines("eval/final/predictions.jsonl")
    ]


VARIANTS = {"plain": [], "dropout": ["--model", tiny_model("distilbert")], "bf16": ["--precision", "bf16"]}


@pytest.mark.parametrize(("variant", "world"), [("plain", 2), ("dropout", 1), ("bf16", 1)])
def test_a_stopped_run_is_saved_and_goes_on_bit_for_bit(train, variant, world):
    flags, name = [*OFTEN, *VARIANTS[variant]], f"trainer-stopped-{variant}"
    reference = train(f"{name}-not", *flags, world=world)
    run = train(name, *flags, world=world, expect=75, **killed_at("open", r"metrics\.jsonl$", 3, "SIGTERM"))
    assert "stopped by SIGTERM during an evaluation" in run.read_json("state.json")["reason"]  # repeated later
    assert newest_step(run) == 4
    assert_same_bits(train(name, *flags, world=world), reference)


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(train, undisturbed):
    run = train("trainer-killed", *OFTEN, expect=-9, **killed_at("os.rename", r"\.writing-step-00000006$"))
    assert newest_step(run) == 4
    torn = step_folder(run.folder / "checkpoints", 4) / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-1])
    run = train("trainer-killed", *OFTEN)
    assert "step-00000004 is skipped: optimizer.pt has" in run.text()
    assert_same_bits(run, undisturbed)


def test_a_killed_run_goes_on_by_way_of_a_scratch_folder(train, undisturbed, tmp_path):
    flags = [*OFTEN, "--scratch-dir", tmp_path]
    run = train("trainer-scratch", *flags, expect=-9, **killed_at("os.rename", r"\.writing-step-00000006$"))
    assert newest_step(run) == 4
    assert_same_bits(train("trainer-scratch", *flags), undisturbed)
    assert list(tmp_path.iterdir()) == []


def test_final_is_made_again_of_the_best_checkpoint(train, undisturbed):
    folder = shutil.copytree(undisturbed.folder, undisturbed.folder.with_name("trainer-remade"))
    shutil.rmtree(folder / "final")
    assert_same_bits(train("trainer-remade", *OFTEN), undisturbed)


def test_the_earliest_of_equal_evaluations_is_best_and_patience_ends_the_run(train):
    still = ["--learning-rate", 0, "--head-learning-rate", 0, "--eval-every", 2, "--patience", 1]
    run = train("trainer-patient", *still)
    assert steps_of(run)[-1]["step"] == 4
    assert run.read_json("final/task.json")["best_step"] == 2


def test_a_loss_that_is_not_finite_stops_the_run(train):
    run = train("trainer-infinite", "--learning-rate", 1e30, "--max-grad-norm", "none", expect=2)
    assert "is nan; batch ids" in run.refusal() or "is inf; batch ids" in run.refusal()


@pytest.mark.parametrize(
    ("flags", "world", "words"),
    [
        (["--deepspeed", REPOSITORY / "ds_configs/zero2.json"], 1, "--engine trainer runs without DeepSpeed"),
        (["--class-weights", "balanced", "--plan"], 1, "which --class-weights balanced does not allow"),
        (["--class-weights", "balanced"], 1, "which --class-weights balanced does not allow"),
        (["--precision", "fp16"], 1, "--engine trainer computes in fp16 on a GPU only"),
        (["--gradient-exchange", "bf16"], 1, "--engine trainer exchanges gradients in fp32"),
        (["--attention", "varlen"], 1, "--engine trainer pads its batches"),
        (["--batch-size", 15], 2, "--batch-size 15 is not a multiple of 2 processes"),
    ],
)
def test_what_it_does_not_do_is_refused(train, flags, world, words):
    run = train("trainer-refused", *flags, world=world, expect=2)
    assert words in run.refusal() and not run.folder.exists()
