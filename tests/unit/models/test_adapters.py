"""Test adapters: how LoRA is drawn, which base they belong to, and refused ones."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import IDS, LABELS, task_record, tiny_model, tuned_model, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from zerotune.errors import Refused
from zerotune.models.adapters import base_settings
from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import load_final_or_base, save_final
from zerotune.models.generator import answer_logits, load_language_model
from zerotune.models.model_files import adapter_base
from zerotune.models.precision import autocast
from zerotune.models.pretrained import load_tokenizer, read_model
from zerotune.settings.groups import ModelSettings


def test_lora_draws_are_seeded_too():
    folder = tiny_model("llama")

    def draws(seed):
        model = load_classifier(ModelSettings(folder, None, "lora", seed=seed), LABELS, load_tokenizer(folder, None))
        return [p for n, p in model.named_parameters() if "lora_A" in n]

    assert all(map(torch.equal, draws(0), draws(0))) and not any(map(torch.equal, draws(0), draws(1)))


class Widenings(TorchDispatchMode):
    """Counts the casts of 16-bit tensors to float32."""

    num = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        widens = operation is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16
        self.num += widens and kwargs["dtype"] == torch.float32
        return operation(*args, **kwargs or {})


def pass_of(kind, method, precision, autocasts):
    """Return a classifier's logits and gradients, with an adapter that is not zero, and its forward pass's casts."""
    folder = tiny_model(kind)
    settings = ModelSettings(folder, None, method, precision=precision)
    model = load_classifier(settings, LABELS, load_tokenizer(folder, None)).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    with Widenings() as widenings, autocast("cpu", precision) if autocasts else nullcontext():
        logits = model(IDS, torch.ones_like(IDS))
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return logits, gradients, widenings.num


@pytest.mark.parametrize(
    ("kind", "method", "precision", "autocasts"),
    [
        ("llama", "lora", "bf16", True),
        ("gemma2", "lora", "bf16", True),
        ("bert", "lora", "bf16", True),
        ("llama", "qlora", "bf16", True),
        ("llama", "lora", "bf16", False),
        ("llama", "qlora", "bf16", False),
        ("llama", "lora", "fp32", True),
    ],
)
def test_an_adapters_input_is_cast_only_outside_autocast_to_the_same_bits(
    kind, method, precision, autocasts, plain_four_bits, monkeypatch
):
    logits, gradients, num_casts = pass_of(kind, method, precision, autocasts)
    monkeypatch.setattr("zerotune.models.adapters.cast_only_outside_autocast", lambda adapted: None)
    stock_logits, stock_gradients, num_stock_casts = pass_of(kind, method, precision, autocasts)
    assert torch.equal(logits, stock_logits) and all(
        torch.equal(gradient, stock_gradients[name]) for name, gradient in gradients.items()
    )
    if autocasts and precision == "bf16":
        assert num_casts < num_stock_casts
    else:
        assert num_casts == num_stock_casts


def test_adapters_that_are_refused(tmp_path):
    model, tokenizer = tuned_model(tiny_model("llama"), "lora")
    save_final(model, tokenizer, tmp_path, task_record())
    with pytest.raises(Refused, match=r"is an adapter; give .*, or merge it first: python eval/publish\.py"):
        load_classifier(ModelSettings(str(tmp_path), None, "full"), LABELS, tokenizer)
    with pytest.raises(Refused, match="trained for 'negative', 'positive'"):
        load_final_or_base(ModelSettings(str(tmp_path)), ("no", "yes"))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for part in ("score", "q_proj.lora_B"):
        save_file({n: v for n, v in weights.items() if part not in n}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(Refused, match=f"{part}.*lacks weights|lacks weights.*{part}"):
            load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, words in (
        ({"target_modules": ["q_proj"]}, "has weights its config does not name: .*down_proj"),
        ({"r": 16}, "do not fit adapter_config.json"),
        ({"lora_alpha": "x"}, "do not fit adapter_config.json"),
        ({"target_modules": ["foo"]}, "do not fit adapter_config.json"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(Refused, match=words):
            load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    record = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps(record | {"base_model": "../gone"}))
    with pytest.raises(Refused, match="/gone/base"):
        load_final_or_base(ModelSettings(str(tmp_path)), LABELS)
    with pytest.raises(Refused, match=r"/gone/base, which is not there: put it back, or correct base_model in"):
        read_model(ModelSettings(str(tmp_path)), "sst2", LABELS)
    (tmp_path / "task.json").write_text(json.dumps(record | {"base_model": "org/base"}))
    assert adapter_base(tmp_path) == ("org/base", None)


def test_an_adapters_weights_are_those_of_its_base(tmp_path):
    """ZeRO-3, which needs all weights in float32, is only for training."""
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


# --- adapters that others made ---


def made_by_peft(folder, config, **changes):
    """Make an adapter on the tiny Llama as peft saves it, without a config.json; return peft's own logits too."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    adapted = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        logits = adapted.eval()(IDS).logits
    adapted.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | changes))
    return logits


PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
RUN = {
    "lora": LoraConfig(r=2, target_modules=PROJECTIONS),
    "dora": LoraConfig(r=2, target_modules=PROJECTIONS, use_dora=True),
    "rslora": LoraConfig(r=2, target_modules=PROJECTIONS, use_rslora=True, lora_alpha=3),
    "head": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=PROJECTIONS, feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", RUN)
def test_the_adapters_that_we_run_give_pefts_own_logits(kind, tmp_path):
    logits = made_by_peft(tmp_path, replace(RUN[kind], task_type="CAUSAL_LM"))
    model = load_language_model(ModelSettings(str(tmp_path)), torch.device("cpu"))
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        torch.testing.assert_close(answer_logits(model, hidden), logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(answer_logits(model, hidden, [5, 9]), logits[..., [5, 9]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["prompt", "prefix"],
)
def test_adapters_that_act_outside_of_the_layers_are_refused_before_a_weight_is_read(config, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), config)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"is an adapter of type .*zerotune runs LORA and IA3"):
        read_model(ModelSettings(str(tmp_path)), "sst2", LABELS)


def test_an_adapter_without_a_config_is_read_as_its_base_says(tmp_path):
    made_by_peft(tmp_path, LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    config, tokenizer = read_model(ModelSettings(str(tmp_path)), "sst2", LABELS)
    assert config.model_type == "llama" and len(tokenizer) > 5


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_an_adapter_of_pefts_in_the_cache_of_the_hub_is_read_as_its_base_says(has_tokenizer, own_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = own_cache / "hub" / "models--org--by-peft" / "snapshots" / ("e" * 40)
    snapshot.mkdir(parents=True)
    reference = snapshot.parent.parent / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("e" * 40)
    logits = made_by_peft(snapshot, LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    if has_tokenizer:
        word_tokenizer(unk_token="<unk>", bos_token="<s>", pad_token="</s>").save_pretrained(snapshot)
    config, tokenizer = read_model(ModelSettings("org/by-peft"), "sst2", LABELS)
    assert config.model_type == "llama" and tokenizer.pad_token == ("</s>" if has_tokenizer else "<pad>")
    model = load_language_model(ModelSettings("org/by-peft"), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, atol=2e-6, rtol=0)


def test_an_adapter_that_names_itself_as_its_base(tmp_path):
    config = LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    made_by_peft(tmp_path, config, base_model_name_or_path=str(tmp_path))
    with pytest.raises(Refused, match="names itself as its base model"):
        read_model(ModelSettings(str(tmp_path)), "sst2", LABELS)
