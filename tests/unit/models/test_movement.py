"""Test how far weights moved, against computing it from the whole matrices."""

import json
import math

import pytest
from safetensors.torch import load_file
from tiny_models import move_weights, task_record, tiny_model, tuned_model

from zerotune.models import movement
from zerotune.models.final_folder import save_final
from zerotune.models.movement import weight_movement


def finished(tmp_path, kind, method, head="classify"):
    model, tokenizer = tuned_model(tiny_model(kind), method, head)
    move_weights(model)
    save_final(model, tokenizer, tmp_path, task_record(head))
    return load_file(f"{tiny_model(kind)}/model.safetensors")


@pytest.mark.parametrize("block", [16, 1 << 26])
def test_a_whole_model(tmp_path, block, monkeypatch):
    before = finished(tmp_path, "llama", "full")
    monkeypatch.setattr(movement, "BLOCK", block)
    moved = weight_movement(tmp_path, tiny_model("llama"), None)
    after = load_file(tmp_path / "model.safetensors")
    names = [name for name in after if "self_attn" in name]
    change, norm = (
        math.sqrt(sum(float(each.double().square().sum()) for each in tensors))
        for tensors in ([after[n].float() - before[n].float() for n in names], [before[n].float() for n in names])
    )
    assert set(moved["groups"]) == {"embedding", "attention", "mlp", "norm"}
    assert moved["groups"]["attention"] == pytest.approx(change / norm, rel=1e-5) and change > 0
    assert len(moved["layers"]) == len({name.split(".")[2] for name in names})


@pytest.mark.parametrize("head", ["classify", "span"])
def test_an_adapters_product_is_never_formed(tmp_path, head):
    before = finished(tmp_path, "llama", "lora", head)
    moved = weight_movement(tmp_path, tiny_model("llama"), None)
    adapter, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    scale, change, norm = config["lora_alpha"] / config["r"], 0.0, 0.0
    for name, a in adapter.items():
        if name.endswith("lora_A.weight") and "self_attn" in name:
            product = scale * adapter[name.replace("lora_A", "lora_B")].double() @ a.double()
            change += float(product.square().sum())
            end = name.partition(".layers.")[2].replace(".lora_A", "")
            norm += float(before[f"model.layers.{end}"].double().square().sum())
    assert moved["groups"]["attention"] == pytest.approx(math.sqrt(change / norm), rel=1e-5) and change > 0


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_an_encoder(tmp_path, kind):
    finished(tmp_path, kind, "full")
    assert {"embedding", "attention", "mlp"} <= set(weight_movement(tmp_path, tiny_model(kind), None)["groups"])


def test_the_text_part_of_a_model_of_text_and_images(tmp_path):
    finished(tmp_path, "qwen3_5", "lora")
    assert "mlp" in weight_movement(tmp_path, tiny_model("qwen3_5"), None)["groups"]


def test_a_base_that_is_gone_is_a_reason(tmp_path):
    finished(tmp_path, "llama", "full")
    assert "no weights in safetensors" in weight_movement(tmp_path, "/nowhere", None)["reason"]
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert "could not be compared" in weight_movement(tmp_path, tiny_model("llama"), None)["reason"]
