"""final/ of a span head gives the same logits again: through zerotune, and by the lines of its README without it."""

import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import IDS, MASK, move_weights, tiny_model
from transformers import LlamaForQuestionAnswering

from zerotune.errors import Refused
from zerotune.models.final_folder import load_final_span, save_final
from zerotune.models.pretrained import load_tokenizer
from zerotune.models.span_head import load_span_model
from zerotune.settings.groups import ModelSettings

pytestmark = pytest.mark.usefixtures("plain_four_bits")

KINDS = ["llama", "gemma2", "gemma3_text", "mistral", "qwen2", "distilbert", "bert", "roberta"]


def tuned(kind, method, **settings):
    """A span finder whose trainable weights have moved, and its tokenizer."""
    folder = tiny_model(kind)
    tokenizer = load_tokenizer(folder, None)
    model = load_span_model(ModelSettings(folder, None, method, **settings), tokenizer)
    move_weights(model)
    return model.eval(), tokenizer


def logits(model):
    with torch.no_grad():
        return model(IDS, MASK)[MASK == 1]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_by_us_it_gives_the_same_logits(kind, method, gathered, tmp_path):
    model, tokenizer = tuned(kind, method)
    trained = {n: p.detach().clone() for n, p in model.model.named_parameters() if p.requires_grad}
    save_final(model, tokenizer, tmp_path, {"task": "squad", "head": "span"}, trained if gathered else None)
    again, its_tokenizer, task = load_final_span(ModelSettings(str(tmp_path)))
    assert torch.equal(logits(again), logits(model))
    assert its_tokenizer.pad_token_id == tokenizer.pad_token_id
    base = {"base_model": tiny_model(kind), "base_revision": None}
    assert task == {"task": "squad", "head": "span", "method": method, "dtype": "float32", **base}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_its_readme_give_the_same_logits(kind, method, tmp_path, monkeypatch):
    model, tokenizer = tuned(kind, method)
    save_final(model, tokenizer, tmp_path, {"task": "squad"})
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.startswith("model = ")]) == 1
    assert ("class SpanModel" in code) == kind.startswith("gemma"), "transformers has a class for the others"
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    with torch.no_grad():
        output = names["model"].eval()(input_ids=IDS, attention_mask=MASK)
    plain = torch.stack([output.start_logits, output.end_logits], dim=-1)[MASK == 1]
    torch.testing.assert_close(plain, logits(model), atol=5e-6, rtol=0)
    assert names["model"].config.pad_token_id == names["tokenizer"].pad_token_id == 3


def test_a_final_llama_is_a_plain_checkpoint_of_its_class(tmp_path):
    model, tokenizer = tuned("llama", "full")
    save_final(model, tokenizer, tmp_path, {})
    weights = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"transformer", "qa_outputs"}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    _, info = LlamaForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_tuning_goes_on_from_a_final_folder(tmp_path):
    model, tokenizer = tuned("qwen2", "full")
    save_final(model, tokenizer, tmp_path, {})
    again = load_span_model(ModelSettings(str(tmp_path), None, "lora"), tokenizer).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=5e-6, rtol=0)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_head_of_a_loaded_adapter_stays_float32(method, tmp_path):
    model, tokenizer = tuned("gemma2", method, precision="bf16")
    save_final(model, tokenizer, tmp_path, {})
    trained = model.model.get_base_model().qa_outputs.weight
    for wanted in ("full", "qlora"):
        again, _, _ = load_final_span(ModelSettings(str(tmp_path), precision="bf16", method=wanted))
        head = again.stock_model.qa_outputs.weight
        assert head.dtype == torch.float32 and torch.equal(head, trained)
        assert again.stock_model.model.norm.weight.dtype == torch.bfloat16
        assert any(p.dtype == torch.uint8 for p in again.parameters()) == ("qlora" in (wanted, method))


def test_checkpoints_without_a_span_head():
    again, _, task = load_final_span(ModelSettings(tiny_model("distilbert")))
    assert task is None and logits(again).shape == (8, 2)
    with pytest.raises(Refused, match="no span head"):
        load_final_span(ModelSettings(tiny_model("llama")))
