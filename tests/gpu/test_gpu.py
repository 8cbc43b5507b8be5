"""Test behaviour that only a GPU shows. measure.sh runs it; ZEROTUNE_GPU_TESTS_ON_CPU=1 runs what it can on a CPU."""

import gc
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from default_settings import optimisation_settings, run_settings
from safetensors.torch import load_file
from tiny_models import CAUSAL, LABELS, tiny_model
from torch import nn
from torch.nn import functional

from zerotune.models import packed, shared_prefix
from zerotune.models.classifier import load_classifier
from zerotune.models.device import on_device
from zerotune.models.fused import use_fused_passes
from zerotune.models.heads import float32_linear
from zerotune.models.parameters import parameter_groups
from zerotune.models.pretrained import load_tokenizer
from zerotune.run.folder import RunFolder
from zerotune.run.launch import start_accelerator
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.tokens import Encoded
from zerotune.training.classification import LabelledData
from zerotune.training.engine import Engine, build_optimizer
from zerotune.training.loop import TrainingLoop
from zerotune.training.schedule import Schedule
from zerotune.training.snapshot import HostMemory, StateFile

HAS_CUDA = torch.cuda.is_available()
ON_CPU = os.environ.get("ZEROTUNE_GPU_TESTS_ON_CPU") == "1" and not HAS_CUDA
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_CUDA or ON_CPU), reason="no CUDA GPU (tests/gpu/measure.sh runs these on one)"),
]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA GPU")

NUM_STEPS, BATCH_SIZE, RATE = 40, 16, 3e-3
FIRST_WORD, NUM_WORDS = 4, 10


