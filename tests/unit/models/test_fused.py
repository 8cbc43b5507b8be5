"""Fused passes give the stock model's logits and gradients in float32, no worse ones in 16 bits, and compile once."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import LABELS, tiny_model
from torch._dynamo.utils import counters
from torch.nn import functional

from zerotune.models import fused, fused_functions, fused_kernels
from zerotune.models.classifier import load_classifier
from zerotune.models.device import on_device
from zerotune.models.families import CAUSAL, SUPPORTED
from zerotune.models.fused import ADAPTER, PRODUCT
from zerotune.models.fused_kernels import GATE, LAYER_NORM, NORM, RESIDUAL, ROTARY
from zerotune.models.precision import autocast
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import ModelSettings

CPU = torch.device("cpu")
BERT_LIKE = ("distilbert", "bert", "roberta", "xlm-roberta", "electra", "deberta-v2")
UNUSUAL_LAYERS = {"qwen3_5_text", "olmo2", "olmo3", "granite"}  # their residual sums and products are not fused


def model_of(kind, method="full", precision="fp32", recomputes=False):
    settings = ModelSettings(
        tiny_model(kind), None, method, attention="eager", precision=precision, activation_checkpointing=recomputes
    )
    model = load_classifier(settings, LABELS, load_tokenizer(tiny_model(kind), None)).train(recomputes)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would hide the other factor
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def outcome(model, precision="fp32", num_rows=3, length=9, seed=0):
    """Return the logits of texts of different lengths, and the gradients of a loss on them, in float32."""
    ids = np.random.default_rng(seed).integers(4, 14, (num_rows, length))
    mask = (np.arange(length) < length - np.arange(num_rows)[:, None]).astype(np.int64)
    model.zero_grad()
    with autocast("cpu", precision):
        logits = model(**on_device({"input_ids": ids, "attention_mask": mask}, CPU))
    functional.cross_entropy(logits.float(), torch.arange(num_rows) % 2).backward()
    gradients = {name: part.grad.float() for name, part in model.named_parameters() if part.grad is not None}
    return {"logits": logits.detach()} | gradients


def expected_passes(kind, way):
    """Return the passes that are fused in a family: an encoder has layer norms with a bias, Mixtral has experts."""
    if kind in BERT_LIKE:
        return {LAYER_NORM, ADAPTER if way == "lora" else PRODUCT}
    layers = {NORM, ROTARY, GATE, RESIDUAL} if kind in CAUSAL else set()
    layers -= {RESIDUAL} if kind in UNUSUAL_LAYERS else {GATE} if kind == "mixtral" else set()
    return layers | ({ADAPTER} if way in ("lora", "qlora") else {PRODUCT} if RESIDUAL in layers else set())


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, way) for kind in CAUSAL for way in ("full", "lora", "checkpointing")),
        *((kind, way) for kind in BERT_LIKE for way in ("full", "lora", "checkpointing")),
        *((kind, "lora") for kind in SUPPORTED if kind not in CAUSAL and kind not in BERT_LIKE),
        ("llama", "qlora"),
    ],
)
def test_fused_passes_give_the_stock_models_logits_and_gradients(kind, way):
    model = model_of(kind, "full" if way == "checkpointing" else way, recomputes=way == "checkpointing")
    wanted = outcome(model)
    assert {*fused.fuse(model)} == expected_passes(kind, way)
    assert fused.fuse(model) in ((), (ROTARY,)), "fused again"
    calls = []
    for name, module in model.named_modules():
        if name.endswith("layers.0.mlp"):
            module.register_forward_pre_hook(lambda *_: calls.append("computed"))
    found = outcome(model)
    assert len(calls) == (2 if way == "checkpointing" else 1) or kind not in CAUSAL
    assert found.keys() == wanted.keys() and len(found) > 3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=3e-6, rtol=1e-4)


def test_dropout_before_a_layer_norm():
    """Dropped values add nothing and get no gradient; the rest is scaled, as in `torch.nn.Dropout`."""
    torch.manual_seed(0)
    residual, added = torch.randn(40, 8), torch.randn(40, 8, requires_grad=True)
    weight, bias = torch.randn(8), torch.randn(8)
    arguments = 0.25, weight, bias, 1e-6, None, fused_functions.Readers()
    normed, narrow = fused_functions.LayerNorm.apply(residual, added, *arguments)
    upstream = torch.randn(40, 8)
    (gradient,) = torch.autograd.grad(normed, added, upstream)
    keep = gradient != 0
    assert narrow is None and 0.15 < 1 - keep.float().mean() < 0.35
    wanted = functional.layer_norm(residual + added * keep / 0.75, (8,), weight, bias, 1e-6)
    torch.testing.assert_close(normed, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, added, upstream)[0], atol=1e-5, rtol=1e-4)


def test_other_models_of_the_family_rotate_as_before(monkeypatch):
    fused.fuse(model_of("llama"))
    other, wanted = model_of("llama"), outcome(model_of("llama"))
    monkeypatch.setattr(fused, "_rotate_both", None)
    found = outcome(other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "phi3", "roberta", "distilbert"])
def test_fused_passes_round_no_more_than_the_stock_ones(kind, method):
    """Distances are from the same weights in float32. With few texts, either rounding may be a third better."""
    ratios = []
    for seed in range(5):
        model = model_of(kind, method, "bf16")
        stock = outcome(model, "bf16", seed=seed)
        fused.fuse(model)
        found = outcome(model, "bf16", seed=seed)
        assert found.keys() == stock.keys()
        ratios.append(distance(found, exact := outcome(model.float(), seed=seed)) / distance(stock, exact))
    assert 0 < np.median(ratios) < 1.3


def distance(found, exact):
    """Return the distance of logits and gradients from others, taken as one vector."""
    return sum((found[name] - exact[name]).square().sum().item() for name in exact) ** 0.5


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_other_lengths_compile_nothing_new(kind, monkeypatch):
    monkeypatch.setattr(fused_kernels, "_BACKEND", "aot_eager")
    monkeypatch.setattr(fused_functions, "run", fused_kernels.run_compiled)
    forget_compiled_passes()
    model = model_of(kind, "full", "bf16")
    fused.fuse(model)
    outcome(model, "bf16")
    num_compiled = counters["stats"]["unique_graphs"]
    assert num_compiled >= (8 if kind == "llama" else 3)
    # an encoder's batch of one text has one row of pooled tokens, which would be another kernel
    for num_rows, length in ((2, 11), (7, 3), (1 if kind == "llama" else 3, 20)):
        outcome(model, "bf16", num_rows, length)
    assert counters["stats"]["unique_graphs"] == num_compiled
    forget_compiled_passes()


def test_many_widths_compile_in_another_thread(monkeypatch):
    """A GPU's backward pass has its own thread, with torch's own limits."""
    monkeypatch.setattr(fused_kernels, "_BACKEND", "eager")
    forget_compiled_passes()
    widths = range(2, 24, 2)

    def norms():
        assert len(widths) > torch._dynamo.config.recompile_limit
        return [
            fused_kernels.run_compiled(
                fused_kernels.norm, torch.ones(5, width), torch.ones(width), 0.0, 0.0, torch.float32
            ).sum()
            for width in widths
        ]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(norms).result() == [5 * width for width in widths]
    forget_compiled_passes()


def forget_compiled_passes():
    fused_kernels._compiled.cache_clear()
    torch.compiler.reset()
    counters.clear()


def test_where_passes_are_fused(monkeypatch):
    """In 16 bits, if the kernels are right and no flag forbids it; a line says why if they are missing unexpectedly."""
    monkeypatch.setattr(fused, "why_kernels_fail", lambda *_: None)
    monkeypatch.setattr(fused_kernels, "_compiling", set())
    gpu, narrow = torch.device("cuda"), ModelSettings("m", precision="bf16")
    assert fused.use_fused_passes(model_of("llama"), narrow, gpu)[0] == tuple(sorted(expected_passes("llama", "full")))
    for settings, device in (
        (narrow, CPU),
        (replace(narrow, precision="fp32"), gpu),
        (replace(narrow, compile="none"), gpu),
    ):
        model = model_of("llama")
        assert fused.use_fused_passes(model, settings, device) == ((), None)
        assert not any("forward" in vars(module) for module in model.modules())
    assert fused_kernels._compiling == {"cuda"}
    monkeypatch.setattr(fused, "_LEAST_ON_CPU", 1000)
    assert fused.use_fused_passes(model, narrow, CPU)[0] and fused_kernels._compiling == {"cuda", "cpu"}
    passes = tuple(sorted(expected_passes("roberta", "full")))
    assert fused.use_fused_passes(model_of("roberta"), narrow, gpu) == (passes, None)
    assert fused.use_fused_passes(model_of("roberta"), narrow, CPU) == ((), None), "a CPU has kernels of its own for it"
    assert "ZeRO-3" in fused.use_fused_passes(model, replace(narrow, zero_stage=3), gpu)[1]
    monkeypatch.setattr(fused, "why_kernels_fail", lambda *_: "no compiler")
    assert fused.use_fused_passes(model, narrow, gpu) == ((), "--compile is off: no compiler")


def test_a_gpu_whose_kernels_cannot_be_checked_says_why():
    if not torch.cuda.is_available():
        assert "CUDA" in fused_kernels.why_kernels_fail("cuda", torch.bfloat16)


def test_products_in_bf16_on_a_cpu_have_few_numbers_of_rows():
    sizes = {num: len(fused_functions.steady(torch.zeros(num, 1, dtype=torch.bfloat16))) for num in range(1, 2049)}
    assert len({*sizes.values()}) == 32
    assert all(num <= size <= max(num + 31, 1.125 * num) for num, size in sizes.items())
    padded = fused_functions.steady(torch.ones(37, 2, dtype=torch.bfloat16))
    assert padded[:37].eq(1).all() and padded[37:].eq(0).all() and len(fused_functions.steady(torch.ones(37, 2))) == 37


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_this_cpus_compiler_gives_the_right_numbers():
    forget_compiled_passes()
    for dtype in (torch.bfloat16, torch.float16):
        assert fused_kernels.why_kernels_fail("cpu", dtype) is None
        assert fused_kernels.why_kernels_fail("cpu", dtype, of_encoder=True) is None
    forget_compiled_passes()
