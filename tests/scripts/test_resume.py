"""A run that is killed or stopped resumes with the same command and gets the same numbers.

In one process on a CPU the result is bit-identical: the same kernels see the same values in the same order. So it is on
two processes: gloo adds two numbers, and a + b = b + a.
"""

import json
import shutil

import pytest
from comparing import OFTEN, assert_same_bits, killed_at, newest_step
from launching import Launch
from tiny_models import tiny_model
from waiting import wait_until

from zerotune.training.checkpoints import defect, newest_whole, step_folder

LORA = ["--method", "lora"]


# One run is killed again and again: each event at which it is killed, and the newest whole checkpoint at that time. A
# thread writes and hashes the files during training; the next save waits for it.
DEATHS = [
    (("open", r"metrics\.jsonl$", 2), None),  # between two steps
    (("os.mkdir", r"\.writing-step-00000002$"), None),  # nothing written
    (("open", r"\.writing-step-00000002/model\.safetensors$"), None),  # written, not hashed
    (("open", r"\.writing-step-00000002/\.manifest\.json"), None),
    (("os.rename", r"\.writing-step-00000002$"), None),  # hashed, not renamed
    (("open", r"step-00000002/COMPLETE$"), None),  # renamed, not marked
    (("os.mkdir", r"\.writing-step-00000004$"), 2),  # step 4 repeated
    (("os.rename", r"\.writing-step-00000004$"), 2),
    (("os.remove", r"step-00000002/COMPLETE$"), 4),  # about to delete the older one
    (("os.rmdir", r"step-00000002$"), 6),  # half deleted
    (("os.rename", r"\.writing-final$"), 8),
    (("open", r"eval/final/\.partial/rank-0\.jsonl$"), 8),
    (("open", r"\.report\.html"), 8),
]


@pytest.mark.slow
def test_a_run_killed_at_every_stage_ends_as_one_that_was_not(workplace):
    reference = workplace.train_once("undisturbed", *OFTEN)
    for death, newest in DEATHS:
        run = workplace.train("killed", *OFTEN, expect=-9, **killed_at(*death))
        assert newest_step(run) == newest, death
        assert run.read_json("state.json")["state"] == "running"
    run = workplace.train("killed", *OFTEN)
    assert_same_bits(run, reference)
    assert run.read_json("state.json") == {"state": "finished", "reason": None}
    assert not list(run.folder.rglob(".writing*"))


# an evaluation between two checkpoints that finds the best step so far saves it without the optimizer's state
BETWEEN = ["--checkpoint-every", 3, "--eval-every", 2, "--keep-checkpoints", 1]
DEATHS_BETWEEN = [
    (("open", r"\.writing-best-00000002/model\.safetensors$"), None),
    (("open", r"best-00000002/COMPLETE$"), None),  # renamed, not marked
    (("os.rename", r"\.writing-step-00000003$"), None),  # the best is complete, but no checkpoint records it
    (("os.rename", r"\.writing-step-00000006$"), 3),
    (("os.rename", r"\.writing-final$"), 8),
]


@pytest.mark.slow
def test_a_run_killed_around_its_best_evaluation_resumes_from_a_whole_checkpoint(workplace):
    reference = workplace.train("between-undisturbed", *BETWEEN)
    for death, newest in DEATHS_BETWEEN:
        run = workplace.train("between-killed", *BETWEEN, expect=-9, **killed_at(*death))
        assert newest_step(run) == newest, death
    assert_same_bits(workplace.train("between-killed", *BETWEEN), reference)


@pytest.mark.slow
def test_two_processes_save_when_rank_0s_clock_says_so(workplace):
    """Both must take part, or they would wait for each other. The interval is tiny: saves follow each other at once."""
    flags = [*OFTEN, "--keep-checkpoints", 3, "--checkpoint-every", "0.000001m"]
    reference = workplace.train("two-undisturbed-None", *OFTEN, world=2)
    job = workplace.server.start(
        "train/sst2.py",
        workplace.train_flags("two-by-the-clock", *flags),
        workplace.folder / "two-by-the-clock",
        world=2,
        **killed_at("os.rename", r"\.writing-step-0000000[2-8]$", 2),
    )
    run = job.wait()
    assert run.codes[0] == -9 and newest_step(run) is not None, run.text()
    assert_same_bits(workplace.train("two-by-the-clock", *flags, world=2), reference)


