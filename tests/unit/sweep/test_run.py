"""Test several runs from one command: which runs start, which do not start again, and signals and failures."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from zerotune.errors import Preempted, Refused
from zerotune.settings.flags import train_parser
from zerotune.sweep.run import run_all, sole_user
from zerotune.tasks.sst2 import SST2

REPOSITORY = Path(__file__).parents[3]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
FAKE = f"{sys.executable} {REPOSITORY / 'tests/fake_run.py'}"


class Place:
    """A sweep's folder; its runs are runs of tests/fake_run.py."""

    def __init__(self, folder: Path):
        self.folder, self.sweep = folder / "parent", folder / "rates.txt"

    def flags(self, *more: str) -> list[str]:
        return ["--launcher", FAKE, "--output-dir", str(self.folder), *more]

    def start(self, *more: str) -> None:
        run_all(train_parser("", SST2).read(self.flags(*more)).runs)

    def told(self, **fates: str) -> None:
        self.folder.mkdir(exist_ok=True)
        names = {name.replace("_is_", "-"): fate for name, fate in fates.items()}
        (self.folder / ".fates.json").write_text(json.dumps(names))

    @property
    def calls(self) -> list[str]:
        """Return the names of the runs that have started since the last call."""
        path = self.folder / "calls.txt"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/sst2.py"])
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield Place(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_finished_runs_are_not_repeated_and_seeds_may_be_added(place, capsys):
    place.start("--seeds", "0", "1")
    assert place.calls == ["seed-0", "seed-1"] and place.read("state.json") == {"state": "finished", "reason": None}
    said = capsys.readouterr().out
    assert "run 2 of 2: seed-1\n" in said and f"report: {place.folder / 'report.html'}" in said
    place.start("--seeds", "0", "1")
    assert place.calls == [] and "run 1 of 2: seed-0 is finished" in capsys.readouterr().out
    place.start("--seeds", "0", "1", "2")
    assert place.calls == ["seed-2"] and place.read("summary.json")["seeds"] == [0, 1, 2]


def test_other_flags_or_other_runs_are_refused_before_anything_starts(place):
    place.start("--seeds", "0", "1")
    assert place.calls
    for more, words in [
        (["--seeds", "0", "1", "--epochs", "2"], "--epochs was None, is 2"),
        (["--seeds", "0", "1", "--preset", "distilbert-sst2"], "--batch-size was 32, is 16"),
    ]:
        with pytest.raises(Refused, match=f"holds other runs .*{words}"):
            place.start(*more)
    place.start("--seeds", "0", "1", "--log-every", "1")  # this flag changes no number
    assert place.calls == [] and place.read("state.json")["state"] == "finished"


def test_a_command_may_name_some_of_the_runs_and_the_summary_is_of_all(place, tmp_path):
    place.start("--seeds", "0", "1", "2")
    assert place.calls == ["seed-0", "seed-1", "seed-2"]
    place.start("--seeds", "2", "5")  # as a task of an array that was submitted before or after seeds were added
    assert place.calls == ["seed-5"] and list(place.read("sweep.json")["runs"]) == [f"seed-{n}" for n in (0, 1, 2, 5)]
    assert place.read("summary.json")["settings"][0]["runs"] == ["seed-0", "seed-1", "seed-2", "seed-5"]
    place.start("--seeds", "1")
    assert place.calls == [] and place.read("summary.json")["seeds"] == [0, 1, 2, 5]


def test_a_command_may_name_some_values_of_a_sweep(place, tmp_path):
    rates = tmp_path / "rates.txt"
    rates.write_text("--learning-rate 0.1 0.2\n--batch-size 2 4\n")
    place.start("--sweep", str(rates))
    rates.write_text("--learning-rate 0.2 0.3\n--batch-size 2 4\n")
    place.start("--sweep", str(rates))
    assert place.calls[4:] == ["learning_rate-0.3_batch_size-2", "learning_rate-0.3_batch_size-4"]
    summary = place.read("summary.json")
    assert summary["sweep"] == {"learning_rate": ["0.1", "0.2", "0.3"], "batch_size": ["2", "4"]}
    assert len(summary["settings"]) == 6 and summary["settings"][5]["setting"]["learning_rate"] == "0.3"
    rates.write_text("--batch-size 2 4\n--learning-rate 0.2 0.3\n")
    with pytest.raises(Refused, match="--sweep had 'learning_rate', 'batch_size', has 'batch_size', "):
        place.start("--sweep", str(rates))


def test_a_sweep_of_one_seed_keeps_it(place, tmp_path):
    (tmp_path / "rates.txt").write_text("--learning-rate 0.1 0.2\n")
    sweep = ("--sweep", str(tmp_path / "rates.txt"), "--seed")
    place.start(*sweep, "3")
    with pytest.raises(Refused, match=r"holds other runs .*--seed was 3, is 4"):
        place.start(*sweep, "4")


@pytest.mark.parametrize(
    ("name", "words"), [("run.json", "holds a single run"), ("final", "holds 'final' but no sweep.json")]
)
def test_a_folder_that_holds_something_else(place, name, words):
    (place.folder / name).mkdir(parents=True)
    with pytest.raises(Refused, match=words):
        place.start("--seeds", "0")
    assert place.calls == [] and not (place.folder / "sweep.json").exists()


def test_a_run_that_is_refused_or_fails_is_named_and_loses_none_of_the_others(place, capfd):
    place.told(**{"seed_is_0": "early", "seed_is_1": "refused", "seed_is_3": "crash"})
    with pytest.raises(SystemExit) as ended:
        place.start("--seeds", "0", "1", "2", "3", "4")
    assert ended.value.code == 1 and place.calls == [f"seed-{number}" for number in range(5)]
    out, err = capfd.readouterr()
    assert "values of 2 of 5 seeds" in out
    line = err.splitlines()[-1]
    assert line.startswith(
        "3 of 5 runs are not finished: seed-0 was refused (bad input); seed-1 was refused (so it was "
    )
    assert "seed-3 failed with status 1" in line and not list(place.folder.glob(".*state*"))
    reasons = {run["name"]: run["reason"] for run in place.read("summary.json")["runs"]}
    assert reasons["seed-3"] == "failed with status 1" and reasons["seed-4"] is None
    place.told(**{"seed_is_1": "refused"})
    with pytest.raises(Refused, match=r"1 of 5 runs are not finished: seed-1 was refused \(so it was told\)"):
        place.start("--seeds", "0", "1", "2", "3", "4")
    assert place.calls == ["seed-0", "seed-1", "seed-3"] and place.read("state.json")["state"] == "refused"
    place.told()
    place.start("--seeds", "0", "1", "2", "3", "4")
    assert place.calls == ["seed-1"] and place.read("state.json")["state"] == "finished"


def test_nothing_is_summarised_where_nothing_is_finished(place):
    place.told(**{"seed_is_0": "early"})
    with pytest.raises(Refused, match=r"none of 1 run is finished: seed-0 was refused \(bad input\)"):
        place.start("--seeds", "0")
    assert place.read("state.json")["state"] == "refused"


def test_a_run_that_was_stopped_stops_the_others(place):
    place.told(**{"seed_is_1": "stop"})
    with pytest.raises(Preempted, match="seed-1 was stopped: the same command continues there"):
        place.start("--seeds", "0", "1", "2")
    assert place.calls == ["seed-0", "seed-1"] and place.read("state.json")["state"] == "preempted"


def test_a_run_that_crashes_before_its_folder_is_open_was_not_stopped(place):
    """Its state.json is of the earlier start, which was preempted."""
    place.told(**{"seed_is_1": "stop"})
    with pytest.raises(Preempted):
        place.start("--seeds", "0", "1", "2")
    place.told(**{"seed_is_1": "early crash"})
    with pytest.raises(SystemExit):
        place.start("--seeds", "0", "1", "2")
    reasons = {run["name"]: run["reason"] for run in place.read("summary.json")["runs"]}
    assert reasons == {"seed-0": None, "seed-1": "failed with status 1", "seed-2": None}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_run_in_progress_and_no_other_is_started(place, number, status):
    place.told(**{"seed_is_1": "wait"})
    process = subprocess.Popen(
        [sys.executable, "train/sst2.py", *place.flags("--seeds", "0", "1", "2")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until((place.folder / "ready").exists, "the run in progress")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert out.splitlines()[-1].startswith(f"stopped by {number.name}: the same command continues with the runs that")
    assert place.read("state.json")["state"] == "preempted" and place.calls == ["seed-0", "seed-1"]
    if number != signal.SIGUSR1:  # SIGUSR1 ends the fake run at once
        assert place.read("seed-1/state.json")["state"] == "preempted"
    place.told()
    place.start("--seeds", "0", "1", "2")
    assert place.calls == ["seed-1", "seed-2"]


def test_a_killed_command_leaves_no_run_behind(place):
    place.told(**{"seed_is_0": "wait"})
    command = [sys.executable, "train/sst2.py", *place.flags("--seeds", "0", "1")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((place.folder / "ready").exists, "the run in progress")
    process.kill()
    process.wait()
    wait_until((place.folder / "seed-0/state.json").exists, "the run's end")
    assert place.read("seed-0/state.json")["state"] == "preempted"


def test_a_second_command_in_the_folder_is_refused(place):
    place.told(**{"seed_is_0": "wait"})
    command = [sys.executable, "train/sst2.py", *place.flags("--seeds", "0", "1")]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until((place.folder / "ready").exists, "the run in progress")
        with pytest.raises(Refused, match="another job is working in"):
            place.start("--seeds", "0", "1")
    finally:
        first.terminate()
        assert first.wait(timeout=60) == 75
    assert place.calls == ["seed-0"]


def test_a_refused_command_does_not_change_what_the_first_one_summarises(place):
    place.start("--seeds", "0")
    with sole_user(place.folder), pytest.raises(Refused, match="another job is working in"):
        place.start("--seeds", "0", "7")
    assert list(place.read("sweep.json")["runs"]) == ["seed-0"]


def test_runs_continue_under_a_version_with_another_flag(place):
    place.start("--seeds", "0")
    assert place.calls == ["seed-0"]
    record = place.read("sweep.json")
    del record["flags"]["compile"]
    (place.folder / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="--compile was None, is none"):
        place.start("--seeds", "0", "1", "--compile", "none")
    place.start("--seeds", "0", "1")
    assert place.calls == ["seed-1"] and place.read("sweep.json")["flags"]["compile"] == "auto"


def test_a_plan_lists_the_runs_and_writes_nothing(place, capfd):
    place.sweep.write_text("--learning-rate 0.1 0.2\n")
    place.folder.mkdir()
    place.start("--sweep", str(place.sweep), "--seeds", "0", "1", "--plan")
    said = capfd.readouterr().out
    assert said.startswith(f"4 runs of train/sst2.py in {place.folder}, one after the other:\n")
    assert "  learning_rate-0.2_seed-1: --learning-rate 0.2 --seed 1 (not started)\n" in said
    assert "the first one, learning_rate-0.1_seed-0:" in said and place.calls == ["learning_rate-0.1_seed-0"]
    assert not (place.folder / "sweep.json").exists()


@pytest.mark.parametrize(
    ("environment", "parent", "words"),
    [
        ({"WORLD_SIZE": "2"}, "", "--launcher 'accelerate launch --num_processes 2'"),
        (
            {},
            "python /bin/accelerate launch --num_processes 4 train/sst2.py --seeds 1",
            "'accelerate launch --num_proc",
        ),
        ({"WORLD_SIZE": "2"}, "python /b/torchrun --nproc_per_node 2 train/sst2.py x", "'torchrun --nproc_per_node 2'"),
        ({"WORLD_SIZE": "1"}, "python /bin/accelerate launch --num_processes 1 train/sst2.py --seeds 1", None),
    ],
)
def test_a_launcher_of_several_processes_is_refused_with_the_flag_to_use(
    place, monkeypatch, environment, parent, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("zerotune.sweep.run.parent_command", lambda: parent)
    if words is None:
        place.start("--seeds", "0")
        return
    with pytest.raises(Refused, match=f"start python train/sst2.py with the same flags and --launcher .*{words[-20:]}"):
        place.start("--seeds", "0")


def test_a_run_does_not_inherit_the_launchers_variables(place, monkeypatch):
    code = "import os, sys; from pathlib import Path; Path(sys.argv[1]).write_text(' '.join(sorted(os.environ)))"
    file = place.sweep
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(Refused):
        run_all(
            train_parser("", SST2)
            .read(
                [
                    "--seeds",
                    "0",
                    "--output-dir",
                    str(place.folder),
                    "--launcher",
                    f'{sys.executable} -c "{code}" {file}',
                ]
            )
            .runs
        )
    found = file.read_text().split()
    assert "PATH" in found and not {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & {*found}
    assert "ACCELERATE_MIXED_PRECISION" not in found
