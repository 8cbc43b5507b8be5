"""Bad input and damaged files: one line with the rule, the value found and the way out, before a weight is loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from default_settings import run_settings
from safetensors.torch import save_file
from tiny_models import LABELS, tiny_model
from transformers import AutoConfig

from zerotune.errors import Refused
from zerotune.files import read_json, read_json_lines
from zerotune.models.classifier import load_classifier
from zerotune.models.generator import load_language_model
from zerotune.models.loading import check_trainable
from zerotune.models.model_files import check_weight_files
from zerotune.models.pretrained import check_token_ids, check_window, load_tokenizer, read_config
from zerotune.models.tiny import tiny_causal_model
from zerotune.run.upload import check_upload
from zerotune.settings.deepspeed import zero_stage
from zerotune.settings.flags import train_parser
from zerotune.settings.groups import DataSettings, ModelSettings
from zerotune.tasks import sst2
from zerotune.tasks.files import read_file
from zerotune.tasks.sample import review_lines
from zerotune.training import start
from zerotune.training.checkpoints import MARKER


def model_copy(folder, kind="llama", **config):
    """A tiny checkpoint of its own, with some values of its config.json changed."""
    shutil.copytree(tiny_model(kind), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


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
        sst2.load_test(DataSettings(dataset=dataset), None)


# --- flags ---


@pytest.mark.parametrize("flags", [["--model", ""], ["--dataset", ""], ["--seed", str(2**63)]])
def test_values_that_no_run_can_use(flags, capsys):
    with pytest.raises(SystemExit):
        train_parser("", sst2).parse_args(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_named_checkpoint_must_be_one_of_the_run(tmp_path):
    own, other = (tmp_path / name / "checkpoints" / "step-00000002" for name in ("a", "b"))
    for folder in (own, other):
        folder.mkdir(parents=True)
    with pytest.raises(Refused, match="no COMPLETE marker"):
        start.check_run_flags(run_settings(tmp_path / "a", resume=str(own)))
    for folder in (own, other):
        (folder / MARKER).touch()
    start.check_run_flags(run_settings(tmp_path / "a", resume=str(own)))
    with pytest.raises(Refused, match="no checkpoint of this run"):
        start.check_run_flags(run_settings(tmp_path / "a", resume=str(other)))


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install"):
        start.check_run_flags(run_settings("run", tracker="wandb"))


def test_uploads_that_cannot_work(monkeypatch):
    with pytest.raises(Refused, match="no ORG/NAME"):
        check_upload("not a name!!")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="HF_HUB_OFFLINE"):
        check_upload("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(Refused, match="hf auth login"):
        check_upload("org/name")


@pytest.mark.parametrize("stage", [9, "two", "auto", None])
def test_stages_that_there_are_not(stage):
    with pytest.raises(Refused, match="stage is"):
        zero_stage({"zero_optimization": {"stage": stage}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains with flex_attention")
def test_flex_attention_does_not_train_on_a_cpu():
    with pytest.raises(Refused, match="flex_attention"):
        config = read_config(tiny_model("llama"), None)
        check_trainable(ModelSettings("m", attention="flex_attention"), config, None)


def test_a_quantised_checkpoint_is_not_trained(tmp_path):
    folder = model_copy(tmp_path / "m", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Refused, match="quantised already"):
        check_trainable(ModelSettings("m"), read_config(str(folder), None), None)


# --- models ---


@pytest.mark.parametrize("change", [{"num_hidden_layers": "x"}, {"num_attention_heads": 7}])
def test_configs_at_odds_with_themselves(tmp_path, change):
    with pytest.raises(Refused, match="cannot be used"):
        read_config(str(model_copy(tmp_path / "m", **change)), None)


def test_a_config_that_is_no_object(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(Refused, match="not an object"):
        read_config(str(folder), None)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n", None])
def test_damaged_weights_are_found_by_their_header(tmp_path, content):
    folder = model_copy(tmp_path / "m")
    path = folder / "model.safetensors"
    check_weight_files(str(folder))
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(Refused, match=r"model.safetensors is damaged"):
        check_weight_files(str(folder))


def test_missing_weights_are_named(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"lacks two.safetensors"):
        check_weight_files(str(folder))


def test_an_adapter_whose_base_is_gone(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    for base, words in ((None, "has base_model_name_or_path None: wanted"), (str(tmp_path / "gone"), "is not there")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(Refused, match=words):
            check_weight_files(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "nonsense"])
def test_a_tokenizer_that_is_none(tmp_path, content):
    folder = model_copy(tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(Refused, match="no tokenizer could be read"):
        load_tokenizer(str(folder), None)


def test_weights_of_another_shape(tmp_path):
    folder = str(model_copy(tmp_path / "m", intermediate_size=24))
    with pytest.raises(Refused, match=r"do not fit its config.json: .*mlp"):
        load_classifier(ModelSettings(folder, None, "full"), LABELS, load_tokenizer(folder, None))
    with pytest.raises(Refused, match=r"do not fit its config.json: .*mlp"):
        load_language_model(ModelSettings(folder), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("roberta", 60), ("llama", 64)])
def test_texts_longer_than_the_positions(kind, most):
    config = read_config(tiny_model(kind), None)
    check_window("m", config, most)
    with pytest.raises(Refused, match=f"more than the {most} positions"):
        check_window("m", config, most + 1)


def test_token_ids_without_an_embedding():
    config = AutoConfig.for_model("llama", vocab_size=10)
    check_token_ids("m", config, np.array([3, 9]))
    with pytest.raises(Refused, match="gives token 10 and the model has 10"):
        check_token_ids("m", config, np.array([3, 10]))


def test_a_sample_model_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="ZEROTUNE_CACHE"):
        tiny_causal_model(tmp_path / "file" / "sample-llama", review_lines)
