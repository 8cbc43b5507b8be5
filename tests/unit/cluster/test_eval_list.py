"""Test lists of evaluations: a line's launch, its folder, when it is done, and which lines are compared."""

import json
import re
from pathlib import Path

import pytest

from zerotune.cluster.eval_list import compare, main, read_list
from zerotune.errors import Refused


@pytest.fixture
def write_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(*lines):
        path = tmp_path / "mine.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_lines_and_their_folders(write_list):
    lines = read_list(
        write_list(
            "# model task shots seed", "", "runs/a/final sst2 0 0", "org/b imdb 4 1 --prompt-format 'chat' # why"
        )
    )
    assert [line.number for line in lines] == [1, 2]
    assert lines[0].command == [
        *("eval/sst2.py", "--model", "runs/a/final", "--seed", "0"),
        *("--output-dir", str(lines[0].folder)),
    ]
    assert lines[1].command[:7] == ["eval/imdb.py", "--model", "org/b", "--shots", "4", "--seed", "1"]
    assert lines[1].command[7:9] == ["--prompt-format", "chat"]
    assert re.fullmatch(r"runs/eval/mine/sst2-a-0shot-seed0-\w{6}", str(lines[0].folder))
    assert re.fullmatch(r"imdb-b-4shot-seed1-\w{6}-\w{6}", lines[1].folder.name)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], "holds no evaluation"),
        (["org/a sst2 0"], "mine.txt line 1: 'org/a sst2 0'; wanted MODEL TASK SHOTS SEED"),
        (["org/a sst2 few 0"], "wanted MODEL TASK SHOTS SEED"),
        (["org/a sst2 ² 0"], "wanted MODEL TASK SHOTS SEED"),
        (["org/a sst2 0 0 --help"], "--help evaluates nothing"),
        (["org/a sst2 0 0 --plan"], "--plan evaluates nothing"),
        (["org/a cola 0 0"], "no task 'cola'; wanted one of sst2, imdb, qa, classify"),
        (["org/a sst2 0 0 --seed 3"], "--seed is set by the columns"),
        (["org/a sst2 0 0 --prompt-seeds=5"], "--prompt-seeds gives several scores.* write a line per SEED"),
        (["org/a sst2 0 0 'x"], "no closing quotation"),
        (
            ["org/a sst2 0 0 --calibrat contextual"],
            r"mine.txt line 1: unknown flag --calibrat: did you mean --calibrate\?",
        ),
        (["org/a sst2 0 0", "org/a sst2 00 0"], "line 2 writes to .*sst2-a-0shot-seed0-.*, as .* line 1 does"),
    ],
)
def test_lists_that_are_refused(write_list, lines, words):
    with pytest.raises(Refused, match=words):
        read_list(write_list(*lines))


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"org/\xff sst2 0 0\n")
    with pytest.raises(Refused, match=r"list\.txt line 1 is not UTF-8 text"):
        read_list(tmp_path / "list.txt")


@pytest.mark.parametrize("described", ["{", "{}"])
def test_an_adapter_without_a_base_is_refused(write_list, tmp_path, described):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_config.json").write_text(described)
    with pytest.raises(Refused, match=r"adapter_config.json (is damaged|has base_model_name_or_path None: wanted)"):
        read_list(write_list("org/a sst2 0 0", "final sst2 0 0"))


def finish(line, right=3):
    line.folder.mkdir(parents=True)
    rows = [{"id": str(n), "label": n % 2, "prediction": n % 2 if n < right else 1 - n % 2} for n in range(6)]
    (line.folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"accuracy": right / 6, "accuracy_ci95": [0.0, 1.0], "f1": right / 6, "f1_ci95": [0.0, 1.0]}
    metrics = {"task": line.task, "setting": "prompt", "count": 6, **scores}
    (line.folder / "metrics.json").write_text(json.dumps(metrics))
    (line.folder / "state.json").write_text('{"state": "finished", "reason": null}')


def test_a_line_is_done_until_its_model_is_another(write_list):
    path = write_list("model sst2 0 0")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    (line,) = read_list(path)
    assert not line.is_done
    finish(line)
    assert line.is_done
    Path("model/config.json").write_text("{ }")
    (retrained,) = read_list(path)
    assert not retrained.is_done and retrained.folder != line.folder
    Path("model/config.json").write_text("{}")  # the same content again, with a new modification time
    assert read_list(path)[0].is_done


def test_a_hub_model_is_told_from_its_namesake_and_from_another_commit(write_list, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--org--a"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    path = write_list("org/a sst2 0 0", "other/a sst2 0 0")
    folders = [line.folder for line in read_list(path)]
    assert folders[0] != folders[1]
    for commit in ("c" * 40, "d" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(commit)
        folders.append(read_list(path)[0].folder)
    assert len(set(folders)) == 4
    monkeypatch.setenv("ZEROTUNE_ONLINE", "1")  # a job may then fetch another commit before the comparison
    assert read_list(path)[0].folder == folders[0]


def test_a_list_with_a_byte_order_mark(write_list):
    path = write_list("org/a sst2 0 0")
    plain = read_list(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_list(path) == plain and plain[0].model == "org/a"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"org/a sst2 {'9' * 5000} 0", "line 1: --shots must be a whole number, not '9{50,70}…$"),
        (f"org/a sst2 0 {'9' * 30}", "line 1: --seed must fit 64 bits"),
        ("org/a\0b sst2 0 0", "line 1 holds a NUL character"),
    ],
)
def test_numbers_and_names_that_no_script_takes(write_list, line, words):
    with pytest.raises(Refused, match=words):
        read_list(write_list(line))


def test_damaged_results_are_named_and_the_others_compared(write_list, capsys):
    lines = read_list(write_list("org/a sst2 0 0", "org/b sst2 0 0"))
    for line in lines:
        finish(line)
    (lines[0].folder / "metrics.json").write_text('{"accuracy": NaN}')
    compare(lines)
    said = capsys.readouterr().out
    assert "metrics.json is damaged (NaN is not a JSON number)" in said and "accuracy 0.5000 on 6 items" in said


def test_all_lines_of_a_chain_are_launched(write_list, capsys):
    path = write_list("org/a sst2 0 0", "org/b sst2 0 0")
    finish(read_list(path)[0])
    for verb, numbers in (("todo", "2"), ("all", "1,2")):
        main([verb, str(path)])
        assert capsys.readouterr().out.strip() == numbers


def test_what_is_lacking_is_named_and_the_rest_is_said(write_list, capsys):
    lines = read_list(write_list("org/a sst2 0 0", "org/b sst2 0 0"))
    finish(lines[0])
    with pytest.raises(Refused, match=r"1 of 2 evaluations are not done: .*line 2 \(never started\); submit the list"):
        compare(lines)
    said = capsys.readouterr().out
    assert f"{lines[0].folder} alone, nothing to compare it with" in said and "accuracy 0.5000 on 6 items" in said