VARIANTS = {
    "dropout": ["--model", "distilbert", "--max-length", 60],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16"],
    "lora": [*LORA, "--lora-dropout", 0.1],
    "qlora": ["--method", "qlora"],
    "8bit": ["--optimizer", "adamw8bit"],
    "early-stop": ["--patience", 1, "--eval-every", 2],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_goes_on_bit_for_bit(workplace, variant):
    flags = [*OFTEN, *(tiny_model(flag) if flag == "distilbert" else flag for flag in VARIANTS[variant])]
    reference = workplace.train(f"undisturbed-{variant}", *flags)
    run = workplace.train(f"killed-{variant}", *flags, expect=-9, **killed_at("os.rename", r"\.writing-step-00000004$"))
    assert newest_step(run) == 2
    assert_same_bits(workplace.train(f"killed-{variant}", *flags), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags", "deaths"),
    [
        (None, [], [(0, r"\.writing-step-00000004$", "os.rename", 2)]),
        (
            "zero2",
            [],
            [
                (1, r"\.writing-step-00000002/exp_avg-00002", "open", None),  # a rank's own shard
                (0, r"\.writing-step-00000004$", "os.rename", 2),
                (0, r"\.writing-final$", "os.rename", 8),
            ],
        ),
        ("zero3", LORA, [(1, r"\.writing-step-00000004/exp_avg-00002", "open", 2)]),
    ],
)
def test_two_processes_go_on_bit_for_bit(workplace, config, flags, deaths):
    flags = [*OFTEN, *flags, *(["--deepspeed", f"ds_configs/{config}.json"] if config else [])]
    name = f"two-killed-{config}"
    reference = workplace.train(f"two-undisturbed-{config}", *flags, world=2)
    for rank, path, event, newest in deaths:
        job = workplace.server.start(
            "train/sst2.py",
            workplace.train_flags(name, *flags),
            workplace.folder / name,
            world=2,
            rank=rank,
            **killed_at(event, path),
        )
        run = job.wait()
        assert run.codes[rank] == -9, run.text()
        assert newest_step(run) == newest
    assert_same_bits(workplace.train(name, *flags, world=2), reference)


# --- asked to stop ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_name", "event", "path", "stopped_after"),
    [
        ("SIGTERM", "open", r"metrics\.jsonl$", 2),
        ("SIGUSR1", "os.mkdir", r"\.writing-step-00000004$", 5),  # as a save begins
        ("SIGUSR1", "open", r"parameters\.json", 1),  # before the first step
    ],
)
def test_a_stopped_run_is_saved_and_goes_on(workplace, signal_name, event, path, stopped_after):
    reference, name = workplace.train_once("undisturbed", *OFTEN), f"stopped-{signal_name}-{stopped_after}"
    run = workplace.train(name, *OFTEN, expect=75, **killed_at(event, path, do=signal_name))
    state = run.read_json("state.json")
    assert state["state"] == "preempted"
    assert f"stopped by {signal_name} after step {stopped_after}" in state["reason"]
    assert newest_step(run) == stopped_after
    assert_same_bits(workplace.train(name, *OFTEN), reference)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(workplace):
    flags = [*OFTEN, "--deepspeed", "ds_configs/zero2.json"]
    own_shard = r"\.writing-step-00000002/weight-00002"
    run = workplace.train(
        "two-stopped", *flags, world=2, expect=75, rank=1, **killed_at("open", own_shard, do="SIGTERM")
    )
    assert run.read_json("state.json")["state"] == "preempted"
    # a thread writes that file, so the signal comes in this step or a later one
    assert newest_step(run) == int(run.read_json("state.json")["reason"].split("after step ")[1].split()[0]) >= 3
    workplace.train("two-stopped", *flags, world=2)


# --- a checkpoint that is not whole ---


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder):
    path = folder / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_a_file(folder):
    (folder / "progress.json").unlink()


def remove_the_marker(folder):
    (folder / "COMPLETE").unlink()


@pytest.fixture(scope="module")
def stopped(workplace):
    """Return a run stopped after step 5, with checkpoints of steps 4 and 5."""
    flags = [*OFTEN, "--keep-checkpoints", 2]
    run = workplace.train(
        "stopped", *flags, expect=75, **killed_at("os.mkdir", r"\.writing-step-00000004$", 1, "SIGTERM")
    )
    assert newest_step(run) == 5
    return run


