"""Test a classifier: the pad contract, its float32 logits, and adapters through peft."""

import pytest
import torch
from tiny_models import CAUSAL, ENCODERS, LABELS, PAD, ROWS, padded, tiny_model
from torch.nn import functional as F

from zerotune.models.classifier import last_positions, load_classifier
from zerotune.models.heads import Float32Linear, head_module_names
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import ModelSettings


def load(kind, method="full", **settings):
    folder = tiny_model(kind)
    return load_classifier(ModelSettings(folder, None, method, **settings), LABELS, load_tokenizer(folder, None)).eval()


def test_last_positions():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    assert last_positions(mask).tolist() == [1, 2, 2, 0]


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("kind", CAUSAL + ENCODERS)
def test_a_batch_gives_the_logits_of_its_rows(kind, method):
    """2e-5: float32 sums in another order; the tiny logits are about 1, and pooling a wrong token changes them by 1."""
    model = load(kind, method)
    with torch.no_grad():
        alone = torch.cat([model(*padded([row])) for row in ROWS])
        for side in ("right", "left") if kind in CAUSAL else ("right",):
            torch.testing.assert_close(model(*padded(ROWS, side)), alone, atol=2e-5, rtol=0)
    assert alone.std(dim=0).min() > 0.01, "the rows must differ for this to test anything"


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_text_that_ends_in_the_pad_id_is_pooled_there(kind):
    model, row = load(kind), [1, 4, 6, PAD]
    with torch.no_grad():
        hidden = model.stock_model.model(torch.tensor([row])).last_hidden_state
        expected = F.linear(hidden[:, -1], model.stock_model.score.weight)
        logits = model(*padded([row, ROWS[2]]))[:1]
        stock = model.model(torch.tensor([row])).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    assert (stock - expected).abs().max() > 0.01, "stock pooling by pad id takes the token before"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "distilbert", "bert", "roberta"])
def test_the_head_is_float32_inside_autocast_and_in_four_bits(kind, method):
    model = load(kind, method, precision="bf16")
    heads = [m for m in model.modules() if isinstance(m, Float32Linear)]
    assert len(heads) >= len(head_module_names(model.config)), "a head was quantised or forgotten"
    seen = []
    heads[-1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], module.weight, module.bias)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(*padded(ROWS))
    hidden, weight, bias = seen[0]
    assert logits.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(hidden.float(), weight, bias), atol=0, rtol=0)
    assert not torch.equal(logits, logits.bfloat16().float()), "the logits were rounded to bf16 on the way"


def test_a_head_that_was_cast_is_noticed():
    with pytest.raises(AssertionError, match="must stay float32"):
        load("llama").bfloat16()(*padded(ROWS))


def test_token_types_reach_only_models_that_have_them():
    ids, mask = padded(ROWS)
    for kind, changes in (("bert", True), ("distilbert", False), ("roberta", False), ("llama", False)):
        model = load(kind)
        with torch.no_grad():
            same = torch.equal(model(ids, mask), model(ids, mask, torch.ones_like(ids)))
        assert same != changes, kind


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "distilbert", "bert"])
def test_activation_checkpointing_changes_no_gradient(kind, method):
    gradients = []
    for checkpointing in (False, True):
        model = load(kind, method, activation_checkpointing=checkpointing).train()
        checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(checkpointed) == checkpointing
        torch.manual_seed(0)
        F.cross_entropy(model(*padded(ROWS)), torch.tensor([0, 1, 0])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name} got no gradient"
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "has_dropout"),
    [
        ("llama", {}, False),
        ("llama", {"method": "lora"}, False),
        ("llama", {"method": "lora", "lora_dropout": 0.1}, True),
        ("bert", {}, True),
        ("bert", {"method": "lora"}, False),
    ],
)
def test_recomputed_layers_keep_the_generators_state_only_for_dropout(kind, changes, has_dropout, monkeypatch):
    model = load(kind, activation_checkpointing=True, **changes).train()
    get_rng_state, reads = torch.get_rng_state, []
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1) or get_rng_state())
    model(*padded(ROWS)).sum().backward()
    assert bool(reads) == has_dropout


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_evaluation_between_two_steps_of_qlora_changes_no_gradient(kind):
    model = load(kind, "qlora", precision="bf16").train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(*padded(ROWS)), torch.tensor([0, 1, 0])).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            model.eval()(*padded(ROWS))
        model.train()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_attention_on_a_cpu_gives_the_logits_and_gradients_of_sdpa(kind, method):
    """Full tuning joins the three projections, which LoRA cannot; 2e-6: float32 sums in another order."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which uses sdpa")
    models = [load(kind, method), load(kind, method, attention="sdpa")]
    assert models[0].config._attn_implementation != models[1].config._attn_implementation == "sdpa"
    results = []
    for model in models:
        logits = model(*padded(ROWS))
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(logits[:, 0].sum(), trainable.values())
        results.append({"logits": logits, **dict(zip(trainable, gradients, strict=True))})
    assert len(results[0]) > 10
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-5)
