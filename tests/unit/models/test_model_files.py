"""Test a model's files: missing and damaged ones, and their identity."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from tiny_models import model_copy, saved_record

from zerotune.errors import Refused
from zerotune.files import BLOCK
from zerotune.models import model_files
from zerotune.models.model_files import adapter_base, check_weight_files, model_identity, read_record


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n", None])
def test_damaged_weights_are_found_by_their_header(tmp_path, content):
    folder = model_copy(tmp_path / "m")
    path = folder / "model.safetensors"
    check_weight_files(str(folder))
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(Refused, match=r"model.safetensors is (damaged|a Git LFS pointer)"):
        check_weight_files(str(folder))


def test_missing_weights_are_named(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"lacks two.safetensors"):
        check_weight_files(str(folder))


def test_weights_that_cannot_be_read_are_not_called_damaged(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(Refused, match=r"model.safetensors cannot be read \(No such file or directory\): check its"):
        check_weight_files(str(folder))


@pytest.mark.parametrize("index", [[], {"weight_map": ["one"]}, {"weight_map": {"a": 1}}, {}])
def test_an_index_of_another_form(tmp_path, index):
    folder = model_copy(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"model.safetensors.index.json is damaged \(.*: copy it again"):
        check_weight_files(str(folder))


def test_an_adapter_without_a_base(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(Refused, match="has base_model_name_or_path None: wanted"):
        check_weight_files(str(tmp_path))


def test_a_folder_is_identified_by_its_files_and_an_adapters_base(tmp_path):
    model_copy(tmp_path / "base")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "weights.bin").write_bytes(bytes(20 * BLOCK))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    names = ("base", "large", "adapter")

    def identities():
        return {name: model_identity(str(tmp_path / name), None) for name in names}

    first = identities()
    assert identities() == first and len(set(first.values())) == 3
    with (tmp_path / "large" / "weights.bin").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    own = ("a.csv.partial", "a.csv.partial.json", "a.jsonl", "notes.txt")
    for name in (".hidden", "README.md", *own):
        (tmp_path / "base" / name).write_text("{}")
    assert {name for name in names if identities()[name] != first[name]} == {"large"}
    (tmp_path / "base" / "config.json").write_text("{}")
    assert {name for name in names if identities()[name] != first[name]} == set(names)


def test_a_hub_that_fails_is_not_taken_for_a_missing_file(monkeypatch):
    """A tuned model whose task.json was not fetched would be asked as an untuned one."""

    def fail(name, filename, revision):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(model_files, "stay_offline_without_network", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Refused, match=r"cannot tell whether org/tuned has a file task.json: the hub cannot be reached"):
        read_record("org/tuned", None)
    with monkeypatch.context() as known:
        known.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: huggingface_hub._CACHED_NO_EXIST)
        assert read_record("org/tuned", None) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_record("org/tuned", None) is None


def test_a_hub_adapter_is_identified_by_its_base_too(tmp_path, monkeypatch):
    adapter = tmp_path / "abc"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    commits = {"org/adapter": adapter, "org/base": tmp_path / "def"}
    paths = {("org/adapter", "adapter_config.json"): str(adapter / "adapter_config.json")}
    monkeypatch.setattr(model_files, "cached_snapshot", lambda name, revision: commits[name])
    monkeypatch.setattr(model_files, "find_file", lambda name, filename, revision=None: paths.get((name, filename)))
    assert model_identity("org/adapter", None) == "commit abc of an adapter of commit def"


def test_only_a_record_of_ours_is_read(tmp_path):
    assert read_record(str(tmp_path), None) is None and adapter_base(tmp_path) is None
    (tmp_path / "task.json").write_text('{"task": "text-generation"}')
    assert read_record(str(tmp_path), None) is None
    record = saved_record()
    (tmp_path / "task.json").write_text(json.dumps(record))
    assert read_record(str(tmp_path), None)["task"] == "sst2"


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(tmp_path, kind):
    (tmp_path / "config.json").write_text("{}")
    weights = {"norm.weight": torch.ones(2), "embeddings.position_ids": torch.arange(3)}
    save_file(weights, tmp_path / "model.safetensors")
    check_weight_files(str(tmp_path))
    save_file(weights | {"norm.weight": torch.ones(2).to(kind)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=r"has norm\.weight as .*: wanted floating-point numbers"):
        check_weight_files(str(tmp_path))
