"""Test step_census.py, which counts a step's kernels on fake tensors: single operations, then a step."""

from dataclasses import replace

import pytest
import torch
from library_step import build_engine, micro_batch
from random_models import Shape, random_model, settings_for, used_ids
from step_census import CASES, CPU, Census, HostReads, Wanted, census_of, task_rows, typical_step
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from zerotune.models.fake import fake_gpu, make_fake

WIDE, NARROW = 4, 2  # bytes of a float32 and of a bf16 number
WANTED = Wanted("auto", tokens_per_device=4096, activation_checkpointing=False)
aten = torch.ops.aten


def counted(function):
    """Return an operation's totals on fake tensors, and the names of the kernels it called."""
    with fake_gpu():
        census = Census()
        function(census)
    return census.total("forward"), set(census.kernels["forward"])


@pytest.mark.parametrize(
    ("operation", "num_bytes", "launches"),
    [
        (lambda a, b, ids: a + b, 3 * 600 * WIDE, 1),
        (lambda a, b, ids: a.add_(b), 3 * 600 * WIDE, 1),  # a is read and written; the result is not counted again
        (lambda a, b, ids: a.copy_(b), 2 * 600 * WIDE, 1),
        (lambda a, b, ids: a + b[:, :1], (2 * 600 + 20) * WIDE, 1),
        (lambda a, b, ids: a + b[:1].expand(20, 30), (2 * 600 + 30) * WIDE, 1),
        (lambda a, b, ids: a.bfloat16(), 600 * (WIDE + NARROW), 1),
        (lambda a, b, ids: a.view(30, 20).t()[3:], 0, 0),
        (lambda a, b, ids: functional.embedding(ids, a), 2 * 7 * 30 * WIDE + 7 * 8, 1),  # seven rows of the table
    ],
)
def test_the_bytes_of_an_operation(operation, num_bytes, launches):
    def run(census):
        a, b, ids = torch.empty(20, 30), torch.empty(20, 30), torch.zeros(7, dtype=torch.int64)
        with census:
            operation(a, b, ids)

    total, _ = counted(run)
    assert (total.bytes, total.launches) == (num_bytes, launches)


def test_a_product_in_float32_takes_longer_than_one_in_16_bits():
    def run(dtype):
        def product(census):
            a = torch.empty(4096, 4096, dtype=dtype)
            with census:
                a @ a

        return counted(product)[0]

    wide, narrow = run(torch.float32), run(torch.bfloat16)
    assert wide.flops == narrow.flops == 2 * 4096**3
    assert wide.seconds == wide.flops / 55e12 and narrow.seconds == narrow.flops / 650e12


def test_attention_dropout_and_norms_are_cudas():
    """A CPU would use its own attention kernel, three kernels for dropout, and 16 bits for a norm."""

    def run(census):
        query, values = torch.empty(2, 4, 8, 16), torch.empty(5, 6, dtype=torch.bfloat16)
        mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
        with census, torch.autocast("cpu", dtype=torch.bfloat16):
            functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
            functional.dropout(values, 0.1)
            assert functional.layer_norm(values, (6,)).dtype == torch.float32

    _, names = counted(run)
    flash, efficient = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
    assert {flash, efficient, "native_dropout", "native_layer_norm"} <= names
    assert not any("for_cpu" in name or "bernoulli" in name for name in names)


def test_what_makes_a_host_wait():
    values = torch.tensor([0.0, 1.0])
    with HostReads() as reads:
        values + 1
        values.sum().item()
        bool((values > 0).all())
        values[values > 0]
        values[torch.tensor([1])]
    assert dict(reads.counts) == {"_local_scalar_dense": 2, "index": 1}


@pytest.fixture
def toys(monkeypatch):
    """Replace every shape by its toy."""
    config = Shape.config
    monkeypatch.setattr(Shape, "config", lambda shape, toy, all_layers=False: config(shape, toy=True))


@pytest.mark.parametrize("case", ["llama-1b-lora-generate", "mistral-7b-qlora"])
def test_a_step_of_a_generator_and_one_in_4_bits_are_counted(case, toys):
    row = census_of(case, "sst2", 8, WANTED)
    assert row["micro"]["launches"] > 50 and row["optimizer"]["bytes"] > 0 and 0 < row["utilisation"] < 1
    assert not row["host_reads"]["optimizer"]


@pytest.mark.parametrize("case", ["llama-1b-full", "gemma-2b-lora", "roberta-large-full"])
def test_the_matrix_products_are_those_of_a_real_step(case, toys):
    shape, _ = CASES[case]
    row, config = census_of(case, "sst2", 8, WANTED), shape.config(toy=True)
    settings = settings_for(shape, "bf16", attention=row["attention"])
    data = task_rows("sst2", 800, config.vocab_size, generates=False)
    step, micros = typical_step(data, 8, WANTED.tokens_per_device)
    engine = build_engine(random_model(config, settings, CPU), settings, used_ids("sst2", config.vocab_size))
    with FlopCounterMode(display=False) as real:
        engine.backward(micro_batch(engine, data.batch(micros[0], CPU), len(step)), is_last=True)
    found = sum(one["flops"] for one in row["operations"] if one["operation"] in ("mm", "addmm", "addmm_"))
    assert found == sum(real.get_flop_counts()["Global"].get(product, 0) for product in (aten.mm, aten.addmm))


def test_recomputed_layers_are_counted(toys):
    plain, recomputed = (
        census_of("llama-1b-lora", "sst2", 8, replace(WANTED, activation_checkpointing=recomputes))["operations"]
        for recomputes in (False, True)
    )
    attention = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_varlen_attn"
    kernels = [
        [one["launches"] for one in row if (one["phase"], one["operation"] in attention) == ("backward", True)]
        for row in (plain, recomputed)
    ]
    assert kernels == [[], [2]], "of a toy's two layers"


def test_tied_weights_stay_tied():
    with torch.device("meta"):
        embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5)
    head.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, head])
    with fake_gpu():
        make_fake(model)
    assert model[0].weight is model[1].weight and model[0].weight.device.type == "cpu"
