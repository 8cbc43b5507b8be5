"""Test the run folder: its lock, refusals before anything is touched, and its state afterwards."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from default_settings import run_settings

from zerotune.errors import Interrupted, Preempted, Refused
from zerotune.files import file_sha256, write_json
from zerotune.run import folder
from zerotune.run.folder import RunFolder, check_earlier_run
from zerotune.run.process import describe_process, run_script, started_at
from zerotune.run.run_files import read_state
from zerotune.settings.groups import FREE_FLAGS, DataSettings
from zerotune.settings.names import final_of_run, short_name

ALONE = SimpleNamespace(num_processes=1)
FLAGS = {"learning_rate": 1e-3, "seed": 0, "resume": "auto", "tokens_per_device": 100, "output_dir": "runs/a"}


def settings(folder, typed=(), **changes):
    flags = FLAGS | changes
    return run_settings(folder, flags, typed, resume=flags["resume"])


def started(folder, state=None, typed=(), **changes):
    """Make a run folder as an earlier start would leave it."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", {"flags": FLAGS | changes, "typed_flags": list(typed)})
    if state:
        write_json(folder / "state.json", {"state": state, "reason": None})
    return folder


# --- an earlier run in the folder ---


def test_a_new_folder_and_one_without_a_run_are_free(tmp_path):
    assert check_earlier_run(settings(tmp_path / "absent")) is False
    assert check_earlier_run(settings(tmp_path, resume="never")) is False


@pytest.mark.parametrize("state", ["running", "preempted", "refused"])
def test_the_same_flags_go_on(tmp_path, state):
    assert check_earlier_run(settings(started(tmp_path, state))) is False


def test_flags_that_change_no_number_may_differ(tmp_path):
    started(tmp_path)
    changed = settings(tmp_path, tokens_per_device=7, output_dir="elsewhere", resume="some/checkpoint")
    assert check_earlier_run(changed) is False
    assert {"checkpoint_every", "log_every", "tracker", "state_file"} <= FREE_FLAGS
    assert not {"learning_rate", "batch_size", "seed", "eval_every", "method", "split_seed"} & FREE_FLAGS


def test_other_flags_are_refused_and_named_with_both_values(tmp_path):
    started(tmp_path)
    with pytest.raises(Refused) as refusal:
        check_earlier_run(settings(tmp_path, learning_rate=2e-3, seed=None))
    assert "(--learning-rate was 0.001, is 0.002, --seed was 0, is None)" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    proposed = tmp_path.with_name(f"{tmp_path.name}-learning-rate-0.002")
    assert str(refusal.value).endswith(f"or another folder: --output-dir {proposed}")
    proposed.mkdir()
    with pytest.raises(Refused, match=f"--output-dir {proposed}-2$"):
        check_earlier_run(settings(tmp_path, learning_rate=2e-3))
    with pytest.raises(Refused, match=r"-learning-rate-1.0$"):
        check_earlier_run(settings(tmp_path, learning_rate=1.0))
    with pytest.raises(Refused, match=r"-train-file-tickets\.csv$"):
        check_earlier_run(settings(tmp_path, ["train_file"], train_file="/data/Tickets.csv"))


def test_a_flag_of_a_later_version_changes_nothing_unless_it_is_typed(tmp_path):
    started(tmp_path, "preempted")
    assert check_earlier_run(settings(tmp_path, gradient_exchange="fp32")) is False
    with pytest.raises(Refused, match="--gradient-exchange was None, is bf16"):
        check_earlier_run(settings(tmp_path, ["gradient_exchange"], gradient_exchange="bf16"))


def test_flags_may_name_what_an_earlier_start_has_chosen(tmp_path):
    """The commit of a hub's model, and a precision that another kind of GPU would not choose."""
    started(tmp_path, "preempted", precision="auto", revision=None)
    record = json.loads((tmp_path / "run.json").read_text())
    write_json(tmp_path / "run.json", record | {"identity": {"model_files": "commit abc", "precision": "fp16"}})
    assert check_earlier_run(settings(tmp_path, ["precision"], precision="fp16", revision="abc")) is False
    for name, value in (("precision", "bf16"), ("revision", "def")):
        with pytest.raises(Refused, match=f"--{name} was .*, is {value}"):
            check_earlier_run(settings(tmp_path, [name], **({"precision": "auto", "revision": None} | {name: value})))


