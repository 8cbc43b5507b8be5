"""Test a span head on every backbone: nothing else is random, it is float32, and a batch gives the same logits."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CAUSAL, ENCODERS, ROWS, model_copy, padded, tiny_model
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForQuestionAnswering

from zerotune.errors import Refused
from zerotune.models.heads import Float32Linear, is_head_parameter
from zerotune.models.parameters import parameter_groups, parameter_table
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.models.span_head import load_span_model
from zerotune.settings.groups import ModelSettings


def load(kind, method="full", **settings):
    folder = tiny_model(kind)
    return load_span_model(ModelSettings(folder, None, method, **settings), load_tokenizer(folder, None)).eval()


@pytest.mark.parametrize("kind", CAUSAL + ENCODERS)
def test_the_backbone_is_the_checkpoints(kind):
    """transformers' own class leaves Llama's backbone random; ours gives the plain backbone's hidden states."""
    model, plain = load(kind), AutoModel.from_pretrained(tiny_model(kind)).eval()
    ids, mask = padded(ROWS[:1])
    with torch.no_grad():
        hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        head = model.stock_model.qa_outputs
        torch.testing.assert_close(model(ids, mask), F.linear(hidden, head.weight, head.bias), atol=2e-5, rtol=0)
    own = {name.partition(".")[2]: p for name, p in model.stock_model.named_parameters() if "qa_outputs" not in name}
    theirs = {name: p for name, p in plain.named_parameters() if not name.startswith("pooler.")}
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("kind", CAUSAL + ENCODERS)
def test_a_batch_gives_the_logits_of_its_rows(kind, method):
    """2e-5: float32 sums in another order; the tiny logits are about 1."""
    model = load(kind, method)
    with torch.no_grad():
        alone = [model(*padded([row]))[0] for row in ROWS]
        for side in ("right", "left") if kind in CAUSAL else ("right",):
            ids, mask = padded(ROWS, side)
            together = model(ids, mask)
            for row, kept, expected in zip(together, mask, alone, strict=True):
                torch.testing.assert_close(row[kept == 1], expected, atol=2e-5, rtol=0)
    assert torch.cat(alone).std(dim=0).min() > 0.05, "the tokens must differ for this to test anything"


@pytest.mark.parametrize("kind", CAUSAL)
def test_only_the_last_token_has_seen_the_whole_context(kind):
    """That is why "no answer" is at a causal model's last token."""
    model = load(kind)
    other = [*ROWS[2][:4], 13, 13, *ROWS[2][6:]]
    with torch.no_grad():
        first, second = model(*padded([ROWS[2]]))[0], model(*padded([other]))[0]
    assert torch.equal(first[:4], second[:4]) and (first[-1] - second[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "distilbert", "bert", "roberta"])
def test_types_what_trains_and_the_float32_head(kind, method):
    model = load(kind, method, precision="bf16")
    for name, parameter in model.model.named_parameters():
        head = is_head_parameter(name, model.config)
        if method == "full" or head or ".lora_" in name:
            assert parameter.dtype == torch.float32, name
        assert parameter.requires_grad == (
            method == "full" or ".lora_" in name or (head and ".original_module." not in name)
        ), name
    heads = [module for module in model.modules() if isinstance(module, Float32Linear)]
    assert heads and all(head.out_features == 2 for head in heads)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(*padded(ROWS))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    groups = {group["name"]: group for group in parameter_groups(model, 1e-4, 1e-3, 0.1)}
    assert {group["lr"] for name, group in groups.items() if name.startswith("head")} == {1e-3}
    assert [p.shape for p in groups["head, decay"]["params"]] == [(2, 32)]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "distilbert", "bert"])
def test_counts(kind):
    assert parameter_table(load(kind))["head"] == 2 * 32 + 2


def test_the_drawn_head_depends_on_the_seed_only():
    first, again, other = load("llama"), load("llama", "lora", precision="bf16"), load("llama", seed=1)
    heads = [model.stock_model.qa_outputs.weight for model in (first, again, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert not first.stock_model.qa_outputs.bias.any()


@pytest.mark.parametrize("kind", ["llama", "mistral", "distilbert", "bert"])
def test_a_published_span_head_is_kept(kind, tmp_path):
    """transformers' class names Llama's backbone `transformer.`."""
    stock = AutoModelForQuestionAnswering.from_config(read_config(tiny_model(kind), None)).eval()
    stock.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tiny_model(kind), None)
    model = load_span_model(ModelSettings(str(tmp_path), None, "full"), tokenizer).eval()
    ids, mask = padded(ROWS[:1])
    with torch.no_grad():
        output = stock(input_ids=ids, attention_mask=mask)
        expected = torch.stack([output.start_logits, output.end_logits], dim=-1)
        torch.testing.assert_close(model(ids, mask), expected, atol=2e-5, rtol=0)


def test_weights_that_are_missing_are_refused(tmp_path):
    folder = model_copy(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"lacks weights .*up_proj"):
        load_span_model(ModelSettings(str(folder), None, "full"), load_tokenizer(str(folder), None))


def test_a_config_for_more_labels_gives_two_outputs(tmp_path):
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    folder = model_copy(tmp_path / "m", "distilbert", **labels)
    model = load_span_model(ModelSettings(str(folder), None, "full"), load_tokenizer(str(folder), None))
    assert model.stock_model.qa_outputs.out_features == 2


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "distilbert", "bert"])
def test_activation_checkpointing_changes_no_gradient(kind, method):
    gradients = []
    for checkpointing in (False, True):
        model = load(kind, method, activation_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        model(*padded(ROWS)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_attention_on_a_cpu_gives_the_logits_of_sdpa(kind):
    """2e-6: float32 sums in another order."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which uses sdpa")
    own, stock = load(kind), load(kind, attention="sdpa")
    assert own.config._attn_implementation != stock.config._attn_implementation == "sdpa"
    ids, mask = padded(ROWS)
    with torch.no_grad():
        torch.testing.assert_close(own(ids, mask)[mask == 1], stock(ids, mask)[mask == 1], atol=2e-6, rtol=1e-5)
