"""Damaged or foreign run and evaluation folders: one line, and nothing in them is overwritten."""

import json
from argparse import Namespace
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from default_settings import run_settings

from zerotune.errors import Refused
from zerotune.metrics.evaluations import read_evaluation
from zerotune.report.comparison import write_comparison
from zerotune.run.folder import RESULTS, RunFolder, check_earlier_run
from zerotune.run.process import run_script
from zerotune.settings.groups import DataSettings
from zerotune.tasks.sources import read_split, split_of_run

FLAGS = {"seed": 0}
ALONE = SimpleNamespace(num_processes=1)
SPLIT = {"task": "sst2", "splits": {}, "sources": {}, "settings": asdict(DataSettings())}


# --- run folders ---


def finished_run(folder):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"flags": FLAGS}))
    (folder / "state.json").write_text('{"state": "finished"}')
    return folder


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"flags": null}'])
def test_a_damaged_run_json(tmp_path, content):
    (finished_run(tmp_path) / "run.json").write_text(content)
    with pytest.raises(Refused, match=r"run.json is damaged"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


def test_a_damaged_state_json(tmp_path):
    (finished_run(tmp_path) / "state.json").write_text("{")
    with pytest.raises(Refused, match=r"state.json is damaged"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


def test_a_lost_final_is_made_again_from_the_checkpoints(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert check_earlier_run(run_settings(tmp_path, FLAGS)) is False
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "task.json").touch()
    assert check_earlier_run(run_settings(tmp_path, FLAGS)) is True


@pytest.mark.parametrize("name", RESULTS)
def test_files_of_something_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(Refused, match=f"holds {name} but no run.json"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_run_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    assert check_earlier_run(run_settings(tmp_path / name, FLAGS)) is False
    with pytest.raises(Refused, match="cannot be written"), RunFolder(run_settings(tmp_path / name), ALONE):
        pass


def test_a_damaged_split_json(tmp_path):
    for content, words in (
        ({"splits": {}}, "damaged or of another version of zerotune .sources, settings."),
        ({**SPLIT, "settings": {**SPLIT["settings"], "fold": 3}}, r"another version of zerotune \(fold\)"),
    ):
        (tmp_path / "split.json").write_text(json.dumps(content))
        with pytest.raises(Refused, match=words):
            read_split(tmp_path / "split.json")


def test_the_run_of_a_final_named_by_a_dot(tmp_path, monkeypatch):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "task.json").write_text("{}")
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    monkeypatch.chdir(tmp_path / "final")
    assert split_of_run(".", "sst2") == SPLIT
    assert split_of_run(".", "imdb") is None


def test_a_run_that_was_refused_before_it_had_anything_may_begin_otherwise(tmp_path):
    flags = FLAGS | {"seed": 9}
    (tmp_path / "run.json").write_text(json.dumps({"flags": flags}))
    for state in ("running", "refused"):
        (tmp_path / "state.json").write_text(json.dumps({"state": state, "reason": "too many --shots"}))
        if state == "refused":
            assert check_earlier_run(run_settings(tmp_path, FLAGS)) is False
            (tmp_path / "checkpoints").mkdir()
        with pytest.raises(Refused, match="--seed was 9, is 0"):
            check_earlier_run(run_settings(tmp_path, FLAGS))


@pytest.mark.parametrize(("path", "is_written"), [("new/state.json", True), ("folder", False)])
def test_a_refusal_reaches_the_state_file_or_says_why_not(tmp_path, capsys, path, is_written):
    (tmp_path / "folder").mkdir()

    def refuse(args):
        raise Refused("bad input")

    with pytest.raises(SystemExit) as stopped:
        run_script(refuse, Namespace(state_file=tmp_path / path))
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("refused: bad input") and line.count("\n") == 1
    assert (tmp_path / path).is_file() is is_written and ("--state-file" in line) is not is_written


def test_an_interruption_is_one_line(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_script(interrupted, Namespace())
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith("interrupted")


# --- comparisons ---


def evaluation(folder, **changes):
    """An evaluation folder; a change replaces a file's content."""
    folder.mkdir()
    files = {"metrics": '{"task": "sst2", "count": 1}', "predictions": '{"id": "a", "label": 1, "prediction": 1}\n'}
    files |= changes
    (folder / "metrics.json").write_text(files["metrics"])
    (folder / "predictions.jsonl").write_text(files["predictions"])
    return folder


@pytest.mark.parametrize(
    "change",
    [{"predictions": "[1]\n"}, {"predictions": '{"id": "a"}\n'}, {"predictions": "junk\n"}, {"metrics": "[]"},
     {"metrics": '{"count": null}'}],
)  # fmt: skip
def test_evaluations_of_another_form(tmp_path, change):
    read_evaluation(evaluation(tmp_path / "good"))
    with pytest.raises(Refused):
        read_evaluation(evaluation(tmp_path / "bad", **change))


def test_a_score_that_is_no_number(tmp_path):
    folders = [evaluation(tmp_path / name, metrics='{"task": "sst2", "accuracy": "x"}') for name in "ab"]
    with pytest.raises(Refused, match="has accuracy"):
        write_comparison(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