@pytest.mark.parametrize("state", ["running", "finished"])
def test_a_run_of_another_script_is_refused(tmp_path, monkeypatch, state):
    """An edited copy has the same default folder; launchers give a script's path in several forms."""
    started(tmp_path, state)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "eval").mkdir()
    monkeypatch.setattr("sys.argv", ["/home/ann/my_sst2.py", "--sample"])
    for words in ("", "-c", "'", None, "other/my_sst2.py", "'/a b/my_sst2.py' --sample"):
        write_json(tmp_path / "run.json", record | ({"command": words} if words is not None else {}))
        assert check_earlier_run(settings(tmp_path)) is (state == "finished")
    for words in ("train/sst2.py --sample", "'/a b/train/sst2.py'"):
        write_json(tmp_path / "run.json", record | {"command": words})
        line = f"{tmp_path} is a run of train/sst2.py, and this is my_sst2.py: use another --output-dir"
        with pytest.raises(Refused, match=f"^{line}$"):
            check_earlier_run(settings(tmp_path))


def test_the_same_file_by_another_path_is_left_to_the_check_of_its_content(tmp_path):
    """`start_run` compares the hashes of data and model, but not those of a finished run; an evaluation has none."""
    for name in ("old.csv", "new.csv"):
        (tmp_path / name).write_text("text,label\n")
    old, new, link = tmp_path / "old.csv", tmp_path / "new.csv", tmp_path / "link.csv"
    link.symlink_to(old)
    folder = started(tmp_path / "run", train_file=str(old))
    record = json.loads((folder / "run.json").read_text())
    for same in (os.path.relpath(old), str(link)):
        assert check_earlier_run(settings(folder, train_file=same)) is False
    for other in (str(new), str(tmp_path / "absent.csv"), None):
        with pytest.raises(Refused, match="--train-file was"):
            check_earlier_run(settings(folder, train_file=other))
    moved = settings(folder, train_file=str(old.rename(tmp_path / "moved.csv")))
    with pytest.raises(Refused, match="--train-file was"):
        check_earlier_run(moved)
    write_json(folder / "run.json", record | {"identity": {"data": {}}})
    assert check_earlier_run(moved) is False
    write_json(folder / "state.json", {"state": "finished", "reason": None})
    with pytest.raises(Refused, match="--train-file was"):
        check_earlier_run(moved)


def test_a_default_that_follows_from_a_typed_flag_is_not_reported(tmp_path):
    """--head-learning-rate is five times --learning-rate unless it is given."""
    started(tmp_path, typed=["learning_rate"], head_learning_rate=5e-3)
    now = {"learning_rate": 2e-3, "head_learning_rate": 1e-2}
    with pytest.raises(Refused, match=r"\(--learning-rate was 0.001, is 0.002\)"):
        check_earlier_run(settings(tmp_path, ["learning_rate"], **now))
    with pytest.raises(Refused, match=r"--head-learning-rate was 0.005, is 0.01"):
        check_earlier_run(settings(tmp_path, ["learning_rate", "head_learning_rate"], **now))


def test_resume_never_refuses_a_run_whatever_its_state(tmp_path):
    for state in ("running", "finished"):
        started(tmp_path, state, resume="never")
        with pytest.raises(Refused, match="--resume never"):
            check_earlier_run(settings(tmp_path, resume="never"))
        assert read_state(tmp_path)["state"] == state


def test_a_finished_run_says_so_once(tmp_path, capsys, monkeypatch):
    started(tmp_path, "finished")
    assert check_earlier_run(settings(tmp_path)) is True
    assert capsys.readouterr().out == f"{tmp_path} is finished; the report is {tmp_path / 'report.html'}\n"
    monkeypatch.setenv("RANK", "3")
    assert check_earlier_run(settings(tmp_path)) is True
    assert capsys.readouterr().out == ""


def test_what_a_finished_run_lacks_is_made_again_from_its_checkpoints(tmp_path, capsys):
    run = started(tmp_path / "run", "finished")
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(Refused, match="its final/ is gone, and no checkpoint is left to make it from"):
        check_earlier_run(settings(run))
    (run / "checkpoints" / "step-00000004" / "COMPLETE").touch()
    results = ("final/task.json", "eval/final/metrics.json", "eval/final/predictions.jsonl", "report.html")
    for name in results:
        assert check_earlier_run(settings(run)) is False
        gone = "final/" if name.startswith("final/") else name
        assert f"was finished, but its {gone} is gone: it is made again" in capsys.readouterr().out
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    assert check_earlier_run(settings(run, resume=str(run / "checkpoints"))) is True
    assert "is finished, and --resume" in capsys.readouterr().out


