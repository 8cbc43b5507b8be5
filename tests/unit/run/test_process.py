"""Test the checks before a script begins, and its message about a full disk."""

import errno
import os
from argparse import Namespace

import pytest
from safetensors import SafetensorError

from zerotune.errors import BrokenMachine, Refused
from zerotune.run import process
from zerotune.run.process import ALLOCATOR_VARIABLES, check_launcher, check_names, run_script, say_how_far


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"},
        {"SLURM_RESTART_COUNT": "", "SLURM_GPUS_ON_NODE": "0", "SLURM_STEP_NUM_TASKS": ""},
    ],
)
def test_launchers_that_are_understood(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "y"}, "WORLD_SIZE is 'y', wanted a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', wanted a whole number from 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', wanted"),
        ({"RANK": "-1"}, "RANK is '-1', wanted a whole number from 0"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0', wanted"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', wanted"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT is 'x', wanted a whole number from 0"),
        ({"SLURM_GPUS_ON_NODE": "gpu:4"}, "SLURM_GPUS_ON_NODE is 'gpu:4', wanted"),
        ({"ZEROTUNE_PROCESSES_PER_NODE": "all"}, "ZEROTUNE_PROCESSES_PER_NODE is 'all', wanted"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_launcher_variables_that_are_no_numbers(environment, words):
    with pytest.raises(Refused, match=words):
        check_launcher(environment)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "SLURM_RESTART_COUNT"])
def test_the_refusal_is_said_whatever_the_rank(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "y")
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda args: pytest.fail("main was called"), Namespace())
    assert stopped.value.code == 2 and f"refused: {'rank y' if name == 'RANK' else name}" in capsys.readouterr().err


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    check_names(["train/sst2.py", "--output-dir", "runs/\u00e9"])
    with pytest.raises(Refused, match=r"'runs/a\\udcff' is not UTF-8: rename"):
        check_names(["train/sst2.py", "--output-dir", os.fsdecode(b"runs/a\xff")])
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(Refused, match=r"a\\udcff' is not UTF-8"):
        check_names([])


def test_a_working_folder_that_was_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(Refused, match="the working folder cannot be used"):
        check_names([])


def test_the_arguments_of_a_script_may_be_a_list(capsys):
    def main(words):
        raise MemoryError

    with pytest.raises(SystemExit) as stopped:
        run_script(main, ["a", "list"])
    assert stopped.value.code == 2 and "refused: " in capsys.readouterr().err


def test_a_disk_that_does_not_answer_is_no_refusal(capsys, tmp_path):
    """A refusal would end a job for good; this status has it tried again."""

    def main(args):
        raise OSError(errno.ESTALE, "Stale file handle", "runs/a")

    with pytest.raises(SystemExit) as stopped:
        run_script(main, Namespace(state_file=tmp_path / "state.json"))
    assert stopped.value.code == 1 and not (tmp_path / "state.json").exists()
    assert capsys.readouterr().err.startswith("error: [Errno 116] Stale file handle: 'runs/a': start the same command")


def ending(error, **flags):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script(main, Namespace(**flags))
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "refused: disk full: "),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "out/metrics.json"), "refused: disk quota exceeded: "),
        (OSError(errno.EFBIG, "File too large"), "refused: file too large: "),
        (
            SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
            "refused: file too large",
        ),
    ],
)
def test_a_disk_that_takes_no_more_is_a_refusal_in_any_script(capsys, error, words):
    assert ending(error) == 2
    line = capsys.readouterr().err
    assert line.startswith(words) and line.count("\n") == 1


def test_out_of_memory_is_a_refusal_in_any_script(capsys):
    assert ending(RuntimeError("CUDA error: out of memory"), tokens_per_device=8192) == 2
    line = "refused: out of memory (CUDA error: out of memory): use a smaller --tokens-per-device, or a device with"
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ({"PYTORCH_HIP_ALLOC_CONF": "backend:native"}, {"PYTORCH_HIP_ALLOC_CONF": "backend:native"}),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(given, found, monkeypatch):
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what a script sets
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = {}
    run_script(lambda args: seen.update(os.environ), Namespace())
    assert {name: seen[name] for name in ALLOCATOR_VARIABLES if name in seen} == found


def test_another_error_is_a_bug():
    def main(args):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        run_script(main, Namespace())


def test_a_rank_that_found_nobody_speaks_for_itself(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    state_file = tmp_path / "state.json"
    assert ending(BrokenMachine("nobody came"), state_file=state_file) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: rank 3 on ") and said.endswith(": nobody came\n")
    assert not state_file.exists(), "a job is to try again"


def test_a_long_reading_says_how_far_it_is(monkeypatch, capsys):
    """A thousand rows take a second here; there is a line after 5, 10 and 20 seconds."""
    clock = iter(range(1000))
    monkeypatch.setattr(process.time, "monotonic", lambda: next(clock))
    assert list(say_how_far(range(30_000), "reading a.csv", "rows")) == list(range(30_000))
    expected = [f"reading a.csv: {number:,} rows so far" for number in (4000, 9000, 19000)]
    assert capsys.readouterr().out.splitlines() == expected
    assert len(list(say_how_far(range(4), "searching", "rows", size=10_000))) == 4
    assert capsys.readouterr().out == ""
    assert len(list(say_how_far(range(6), "searching", "rows", size=10_000))) == 6
    assert capsys.readouterr().out == "searching: 40,000 rows so far\n"
    assert len(list(say_how_far(range(6), "tokenising", "texts", 2048, total=12_000))) == 6
    assert capsys.readouterr().out == "tokenising: 8,192 of 12,000 texts\n"
    monkeypatch.setenv("RANK", "1")
    assert len(list(say_how_far(range(9000), "reading a.csv", "rows"))) == 9000
    assert capsys.readouterr().out == ""
