"""Test parameter counts: published figures for real shapes on the meta device, and logical sizes in 4 bits."""

import pytest
import torch
from tiny_models import tiny_model, tuned_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from zerotune.models.adapters import add_lora
from zerotune.models.families import span_class
from zerotune.models.parameters import format_table, model_size, parameter_groups, parameter_table, published_table
from zerotune.models.pretrained import read_config
from zerotune.settings.groups import ModelSettings

# Llama-3.2-1B as published.
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def test_llama_3_2_1b_has_the_published_counts():
    config = AutoConfig.for_model("llama", **LLAMA_1B, architectures=["LlamaForCausalLM"])
    before, model = published_table(config), on_meta(config)
    after = parameter_table(model)
    assert (before["total"], before["head"]) == (1_235_814_400, 0), "the LM head is tied"
    assert (after["total"], after["trainable"], after["head"]) == (1_235_818_496, 1_235_818_496, 4096)
    adapted = parameter_table(add_lora(model, ModelSettings("meta-llama/Llama-3.2-1B", None, "lora", lora_rank=8)))
    assert adapted["groups"]["adapter"] == 5_636_096
    assert adapted["trainable"] == 5_636_096 + 4096
    assert adapted["total"] == 1_235_818_496 + 5_636_096, "peft's copy of the untrained head is not counted"
    assert "1,241,454,592" in (table := format_table(before, adapted)) and "(0.45%)" in table


def test_llama_3_2_1b_with_a_span_head_has_the_published_count():
    config = AutoConfig.for_model("llama", **LLAMA_1B)
    assert model_size(config, "span", 0, ModelSettings("m")) == (1_235_818_498, 1_235_818_498)
    with torch.device("meta"):
        model = span_class(config)(config)
    settings = ModelSettings("meta-llama/Llama-3.2-1B", None, "lora", lora_rank=8)
    assert model_size(config, "span", 0, settings) == (1_235_818_498 + 5_636_096, 5_636_096 + 4098)
    adapted = parameter_table(add_lora(model, settings))
    assert adapted["trainable"] == 5_636_096 + 4098 and adapted["total"] == 1_235_818_498 + 5_636_096


def test_distilbert_and_bert_have_the_published_counts():
    """The encoders' sizes are known; a head has 768² + 768 and 2 × 768 + 2 weights. BERT's first part is its pooler."""
    for kind, encoder, head, drawn in (
        ("distilbert", 66_362_880, 592_130, 592_130),
        ("bert", 109_482_240, 592_130, 1_538),
    ):
        config = AutoConfig.for_model(kind)
        assert published_table(config)["total"] == encoder
        after = parameter_table(on_meta(config))
        assert (after["total"], after["head"]) == (encoder + drawn, head)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "distilbert", "bert", "roberta"])
def test_four_bits_count_as_what_they_stand_for(kind):
    folder = tiny_model(kind)
    tables = {}
    for method in ("full", "lora", "qlora"):
        tables[method] = parameter_table(tuned_model(folder, method)[0])
    assert tables["qlora"] == tables["lora"]
    assert tables["lora"]["total"] == tables["full"]["total"] + tables["lora"]["groups"]["adapter"]
    assert tables["full"]["trainable"] == tables["full"]["total"] == sum(tables["full"]["groups"].values())
    assert all(tables["lora"]["groups"].values()), "every group of these models has weights"


def test_a_published_classifier_counts_with_its_head():
    llama = AutoConfig.for_model("llama", **LLAMA_1B, architectures=["LlamaForSequenceClassification"])
    bert = AutoConfig.for_model("bert", architectures=["BertForSequenceClassification"])
    for config in (llama, bert):
        assert published_table(config) == parameter_table(on_meta(config))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_parameter_groups_cover_what_trains_once(kind):
    for method, names in (
        ("full", {"backbone, decay", "backbone, no decay", "head, decay"}),
        ("lora", {"backbone, decay", "head, decay"}),
    ):
        model, _ = tuned_model(tiny_model(kind), method)
        groups = parameter_groups(model, 1e-4, 1e-3, 0.1)
        expected = names | ({"head, no decay"} if kind == "bert" else set())
        assert {group["name"] for group in groups} == expected
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        for group in groups:
            assert group["lr"] == (1e-3 if group["name"].startswith("head") else 1e-4)
            assert group["weight_decay"] == (0.0 if group["name"].endswith("no decay") else 0.1)
            assert {p.ndim for p in group["params"]} == ({1} if group["name"].endswith("no decay") else {2})


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("head", ["classify", "span", "generate"])
def test_the_size_is_known_before_a_weight_is_read(head, method):
    for kind in ("llama", "gemma2") if head == "generate" else ("llama", "gemma2", "distilbert", "bert"):
        folder = tiny_model(kind)
        table = parameter_table(tuned_model(folder, method, head)[0])
        config = read_config(folder, None)
        found = model_size(config, head, 2, ModelSettings(folder, None, method))
        assert found == (table["total"], table["trainable"]), kind
        assert config.to_dict() == read_config(folder, None).to_dict(), "the config stays as it was"
