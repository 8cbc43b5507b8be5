"""Adapters: how LoRA is drawn, whose weights they belong to, and those that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LABELS, task_record, tiny_model, tuned_model

from zerotune.errors import Refused
from zerotune.models.adapters import base_settings
from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import load_final_or_base, save_final
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import ModelSettings


def test_lora_draws_are_seeded_too():
    folder = tiny_model("llama")

    def draws(seed):
        model = load_classifier(ModelSettings(folder, None, "lora", seed=seed), LABELS, load_tokenizer(folder, None))
        return [p for n, p in model.named_parameters() if "lora_A" in n]

    assert all(map(torch.equal, draws(0), draws(0))) and not any(map(torch.equal, draws(0), draws(1)))


def test_adapters_that_are_refused(tmp_path):
    model, tokenizer = tuned_model(tiny_model("llama"), "lora")
    save_final(model, tokenizer, tmp_path, task_record())
    with pytest.raises(Refused, match="is an adapter"):
        load_classifier(ModelSettings(str(tmp_path), None, "full"), LABELS, tokenizer)
    with pytest.raises(Refused, match="trained for negative, positive"):
        load_final_or_base(ModelSettings(str(tmp_path)), ("no", "yes"))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for part in ("score", "q_proj.lora_B"):
        save_file({n: v for n, v in weights.items() if part not in n}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(Refused, match=f"lacks weights.*{part}"):
            load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, words in (
        ({"target_modules": ["q_proj"]}, "has weights without a place: .*down_proj"),
        ({"r": 16}, "adapter_config.json belong together"),
        ({"lora_alpha": "x"}, "adapter_config.json belong together"),
        ({"target_modules": ["foo"]}, "adapter_config.json belong together"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(Refused, match=words):
            load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(Refused, match="/gone/base"):
        load_final_or_base(ModelSettings(str(tmp_path)), LABELS)


def test_an_adapters_weights_are_those_of_its_base(tmp_path):
    """ZeRO-3, under which all weights are float32, is for training alone."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "revision": "v1"}')
    given = ModelSettings(str(tmp_path), "v2", "full", precision="bf16", zero_stage=3, seed=5)
    for wanted, trained, method in (
        ("full", "lora", "lora"),
        ("full", "qlora", "qlora"),
        ("qlora", "lora", "qlora"),
        ("lora", None, "lora"),
    ):
        base = ModelSettings("org/base", "v1", method, precision="bf16", seed=5)
        assert base_settings(replace(given, method=wanted), trained and {"method": trained}) == (base, True)
    (tmp_path / "adapter_config.json").unlink()
    whole = replace(given, zero_stage=None)
    assert base_settings(given, None) == (whole, False)
    assert base_settings(replace(given, method="qlora"), None) == (replace(whole, method="qlora"), False)