def test_a_finished_run_whose_file_has_changed_says_so(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n")
    source = {"path": str(file), "sha256": file_sha256(file), "rows": 0}
    split = {"task": "classify", "splits": {}, "sources": {"train": source}, "settings": asdict(DataSettings())}
    write_json(started(tmp_path / "run", "finished") / "split.json", split)
    assert check_earlier_run(settings(tmp_path / "run")) is True
    file.write_text("text,label\na,b\n")
    with pytest.raises(Refused, match=r"run is finished, and .*rows\.csv has changed since: restore it"):
        check_earlier_run(settings(tmp_path / "run"))
    file.unlink()
    assert check_earlier_run(settings(tmp_path / "run")) is True


# --- the folder while a run is at work ---


def test_a_run_that_came_first_is_noticed_under_the_lock(tmp_path):
    assert check_earlier_run(settings(tmp_path)) is False
    started(tmp_path, "preempted", seed=7)  # by another job in the meantime
    with pytest.raises(Refused, match="--seed was 7, is 0"), RunFolder(settings(tmp_path), ALONE):
        pass
    assert read_state(tmp_path)["state"] == "preempted"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (Refused("bad input"), "refused", "bad input"),
        (Preempted("stopped by SIGTERM"), "preempted", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "preempted", "interrupted: nothing was saved yet: the same command starts again"),
        (RuntimeError("a bug"), "running", None),
    ],
)
def test_leaving_sets_what_came_of_it(tmp_path, error, state, reason):
    with pytest.raises(type(error)), RunFolder(run_settings(tmp_path), ALONE):
        assert read_state(tmp_path) == {"state": "running", "reason": None}
        raise error
    assert read_state(tmp_path) == {"state": state, "reason": reason}


def test_a_full_disk_is_a_refusal_with_a_way_out(tmp_path):
    way_out = r"disk full: .*free some space and start the same command again"
    with pytest.raises(Refused, match=way_out), RunFolder(run_settings(tmp_path), ALONE):
        raise OSError(28, "No space left on device")
    assert read_state(tmp_path)["state"] == "refused" and "disk full" in read_state(tmp_path)["reason"]


def test_out_of_memory_is_a_refusal_with_the_ways_out_of_its_flags(tmp_path):
    flags = {"tokens_per_device": 8192, "activation_checkpointing": False, "method": "lora"}
    way_out = "use a smaller --tokens-per-device, --activation-checkpointing, --method qlora, or"
    with pytest.raises(Refused, match=way_out), RunFolder(run_settings(tmp_path, flags), ALONE):
        raise RuntimeError("CUDA error: out of memory")
    assert read_state(tmp_path)["state"] == "refused" and way_out in read_state(tmp_path)["reason"]


def test_the_state_is_set_even_where_no_new_file_can_be_written(tmp_path, monkeypatch):
    run = RunFolder(run_settings(tmp_path), ALONE)

    def no_space(state, reason):
        raise OSError(28, "No space left on device")

    with pytest.raises(Refused), run:
        run.write_state("running", "a longer text than the one that follows " * 9)
        monkeypatch.setattr(run, "write_state", no_space)
        raise Refused("disk full")
    assert read_state(tmp_path) == {"state": "refused", "reason": "disk full"}


def test_a_folder_has_one_writer(tmp_path):
    with RunFolder(run_settings(tmp_path), ALONE) as run:
        run.write_state("running", "first")
        with pytest.raises(Refused, match="another job is working in"), RunFolder(run_settings(tmp_path), ALONE):
            pass
        assert read_state(tmp_path)["reason"] == "first"
    with RunFolder(run_settings(tmp_path), ALONE):
        pass


def test_a_requeued_job_waits_for_the_lock_of_a_dead_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        release = threading.Timer(0.5, fcntl.flock, (held, fcntl.LOCK_UN))
        release.start()
        with RunFolder(run_settings(tmp_path), ALONE):
            assert not release.is_alive()
    monkeypatch.setattr(folder, "SECONDS_FOR_DEAD_LOCKS", 0.5)
    with (
        RunFolder(run_settings(tmp_path), ALONE),
        pytest.raises(Refused, match="another job is working"),
        RunFolder(run_settings(tmp_path), ALONE),
    ):
        pass


def test_the_lock_goes_with_a_killed_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from zerotune.run.folder import RunFolder; from zerotune.settings.groups import FlagRecord, RunSettings\n"
        "settings = RunSettings(Path(sys.argv[1]), FlagRecord({}))\n"
        "RunFolder(settings, SimpleNamespace(num_processes=1)).__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    with RunFolder(run_settings(tmp_path), ALONE):
        assert read_state(tmp_path)["state"] == "running"


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Refused), RunFolder(run_settings(tmp_path / "run"), ALONE) as run:
        run.log({"step": 1})
        run.write_json("split.json", {})
        run.update_json("run.json", a=1)
        run.forget_metrics_after(0, 0)
        raise Refused("stop")
    assert not (tmp_path / "run").exists()


def test_metrics_after_the_last_checkpoint_are_forgotten(tmp_path):
    run = RunFolder(run_settings(tmp_path), ALONE)
    for step in (1, 2, 2, 3):
        run.log({"step": step, "loss": step / 3})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    run.forget_metrics_after(2, 1)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 2]
    run.log({"step": 2, "eval_loss": 1.0})
    run.forget_metrics_after(2, 1)  # the evaluation of step 2 had been cut short
    assert "eval_loss" not in run.metrics_path.read_text()
    run.forget_metrics_after(0, 0)
    assert run.metrics_path.read_text() == ""