def copy_of(run: Launch, workplace, name: str):
    return shutil.copytree(run.folder, workplace.folder / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "model.safetensors has"),
        (flip_a_byte, "optimizer.pt has changed"),
        (remove_a_file, "progress.json"),
        (remove_the_marker, "no COMPLETE marker"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(workplace, stopped, damage, words):
    name = f"damaged-by-{damage.__name__}"
    folder = copy_of(stopped, workplace, name)
    damage(step_folder(folder / "checkpoints", 5))
    run = workplace.train(name, *OFTEN)
    said = [line for line in run.text().splitlines() if "is skipped" in line]
    assert len(said) == 1 and "step-00000005" in said[0] and words in said[0]
    assert "resumes after step 4" in run.text()
    assert_same_bits(run, workplace.train_once("undisturbed", *OFTEN))


def test_a_damaged_best_checkpoint_is_never_made_into_final(workplace):
    """The newest checkpoint is whole, but final/ would come from the damaged one. To start anew would delete both."""
    flags = [*OFTEN, "--eval-every", 2, "--max-steps", 8]
    run = workplace.train(
        "best", *flags, "--learning-rate", 0, expect=75, **killed_at("open", r"metrics\.jsonl$", 8, "SIGTERM")
    )
    best = step_folder(run.folder / "checkpoints", 2)
    assert defect(best) is None
    truncate(best)
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    run = workplace.train("best", *flags, "--learning-rate", 0, expect=2)
    assert "is whole, but its best checkpoint step-00000002 is damaged (model.safetensors has" in run.text()
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == kept
    shutil.rmtree(run.folder / "checkpoints")
    run = workplace.train("best", *flags, "--learning-rate", 0)
    assert_same_bits(run, workplace.train("best-undisturbed", *flags, "--learning-rate", 0))


def test_a_checkpoint_can_be_named(workplace, stopped):
    folder = copy_of(stopped, workplace, "named")
    run = workplace.train("named", *OFTEN, "--resume", step_folder(folder / "checkpoints", 4))
    assert "resumes after step 4" in run.text()
    assert_same_bits(run, workplace.train_once("undisturbed", *OFTEN))


def test_a_named_checkpoint_that_is_not_whole_is_refused(workplace, stopped):
    folder = copy_of(stopped, workplace, "named-damaged")
    damaged = step_folder(folder / "checkpoints", 4)
    remove_the_marker(damaged)
    run = workplace.train("named-damaged", *OFTEN, "--resume", damaged, expect=2)
    assert f"--resume {damaged}: no COMPLETE marker" in run.refusal()


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_named_and_skipped(workplace, stopped):
    """The other run differs only in its seed, so nothing else in the checkpoint would show it."""
    other = workplace.train("other-seed", *OFTEN, "--seed", 1)
    folder, theirs = copy_of(stopped, workplace, "with-another-run"), newest_whole(other.folder / "checkpoints")[0]
    copied = shutil.copytree(theirs, folder / "checkpoints" / theirs.name)
    run = workplace.train("with-another-run", *OFTEN, "--resume", copied, expect=2)
    assert f"--resume {copied}: it belongs to another run" in run.refusal()
    run = workplace.train("with-another-run", *OFTEN)
    assert f"checkpoint {copied} is skipped: it belongs to another run" in run.text()
    assert "resumes after step 5" in run.text()
    assert_same_bits(run, workplace.train_once("undisturbed", *OFTEN))


# --- another run in the same folder ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rate", 2e-3], ["--learning-rate was 0.001, is 0.002"]),
        (["--seed", 1, "--batch-size", 8], ["--seed was 0, is 1", "--batch-size was 16, is 8"]),
        (LORA, ["--method was full, is lora"]),
        (["--resume", "never"], ["--resume never"]),
    ],
)
def test_flags_that_change_the_run_are_refused_and_named(workplace, stopped, flags, words):
    before = (stopped.folder / "state.json").read_bytes()
    run = workplace.train("stopped", *OFTEN, *flags, expect=2)
    assert all(word in run.refusal() for word in words), run.refusal()
    assert (stopped.folder / "state.json").read_bytes() == before


def test_changed_data_is_refused(workplace, stopped):
    content = workplace.train_file.read_text()
    try:
        workplace.train_file.write_text(content.replace("\t1\n", " indeed\t1\n", 1))
        run = workplace.train("stopped", *OFTEN, expect=2)
    finally:
        workplace.train_file.write_text(content)
    assert "was started with other inputs (data changed since)" in run.refusal()


def test_a_run_goes_on_with_the_precision_that_it_began_with(workplace, stopped):
    """Requeued to another kind of device, --precision auto would choose another one."""
    path = stopped.folder / "run.json"
    kept = path.read_bytes()
    record = json.loads(kept)
    try:
        path.write_text(json.dumps(record | {"identity": record["identity"] | {"precision": "fp16"}}))
        run = workplace.train("stopped", *OFTEN, expect=2)
    finally:
        path.write_bytes(kept)
    assert "(precision changed since): add --precision fp16 to resume it, or use another" in run.refusal()


def test_a_finished_run_says_so(workplace):
    reference = workplace.train_once("undisturbed", *OFTEN)
    before = {path: path.stat().st_mtime_ns for path in reference.folder.rglob("*")}
    run = workplace.train("undisturbed", *OFTEN)
    assert "is finished; the report is" in run.text() and len(run.text().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in reference.folder.rglob("*")} == before


def test_two_jobs_in_one_folder(workplace):
    """The first job is paused at its first metrics line until the second is refused."""
    flags = workplace.train_flags("shared", *OFTEN)
    folder = workplace.folder / "shared"
    first = workplace.server.start(
        "train/sst2.py", flags, folder, **killed_at("open", r"metrics\.jsonl$", 2, "SIGSTOP")
    )
    try:
        wait_until((folder / "metrics.jsonl").exists, "the first job is at its first metrics line")
        state = (folder / "state.json").read_text()
        second = workplace.server.start("train/sst2.py", flags, workplace.folder / "shared-second").wait()
        assert "another job is working in" in second.refusal()
        assert (folder / "state.json").read_text() == state
    finally:
        first.kill(18)  # SIGCONT
    ended = first.wait()
    assert ended.codes == (0,)
    assert_same_bits(Launch(folder, ended.codes, ended.logs), workplace.train_once("undisturbed", *OFTEN))
