"""Bad input and damaged files give one line with the rule, the value found and the way out; no weights are loaded."""

import pytest
from default_settings import run_settings

from zerotune.errors import Refused
from zerotune.files import read_json, read_json_lines
from zerotune.models.tiny import tiny_causal_model
from zerotune.models.upload import check_upload
from zerotune.settings.deepspeed import zero_stage
from zerotune.settings.groups import DataSettings
from zerotune.tasks.files import read_file
from zerotune.tasks.sample import review_lines
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import load_test
from zerotune.training import start
from zerotune.training.checkpoints import MARKER

# --- files ---


def test_a_number_of_thousands_of_digits_is_not_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "x", "label": ' + "9" * 5000 + "}\n")
    with pytest.raises(Refused, match="line 1: not JSON"):
        read_file(path)


def test_a_file_name_that_is_too_long(tmp_path):
    with pytest.raises(Refused, match=r"cannot be read .*too long"):
        read_file(tmp_path / ("x" * 300 + ".tsv"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"run.json is damaged"):
        read_json(path)


def test_a_damaged_line_is_named_and_a_torn_last_one_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    assert read_json_lines(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n\0\0\0\n')
    with pytest.raises(Refused, match="line 2 is damaged"):
        read_json_lines(path)


@pytest.mark.parametrize("dataset", [":test", "glue:", ":"])
def test_half_a_hub_split(dataset):
    with pytest.raises(Refused, match="--dataset"):
        load_test(SST2, DataSettings(dataset=dataset), None)


# --- flags ---


def test_a_named_checkpoint_must_be_one_of_the_run(tmp_path):
    own, other = (tmp_path / name / "checkpoints" / "step-00000002" for name in ("a", "b"))
    for folder in (own, other):
        folder.mkdir(parents=True)
    with pytest.raises(Refused, match="no COMPLETE marker"):
        start.check_run_flags(run_settings(tmp_path / "a", resume=str(own)))
    for folder in (own, other):
        (folder / MARKER).touch()
    start.check_run_flags(run_settings(tmp_path / "a", resume=str(own)))
    with pytest.raises(Refused, match="is not a checkpoint of this run"):
        start.check_run_flags(run_settings(tmp_path / "a", resume=str(other)))


def test_weights_alone_are_not_resumed_from(tmp_path):
    folder = tmp_path / "checkpoints" / "best-00000002"
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    with pytest.raises(Refused, match="holds the weights of a best evaluation without the optimizer's state"):
        start.check_run_flags(run_settings(tmp_path, resume=str(folder)))


def test_a_scratch_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    start.check_run_flags(run_settings("run", scratch_dir=tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(Refused, match=rf"--scratch-dir {folder} cannot be written \(.*file is a file\): name ano"):
            start.check_run_flags(run_settings("run", scratch_dir=folder))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        with pytest.raises(Refused, match=rf"--scratch-dir {folder} cannot be written \({tmp_path} is not writable\)"):
            start.check_run_flags(run_settings("run", scratch_dir=folder))


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install"):
        start.check_run_flags(run_settings("run", tracker="wandb"))


def test_uploads_that_cannot_work(monkeypatch):
    with pytest.raises(Refused, match="is not of the form ORG/NAME"):
        check_upload("not a name!!")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Refused, match="HF_HUB_OFFLINE"):
        check_upload("org/name")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(Refused, match="hf auth login"):
        check_upload("org/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # set because nothing answers
    with pytest.raises(Refused, match="cannot be reached from here"):
        check_upload("org/name")


@pytest.mark.parametrize("stage", [9, "two", "auto", None])
def test_stages_that_there_are_not(stage):
    with pytest.raises(Refused, match="stage is"):
        zero_stage({"zero_optimization": {"stage": stage}})


def test_a_sample_model_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="ZEROTUNE_CACHE"):
        tiny_causal_model(tmp_path / "file" / "sample-llama", review_lines)
