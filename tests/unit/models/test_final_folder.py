"""final/ gives the same logits again: through zerotune, and by the one line of its README without it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IDS, LABELS, MASK, move_weights, tiny_model
from transformers import AutoModelForSequenceClassification

from zerotune.errors import Refused
from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import load_final_or_base, save_final
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import ModelSettings

pytestmark = pytest.mark.usefixtures("plain_four_bits")

KINDS = ["llama", "gemma2", "mistral", "qwen2", "distilbert", "bert"]


def tuned(kind, method, **settings):
    """A classifier whose trainable weights have moved, and its tokenizer."""
    folder = tiny_model(kind)
    tokenizer = load_tokenizer(folder, None)
    model = load_classifier(ModelSettings(folder, None, method, **settings), LABELS, tokenizer)
    move_weights(model)
    return model.eval(), tokenizer


def logits(model):
    with torch.no_grad():
        return model(IDS, MASK)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_by_us_it_gives_the_same_logits(kind, method, gathered, tmp_path):
    model, tokenizer = tuned(kind, method)
    trained = {n: p.detach().clone() for n, p in model.model.named_parameters() if p.requires_grad}
    save_final(model, tokenizer, tmp_path, {"task": "sst2", "max_length": 9}, trained if gathered else None)
    again, its_tokenizer, task = load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    assert torch.equal(logits(again), logits(model))
    assert its_tokenizer.pad_token_id == tokenizer.pad_token_id
    base = {"base_model": tiny_model(kind), "base_revision": None}
    assert task == {"task": "sst2", "max_length": 9, "method": method, "dtype": "float32", **base}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_line_of_its_readme_gives_the_same_logits(kind, method, tmp_path, monkeypatch):
    """Stock pooling is by pad id: the rows here do not end in it."""
    model, tokenizer = tuned(kind, method)
    save_final(model, tokenizer, tmp_path, {"task": "sst2"})
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.startswith("model = ")]) == 1
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    with torch.no_grad():
        plain = names["model"].eval()(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(plain, logits(model), atol=2e-6, rtol=0)
    config = names["model"].config
    assert (config.id2label, config.pad_token_id) == (dict(enumerate(LABELS)), 3)
    assert names["tokenizer"].pad_token_id == 3


def test_full_tuning_is_a_plain_float32_checkpoint(tmp_path):
    model, tokenizer = tuned("llama", "full")
    save_final(model, tokenizer, tmp_path, {})
    weights = load_file(tmp_path / "model.safetensors")
    assert "score.weight" in weights and {value.dtype for value in weights.values()} == {torch.float32}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32, "the config says float32, the default dtype follows it"


def test_an_adapter_holds_no_relative_base_path(tmp_path, monkeypatch):
    folder = Path(tiny_model("llama"))
    monkeypatch.chdir(folder.parent)
    tokenizer = load_tokenizer("llama", None)
    for method in ("full", "lora"):
        final = tmp_path / method
        final.mkdir()
        save_final(load_classifier(ModelSettings("llama", None, method), LABELS, tokenizer), tokenizer, final, {})
        assert json.loads((final / "task.json").read_text())["base_model"] == str(folder)
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert "quantization_config" not in json.loads((final / "config.json").read_text())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_head_of_a_loaded_adapter_stays_float32(method, tmp_path):
    model, tokenizer = tuned("llama", method, precision="bf16")
    save_final(model, tokenizer, tmp_path, {})
    trained = model.model.get_base_model().score.weight
    for wanted in ("full", "qlora"):
        again, _, _ = load_final_or_base(ModelSettings(str(tmp_path), precision="bf16", method=wanted), LABELS)
        head = again.stock_model.score.weight
        assert head.dtype == torch.float32 and torch.equal(head, trained)
        assert again.stock_model.model.norm.weight.dtype == torch.bfloat16
        assert logits(again).dtype == torch.float32
        assert any(p.dtype == torch.uint8 for p in again.parameters()) == ("qlora" in (wanted, method))


def test_a_whole_model_in_four_bits_keeps_its_float32_head(tmp_path):
    model, tokenizer = tuned("bert", "full")
    save_final(model, tokenizer, tmp_path, {})
    again, _, _ = load_final_or_base(ModelSettings(str(tmp_path), precision="bf16", method="qlora"), LABELS)
    own = dict(model.stock_model.named_parameters())
    for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight"):
        assert torch.equal(again.stock_model.get_parameter(name), own[name]), name
    assert sum(p.dtype == torch.uint8 for p in again.parameters()) == 12


def test_checkpoints_without_a_head():
    again, _, task = load_final_or_base(ModelSettings(tiny_model("distilbert")), LABELS)
    assert task is None and logits(again).shape == (2, 2)
    with pytest.raises(Refused, match="no classification head"):
        load_final_or_base(ModelSettings(tiny_model("llama")), LABELS)


def test_adapters_that_are_refused(tmp_path):
    model, tokenizer = tuned("llama", "lora")
    save_final(model, tokenizer, tmp_path, {})
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
        ({"r": 16}, "adapter_config.json does not fit"),
        ({"lora_alpha": "x"}, "adapter_config.json does not fit"),
        ({"target_modules": ["foo"]}, "adapter_config.json does not fit"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(Refused, match=words):
            load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(Refused, match="/gone/base"):
        load_final_or_base(ModelSettings(str(tmp_path)), LABELS)


def test_a_16_bit_weight_is_never_saved(tmp_path):
    model, tokenizer = tuned("llama", "full")
    with pytest.raises(AssertionError, match=r"final/ is float32.*score\.weight"):
        save_final(model, tokenizer, tmp_path, {}, {"score.weight": torch.zeros(2, 32, dtype=torch.bfloat16)})