def test_updates_add_to_a_file(tmp_path):
    run = RunFolder(run_settings(tmp_path), ALONE)
    run.update_json("run.json", a=1, b=1)
    run.update_json("run.json", b=2)
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1, "b": 2}


@pytest.mark.parametrize("what", ["folder", "lock", "other lock"])
def test_a_folder_that_is_deleted_under_a_run_is_named(tmp_path, what):
    place = tmp_path / "run"
    words = "was deleted or replaced while this run worked in it"
    with pytest.raises(Refused, match=words), RunFolder(run_settings(place), ALONE) as run:
        run.log({"step": 1})
        if what == "folder":
            shutil.rmtree(place)
        else:
            (place / ".lock").unlink()
        if what == "other lock":
            (place / ".lock").touch()
        run.log({"step": 2})


def test_a_planted_lock_is_neither_followed_nor_emptied(tmp_path):
    private = tmp_path / "private"
    private.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(private)
    with pytest.raises(Refused, match=r"\.lock is a link"), RunFolder(run_settings(tmp_path / "run"), ALONE):
        pass
    assert private.read_text() == "mine"


def test_what_a_kill_left_of_a_write_is_cleared(tmp_path):
    (tmp_path / ".state.json.4242").write_text("{")
    with RunFolder(run_settings(tmp_path), ALONE):
        assert not list(tmp_path.glob(".state.json.*"))


@pytest.mark.parametrize("place", ["/", "~", ".", "a/checkpoints", "a/checkpoints/step-00000001", "a/final/x"])
def test_folders_that_are_no_place_for_a_run(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    started(tmp_path / "a")
    with pytest.raises(Refused, match="--output-dir"):
        check_earlier_run(settings(Path(place).expanduser()))
    assert check_earlier_run(settings(tmp_path / "a" / "b")) is False


# --- how a script ends ---


def ending(error, state_file=None):
    """Return the exit status of a script whose main raises."""

    def main(args):
        if error:
            raise error

    try:
        run_script(main, Namespace(state_file=state_file))
    except SystemExit as exit:
        return exit.code
    return 0


def test_exit_statuses(tmp_path, capsys):
    assert ending(None) == 0
    assert ending(Preempted("saved")) == 75 and capsys.readouterr().out == "saved\n"
    assert ending(Refused("the rule:\n  found 3")) == 2
    assert capsys.readouterr().err == "refused: the rule: found 3\n"
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())


def test_ctrl_c_after_a_save_has_a_status_of_its_own(capsys):
    assert ending(Interrupted("stopped by SIGINT after step 3 and saved")) == 130
    assert capsys.readouterr().out == "stopped by SIGINT after step 3 and saved\n"


def test_a_refusal_writes_its_state_where_asked(tmp_path):
    ending(Refused("the rule"), tmp_path / "state.json")
    assert json.loads((tmp_path / "state.json").read_text()) == {"state": "refused", "reason": "the rule"}


def test_of_the_ranks_of_a_node_the_first_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ending(Refused("the rule"), tmp_path / "state.json") == 2
    assert capsys.readouterr() == ("", "") and not (tmp_path / "state.json").exists()


def test_a_node_that_lacks_what_the_first_has_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ending(Refused("x.tsv: no such file"), tmp_path / "state.json") == 2
    line = f"rank 8 on {platform.node()}: x.tsv: no such file"
    assert capsys.readouterr().err == f"refused: {line}\n"
    assert json.loads((tmp_path / "state.json").read_text()) == {"state": "refused", "reason": line}


# --- small things ---


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("runs/sst2-a-full/final", "sst2-a-full"),
        ("./models/My Model/", "my-model"),
        ("/cache/hub/models--org--Tiny-Instruct/snapshots/0a1b2c/", "tiny-instruct"),
        ("final", "model"),
        ("..", "model"),
    ],
)
def test_folder_names(model, name):
    assert short_name(model) == name


def test_a_slash_at_the_end_makes_no_other_model(tmp_path):
    (tmp_path / "final").mkdir()
    assert final_of_run(f"{tmp_path}/final/") == f"{tmp_path}/final" and final_of_run("org/name") == "org/name"


def test_the_start_of_this_process_is_known():
    began = started_at()
    assert time.time() - 24 * 3600 < began < time.time()
    # The kernel counts in ticks of 10 ms, and the system's uptime is read a moment later.
    assert abs(started_at() - began) < 0.1


def test_the_process_is_described():
    described = describe_process()
    assert described["versions"].keys() >= {"python", "torch", "zerotune"} and all(described["versions"].values())
    assert described["command"] == " ".join(sys.argv)
