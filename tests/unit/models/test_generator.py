"""Test a generator: trained parameters, types and counts, its tied LM head, and the logits of a frozen one."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import model_copy, seeded_model, task_record, tiny_model, tuned_model
from torch import nn
from torch.nn import functional

from zerotune.errors import Refused
from zerotune.models import generator
from zerotune.models.final_folder import save_final
from zerotune.models.generator import (
    answer_log_likelihoods,
    answer_logits,
    likeliest_tokens,
    load_generator,
    load_language_model,
)
from zerotune.models.heads import Float32Linear, float32_linear
from zerotune.models.parameters import parameter_table, published_table
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.groups import ModelSettings

CPU = torch.device("cpu")
KINDS = ["llama", "gemma2", "mistral"]
METHODS = ["full", "lora", "qlora"]
pytestmark = pytest.mark.usefixtures("plain_four_bits")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_types_counts_and_what_trains(kind, method):
    folder = tiny_model(kind)
    model = load_generator(ModelSettings(folder, None, method, precision="bf16"), load_tokenizer(folder, None))
    narrow = torch.float32 if method == "full" else torch.bfloat16
    for name, parameter in model.model.named_parameters():
        adapter = ".lora_" in name
        assert parameter.requires_grad == (method == "full" or adapter), name
        assert parameter.dtype in ((torch.float32,) if adapter else (narrow, torch.uint8)), name
    packed = sum(parameter.dtype == torch.uint8 for parameter in model.parameters())
    assert packed == (14 if method == "qlora" else 0), "seven projections of two layers, and nothing else"
    before, after = published_table(read_config(folder, None)), parameter_table(model)
    assert after["total"] == before["total"] + after["groups"]["adapter"] and after["head"] == before["head"]
    assert after["trainable"] == (after["total"] if method == "full" else after["groups"]["adapter"])
    logits = model(torch.tensor([[1, 5, 7]]), torch.tensor([0]), torch.tensor([2]))
    assert logits.dtype == torch.float32 and logits.shape == (1, 64)


def test_a_tied_lm_head_stays_tied_and_its_rows_all_train():
    model, _ = tuned_model(tiny_model("gemma2"), "full", "generate")
    stock = model.stock_model
    assert stock.config.tie_word_embeddings
    assert stock.get_input_embeddings().weight is stock.get_output_embeddings().weight


def test_a_random_lm_head_is_refused(tmp_path):
    folder = model_copy(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="lacks weights of a causal model"):
        load_generator(ModelSettings(str(folder), None, "full"), load_tokenizer(str(folder), None))


def test_an_adapter_that_lacks_weights_is_refused(tmp_path):
    save_final(*tuned_model(tiny_model("llama"), "lora", "generate"), tmp_path, task_record("generate"))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "q_proj.lora_B" not in name}, file)
    with pytest.raises(Refused, match=r"lacks weights: .*q_proj\.lora_B"):
        load_language_model(ModelSettings(str(tmp_path)), CPU)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_logits_of_a_16_bit_lm_head_are_float32_also_inside_autocast(method):
    model, _ = tuned_model(tiny_model("llama"), method, "generate", precision="bf16")
    head = model.stock_model.get_output_embeddings()
    assert isinstance(head, Float32Linear) and head.weight.dtype == torch.bfloat16
    hidden = torch.randn(3, head.in_features).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
    assert torch.equal(logits, functional.linear(hidden.float(), head.weight.float()))


def test_logits_of_some_tokens_are_those_of_all_tokens():
    for kind in ("llama", "gemma2"):
        model, _ = tuned_model(tiny_model(kind), "full", "generate")
        hidden = torch.randn(3, 32)
        some = answer_logits(model.stock_model, hidden, [7, 2])
        torch.testing.assert_close(some, answer_logits(model.stock_model, hidden)[:, [7, 2]])
        cap = getattr(model.config, "final_logit_softcapping", None)
        assert cap is None or float(answer_logits(model.stock_model, 1e4 * hidden).detach().abs().max()) <= cap


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_log_likelihoods_of_answers_need_a_part_of_the_vocabulary_at_a_time(kind, monkeypatch):
    """Gemma-2 caps its logits and Granite divides them; the parts' sums are merged, also with peft's wrapped head."""
    model = seeded_model(kind, 0, 61, initializer_range=0.3)
    hidden, targets = (
        3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 60, 7, 7, 30]),
    )
    wanted = answer_logits(model, hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for most in (1, 100, 10**6):
        monkeypatch.setattr(generator, "_MOST_LOGITS", most)
        with torch.no_grad():
            torch.testing.assert_close(answer_log_likelihoods(model, hidden, targets), wanted, atol=1e-5, rtol=1e-5)
    head = model.get_output_embeddings()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Sequential(head))
    for most in (1, 130, 10**6):
        monkeypatch.setattr(generator, "_MOST_LOGITS", most)
        with torch.no_grad():
            torch.testing.assert_close(answer_log_likelihoods(model, hidden, targets), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_the_likeliest_token_is_that_of_the_float32_logits(scale):
    """In bf16 many of these logits tie, and taking the first would be wrong."""
    generator = torch.Generator().manual_seed(0)
    head = float32_linear(nn.Linear(64, 4000, bias=False), cast_weights=False).requires_grad_(False)
    head.weight.data = (scale * torch.randn(4000, 64, generator=generator)).bfloat16()
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace())
    hidden = torch.randn(300, 64, generator=generator).bfloat16()
    wanted = head(hidden).argmax(-1)
    assert torch.equal(likeliest_tokens(model, hidden), wanted)
    assert not torch.equal((hidden @ head.weight.T).argmax(-1), wanted)
    assert torch.equal(likeliest_tokens(model, hidden.float()), wanted)
