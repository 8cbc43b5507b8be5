"""Damaged or foreign run and evaluation folders are refused in one line, and nothing in them is overwritten."""

import hashlib
import json
from argparse import Namespace
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from default_settings import run_settings

from zerotune.errors import Refused
from zerotune.metrics.evaluations import read_evaluation
from zerotune.report.comparison import read_comparison, write_comparison
from zerotune.run.folder import RESULTS, RunFolder, check_earlier_run
from zerotune.run.process import run_script
from zerotune.run.run_files import read_metrics_lines, read_split
from zerotune.settings.groups import DataSettings
from zerotune.tasks.split_file import split_of_run

FLAGS = {"seed": 0}
ALONE = SimpleNamespace(num_processes=1)
SPLIT = {"task": "sst2", "splits": {}, "sources": {"train": {"sha256": "5a"}}, "settings": asdict(DataSettings())}


# --- run folders ---


def finished_run(folder):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"flags": FLAGS}))
    (folder / "state.json").write_text('{"state": "finished"}')
    return folder


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"flags": null}', '{"flags": {}, "typed_flags": "seed"}'])
def test_a_damaged_run_json(tmp_path, content):
    (finished_run(tmp_path) / "run.json").write_text(content)
    with pytest.raises(Refused, match=r"run.json is damaged"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


@pytest.mark.parametrize("content", ["{", "{}", '{"state": "lost"}', '{"state": "finished", "reason": 7}'])
def test_a_damaged_state_json(tmp_path, content):
    (finished_run(tmp_path) / "state.json").write_text(content)
    with pytest.raises(Refused, match=r"state.json is damaged"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


def test_a_lost_final_is_made_again_from_the_checkpoints(tmp_path):
    finished_run(tmp_path)
    for name in ("checkpoints/step-00000004/COMPLETE", "eval/final/metrics.json", "eval/final/predictions.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "report.html").touch()
    assert check_earlier_run(run_settings(tmp_path, FLAGS)) is False
    (tmp_path / "final").mkdir()
    weights = tmp_path / "final" / "model.safetensors"
    weights.write_bytes(b"weights")
    record = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    (tmp_path / "final" / "task.json").write_text(json.dumps({"files": {weights.name: record}}))
    assert check_earlier_run(run_settings(tmp_path, FLAGS)) is True
    for damaged in (b"", b"weightS", None):
        weights.unlink() if damaged is None else weights.write_bytes(damaged)
        assert check_earlier_run(run_settings(tmp_path, FLAGS)) is False


@pytest.mark.parametrize("name", ["checkpoints", "final", "eval"])
def test_a_file_where_a_run_has_a_folder(tmp_path, name):
    (finished_run(tmp_path) / name).touch()
    with pytest.raises(Refused, match=f"/{name} is a file, not a folder: delete it"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


def test_a_run_json_without_the_id_that_its_checkpoints_carry(tmp_path):
    finished_run(tmp_path)
    with RunFolder(run_settings(tmp_path, FLAGS), ALONE):
        pass  # no checkpoint was saved
    (tmp_path / "checkpoints").mkdir()
    with (
        pytest.raises(Refused, match=r"run.json is damaged \(run_id is missing\)"),
        RunFolder(run_settings(tmp_path, FLAGS), ALONE),
    ):
        pass


@pytest.mark.parametrize(
    "line", ['{"loss": 1.0}', '{"step": -1}', '{"step": 2, "loss": "x"}', '{"step": 2, "loss": NaN}']
)
def test_a_damaged_line_of_metrics_jsonl(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "grad_norm": null}\n' + line + "\n")
    with pytest.raises(Refused, match=r"metrics.jsonl line 2 is damaged"):
        read_metrics_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", RESULTS)
def test_files_of_something_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(Refused, match=f"holds '{name}' but no run.json"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


def test_a_folder_of_other_files_is_no_place_for_a_run_and_one_with_a_log_is(tmp_path):
    (tmp_path / "job-12.log").touch()
    (tmp_path / ".lock").touch()
    (tmp_path / "state.json").write_text('{"state": "refused", "reason": "-"}')
    assert check_earlier_run(run_settings(tmp_path, FLAGS)) is False
    for name in ("index.md", "train.md"):
        (tmp_path / name).touch()
    with pytest.raises(Refused, match=r"holds 'index.md', 'train.md' but no run.json, so they belong to no run"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_run_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    assert check_earlier_run(run_settings(tmp_path / name, FLAGS)) is False
    with pytest.raises(Refused, match="cannot be written"), RunFolder(run_settings(tmp_path / name), ALONE):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": {}}, "sources.train is missing"),
        ({"sources": {"train": {"sha256": 7}}}, "sources.train.sha256 is 7, wanted a valid string"),
        ({"splits": {"test": {"count": 3}}}, "splits.test.ids_sha256 is missing"),
        ({"settings": {**SPLIT["settings"], "fold": 3}}, "settings.fold is not known"),
        ({"settings": {**SPLIT["settings"], "test_size": -1}}, "settings.test_size is -1, wanted greater than"),
        ({"settings": {**SPLIT["settings"], "sample": "no"}}, "settings.sample is 'no', wanted a valid boolean"),
        ({"settings": {"sample": True}}, "settings.dataset is missing"),
    ],
)
def test_a_damaged_split_json(tmp_path, change, words):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT | change))
    with pytest.raises(Refused, match=rf"split.json is damaged \({words}.*: restore it, or copy final/"):
        read_split(tmp_path / "split.json")


DAMAGE = [
    ("split.json", {"task": "sst2", "splits": {"test": 3}}, "splits.test is 3, wanted"),
    ("parameters.json", {"before": {}}, "before.total is missing"),
    ("metrics.jsonl", {"step": 1, "loss": "x"}, "loss is 'x', wanted a valid number"),
    ("metrics.jsonl", None, "its last line has no end"),
    ("run.json", {"flags": FLAGS, "timings": {"train_s": "x"}}, "timings.train_s is 'x', wanted a valid number"),
    ("run.json", {"flags": FLAGS, "versions": 7}, "versions is 7, wanted a valid dictionary"),
]


@pytest.mark.parametrize(("name", "record", "words"), DAMAGE)
def test_all_records_of_a_finished_run_are_looked_at_when_it_is_started_again(tmp_path, name, record, words):
    finished_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert check_earlier_run(run_settings(tmp_path, FLAGS)) is True
    (tmp_path / name).write_text(json.dumps(record) + "\n" if record else '{"step": 1}\n{"st')
    with pytest.raises(Refused, match=rf"{name} .*is damaged \({words}"):
        check_earlier_run(run_settings(tmp_path, FLAGS))


@pytest.mark.parametrize(("name", "record", "words"), DAMAGE)
def test_and_when_its_final_is_evaluated(tmp_path, name, record, words):
    (finished_run(tmp_path) / "final").mkdir()
    (tmp_path / "final" / "task.json").write_text("{}")
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    (tmp_path / name).write_text(json.dumps(record) + "\n" if record else '{"step": 1}\n{"st')
    with pytest.raises(Refused, match=rf"{name} .*is damaged \({words}"):
        split_of_run(str(tmp_path / "final"), "sst2")


def test_and_when_it_is_compared(tmp_path):
    scored = '{"task": "sst2", "setting": "head", "count": 1, "accuracy": 1.0, "accuracy_ci95": [0.2, 1.0]}'
    folders = []
    for name in "ab":
        (finished_run(tmp_path / name) / "eval").mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        folders.append(evaluation(tmp_path / name / "eval" / "final", metrics=scored))
    write_comparison(read_comparison(folders), tmp_path / "out")
    (tmp_path / "b" / "parameters.json").write_text("[]")
    with pytest.raises(Refused, match=r"b/parameters.json is damaged \(it is \[\], wanted a valid dictionary\)"):
        write_comparison(read_comparison(folders), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_run_of_a_final_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "task.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(tmp_path / "disk")
    (tmp_path / "run" / "split.json").write_text(json.dumps(SPLIT))
    assert split_of_run(str(tmp_path / "run" / "final"), "sst2") == SPLIT
    assert split_of_run(str(tmp_path / "disk"), "sst2") is None  # belongs to no run


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


METRICS = '{{"task": "sst2", "setting": "classifier head", "count": {}}}'


def evaluation(folder, **changes):
    """Make an evaluation folder; a change replaces a file's content."""
    folder.mkdir()
    files = {"metrics": METRICS.format("1"), "predictions": '{"id": "a", "label": 1, "prediction": 1}\n'}
    files |= changes
    (folder / "metrics.json").write_text(files["metrics"])
    (folder / "predictions.jsonl").write_text(files["predictions"])
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"predictions": "[1]\n"}, r"predictions.jsonl line 1 is damaged \(it is \[1\], wanted a valid dictionary\)"),
        ({"predictions": '{"id": "a"}\n'}, r"line 1 is damaged \(label is missing\)"),
        ({"predictions": "junk\n"}, "line 1 is damaged .Expecting value"),
        ({"predictions": '{"id": ["a"], "label": 1, "prediction": 1}\n'}, r"\(id is \['a'\], wanted a valid string\)"),
        ({"predictions": '{"id": "a", "label": 1.5, "prediction": 1}\n'}, r"\(label is 1.5, wanted a valid integer or"),
        ({"predictions": '{"id": "a", "label": 1, "prediction": {}}\n'}, r"\(prediction is {}, wanted a valid integer"),
        ({"predictions": '{"id": "a", "label": 1, "prediction": 1, "scores": [NaN]}\n'}, "NaN is not a JSON number"),
        ({"metrics": "[]"}, r"metrics.json is damaged \(it is \[\], wanted a valid dictionary\)"),
        ({"metrics": METRICS.format("null")}, r"\(count is None, wanted a valid integer\)"),
        ({"metrics": METRICS.format('1, "accuracy": "x"')}, r"\(accuracy is 'x', wanted a valid number\)"),
        ({"metrics": METRICS.format('1, "accuracy": 1e400, "accuracy_ci95": [0, 1]')}, "1e400 is not a JSON number"),
        (
            {"metrics": METRICS.format('1, "accuracy": -0.5, "accuracy_ci95": [0, 1]')},
            "accuracy is -0.5, wanted gr",
        ),
        ({"metrics": METRICS.format('1, "f1": 0.5, "f1_ci95": [0]')}, r"\(f1_ci95 is \[0\], wanted"),
        ({"metrics": METRICS.format('1, "f1": 0.5, "f1_ci95": 7')}, r"\(f1_ci95 is 7, wanted a valid list\)"),
        ({"metrics": METRICS.format('1, "f1": 1.5, "f1_ci95": [0, 1]')}, r"\(f1 is 1.5, wanted 0 to 1\)"),
        ({"metrics": METRICS.format('1, "f1": 0.5, "f1_ci95": [1, 0]')}, r"\(f1_ci95 is \[1, 0\], wanted a low"),
        ({"metrics": METRICS.format('1, "accuracy": 0.5, "accuracy_ci95": [0, 1]')}, r"0.5000, .* gives 1.0000"),
        ({"metrics": METRICS.format('1, "seed": [1]')}, r"\(seed is \[1\], wanted a valid integer\)"),
    ],
)
def test_evaluations_of_another_form(tmp_path, change, words):
    read_evaluation(evaluation(tmp_path / "good"))
    with pytest.raises(Refused, match=words):
        read_evaluation(evaluation(tmp_path / "bad", **change))


def test_nothing_is_written_of_a_comparison_without_scores(tmp_path):
    with pytest.raises(Refused, match="has accuracy with its interval"):
        write_comparison(read_comparison([evaluation(tmp_path / name) for name in "ab"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