def rows(num_rows: int = 256) -> LabelledData:
    """Make sentences of 2 to 12 random words of the tiny vocabulary. The label says whether the first word has a higher
    id than the last: a question of order, which takes some steps to learn."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 13, num_rows)
    texts = [generator.integers(FIRST_WORD, FIRST_WORD + NUM_WORDS, length) for length in lengths]
    labels = np.array([int(text[0] > text[-1]) for text in texts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = Encoded(np.concatenate(texts).astype(np.int32), offsets, num_truncated=0, type_ids=None)
    return LabelledData([str(row) for row in range(num_rows)], encoded, labels, pad_id=3)


def classifier_of(kind: str, method: str = "full", precision: str = "fp32", attention: str = "auto"):
    """Load a tiny model without dropout onto the device."""
    folder = tiny_model(kind)
    settings = ModelSettings(folder, None, method, precision=precision, attention=attention)
    classifier = load_classifier(settings, LABELS, load_tokenizer(folder, None))
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return classifier.to(DEVICE)


def engine_of(classifier, precision: str, max_grad_norm: float = 1.0, fused: bool = True, rate: float = RATE) -> Engine:
    groups = parameter_groups(classifier, rate, rate, weight_decay=0.01)
    optimizer = build_optimizer("adamw", groups, DEVICE.type) if fused else torch.optim.AdamW(groups, foreach=False)
    return Engine(start_accelerator(None), classifier, optimizer, precision, max_grad_norm)


def train(engine: Engine, folder: Path, num_steps: int = NUM_STEPS) -> list[float]:
    """Run the training loop, logging a line at each step. Returns the losses."""
    data = rows()
    schedule = Schedule(
        num_steps=num_steps,
        steps_per_epoch=len(data.labels) // BATCH_SIZE,
        warmup_steps=4,
        eval_every=num_steps + 1,
        checkpoint_every=num_steps + 1,
        log_every=1,
    )
    folder.mkdir(exist_ok=True)
    run = RunFolder(run_settings(folder), engine.accelerator)
    optimisation = optimisation_settings(batch_size=BATCH_SIZE, tokens_per_device=64, learning_rate=RATE)
    validate = lambda: {"loss": 0.0, "accuracy": 0.0}  # noqa: E731
    loop = TrainingLoop(run, engine, data, schedule, optimisation, validate, SimpleNamespace(name=None))
    for step in loop:
        for batch in step:
            logits = engine.forward(**batch.inputs)
            loss = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
            engine.backward(loss * batch.weight, batch.is_last)
        engine.update(step.rate_factor)
    logged = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert len(losses) == num_steps
    return losses


@pytest.mark.parametrize("kind", ["llama", "gemma2", "distilbert"])
def test_bf16_follows_float32(kind, tmp_path):
    """bf16 keeps 8 bits: each product is off by up to 2^-9, and over the steps the weights drift apart. On a CPU the
    curves came within 0.004 (Gemma-2), 0.008 (Llama) and 0.031 (DistilBERT) while the loss fell by 0.3 to 0.5."""
    exact = train(engine_of(classifier_of(kind), "fp32"), tmp_path / "fp32")
    rounded = train(engine_of(classifier_of(kind, precision="bf16"), "bf16"), tmp_path / "bf16")
    assert exact != rounded
    assert np.abs(np.array(exact) - np.array(rounded)).max() < 0.1
    assert np.mean(exact[-8:]) < np.mean(exact[:8]) - 0.1, "nothing was learned: the curves say nothing"


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_fp16_trains_under_loss_scaling(kind, tmp_path):
    engine = engine_of(classifier_of(kind, precision="fp16"), "fp16")
    losses = train(engine, tmp_path)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1
    assert engine.scaler.get_scale() >= 1


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_nf4_qlora_trains_evaluates_and_trains_again(kind, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    classifier = classifier_of(kind, method="qlora", precision="bf16")
    num_quantised = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in classifier.modules())
    assert num_quantised == 7 * classifier.config.num_hidden_layers
    engine = engine_of(classifier, "bf16", rate=10 * RATE)
    data = rows()
    losses = train(engine, tmp_path)
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1
    classifier.eval()
    with torch.no_grad():
        before = engine.forward(**data.inputs(np.arange(8), DEVICE))
    assert before.dtype == torch.float32 and before.isfinite().all()
    again = train(engine, tmp_path / "again", num_steps=4)
    assert np.mean(again) < np.mean(losses[:8]), "an evaluation in between changed the quantised layers"


@pytest.mark.parametrize("kind", CAUSAL)
def test_padding_changes_no_logit_in_bf16(kind):
    """Compare a row on its own with the same row padded on either side in a batch with a longer one. A GPU may add up
    bf16 products of other shapes in another order: differences of some 2^-8 in logits of order 1. (On a CPU: 1e-7.)"""
    classifier = classifier_of(kind, precision="bf16").eval()
    data = rows(64)
    short, long = int(data.lengths.argmin()), int(data.lengths.argmax())
    pair = data.inputs(np.array([short, long]), DEVICE)
    left = {name: values.clone() for name, values in pair.items()}
    length, width = int(data.lengths[short]), pair["input_ids"].shape[1]
    for values in left.values():
        values[0] = values[0].roll(width - length)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        alone = classifier(**data.inputs(np.array([short]), DEVICE))[0]
        right_padded, left_padded = classifier(**pair)[0], classifier(**left)[0]
    assert alone.dtype == torch.float32
    assert (alone - right_padded).abs().max() < 0.05 * alone.abs().max() + 0.02
    assert (alone - left_padded).abs().max() < 0.05 * alone.abs().max() + 0.02


@needs_cuda
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_flash_attention_gives_the_logits_of_sdpa(kind):
    pytest.importorskip("flash_attn")
    data = rows(16)
    logits = []
    for attention in ("sdpa", "flash_attention_2"):
        classifier = classifier_of(kind, precision="bf16", attention=attention).eval()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            logits.append(classifier(**data.inputs(np.arange(16), DEVICE)))
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max() + 0.02


def test_clipping_inside_the_fused_step_is_clipping(tmp_path):
    """The fused AdamW divides gradients as it reads them. It differs from the plain way only by rounding (1e-7 on a
    CPU; a GPU adds up in another order). Without clipping, the losses are 0.015 away."""
    weights, losses = [], []
    for fused in (True, False):
        engine = engine_of(classifier_of("llama"), "fp32", max_grad_norm=0.05, fused=fused)
        losses.append(train(engine, tmp_path / str(fused), num_steps=8))
        weights.append([parameter.detach().clone() for parameter in engine.trainable])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    free = train(engine_of(classifier_of("llama"), "fp32", max_grad_norm=0.0), tmp_path / "free", num_steps=8)
    assert np.abs(np.array(losses[0]) - np.array(free)).max() > 2e-3, "these steps are not clipped"


@needs_cuda
def test_a_run_leaves_no_memory_behind(tmp_path):
    """The first run sets up libraries; the second must free everything it allocates."""
    for name in ("first", "second"):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        train(engine_of(classifier_of("llama", precision="bf16"), "bf16"), tmp_path / name, num_steps=4)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20


@needs_cuda
def test_the_kernel_of_packed_rows_lets_prompts_attend_to_one_copy_of_the_shots():
    """Compare values and log-sum-exps with products."""
    assert shared_prefix.bounds_work()


@needs_cuda
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_of_packed_rows_gives_the_references_numbers(causal, window, softcap):
    """Compare values and gradients, with fewer key than query heads; bf16 keeps 8 bits."""
    if softcap is not None:
        pytest.importorskip("flash_attn")
    assert packed.kernel_works(softcap is not None)
    lengths, draw = (5, 1, 130, 64), torch.Generator().manual_seed(0)
    bounds = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    inputs = [torch.randn(1, heads, sum(lengths), 64, generator=draw) for heads in (8, 2, 2)]
    upstream = torch.randn(1, sum(lengths), 8, 64, generator=draw)
    found = []
    for device in ("cuda", "cpu"):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        query, key, value = (states.bfloat16().to(device, dtype).requires_grad_() for states in inputs)
        given = {"cu_seq_lens_q": bounds.to(device), "max_length_q": max(lengths), "is_causal": causal}
        given |= {"softcap": softcap}
        mixed, _ = packed.attention(None, query, key, value, None, sliding_window=window, **given)
        mixed.float().mul(upstream.to(device)).sum().backward()
        found.append([states.float().cpu() for states in (mixed, query.grad, key.grad, value.grad)])
    for rounded, exact in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.02 * exact.norm()


@needs_cuda
@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert"])
def test_packed_rows_give_the_padded_logits(kind):
    """Compare a whole model in bf16 with its sdpa logits."""
    found = []
    for attention in ("sdpa", "varlen"):
        classifier = classifier_of(kind, precision="bf16", attention=attention).eval()
        inputs = {"input_ids": np.array([[5, 6, 7, 3], [5, 9, 3, 3]])}
        inputs["attention_mask"] = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
        if attention == "varlen":
            packed.use_packed_attention(classifier.stock_model)
            inputs = packed.pack(inputs)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found.append(classifier(**on_device(inputs, DEVICE)))
    torch.testing.assert_close(*found, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("way", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "roberta"])
def test_fused_passes_follow_the_stock_ones(kind, way, tmp_path):
    """Compare the losses of bf16 training; why_kernels_fail checks the passes' own numbers before they are used."""
    if way == "qlora":
        pytest.importorskip("bitsandbytes")
    losses = []
    for compiles in ("none", "auto"):
        classifier = classifier_of(kind, way, "bf16")
        settings = ModelSettings("m", method=way, precision="bf16", compile=compiles)
        passes, problem = use_fused_passes(classifier.stock_model, settings, DEVICE)
        assert problem is None and bool(passes) == (compiles == "auto" and HAS_CUDA)
        losses.append(train(engine_of(classifier, "bf16"), tmp_path / compiles))
    assert np.abs(np.array(losses[0]) - np.array(losses[1])).max() < 0.1


@needs_cuda
def test_a_frozen_head_in_bf16_gives_float32s_logits():
    head = float32_linear(nn.Linear(256, 1000, bias=False).bfloat16(), cast_weights=False).requires_grad_(False).cuda()
    hidden = torch.randn(7, 256, device="cuda").bfloat16().requires_grad_()
    logits, exact = head(hidden), functional.linear(hidden.float(), head.weight.float())
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(each, hidden, torch.ones_like(each))[0] for each in (logits, exact)]
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_a_copy_of_the_state_is_of_the_moment_when_it_was_taken(tmp_path):
    """A GPU must copy 128 MB to pinned memory before operations queued later change the tensors."""
    state = {str(number): torch.full((2**24,), float(number), device=DEVICE) for number in (1, 2)}
    memory = HostMemory()
    for turn in range(2):  # the second turn reuses the memory
        write = memory.begin([StateFile("model.safetensors", state)], tmp_path, 0)
        for tensor in state.values():
            tensor.add_(10)
        assert torch.from_numpy(memory._memory).is_pinned() == HAS_CUDA
        write()
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            assert tensor.eq(int(name) + 10 * turn).all()
    memory.close()
