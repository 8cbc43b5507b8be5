"""Packed rows give the padded model's logits and gradients, without padding, a mask or a read from the device."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_reads import HostReads
from tiny_models import LABELS, model_copy, tiny_model
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, BertModel

from zerotune.errors import Refused
from zerotune.models import packed
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.classifier import load_classifier
from zerotune.models.device import on_device
from zerotune.models.families import CAUSAL, SUPPORTED
from zerotune.models.generator import load_generator
from zerotune.models.loading import check_trainable
from zerotune.models.packed import pack, packs_rows, use_packed_attention, why_not_packed
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.models.span_head import load_span_model
from zerotune.settings.groups import ModelSettings

CPU = torch.device("cpu")
PACKED = [kind for kind in SUPPORTED if why_not_packed(read_config(tiny_model(kind), None)) is None]
LENGTHS = [3, 9, 5, 7, 12]
LOADERS = {
    "classify": lambda settings, tokenizer: load_classifier(settings, LABELS, tokenizer),
    "span": load_span_model,
    "generate": load_generator,
}


def padded_batch():
    """Make texts of several lengths, one longer than the tiny models' sliding windows, padded on the right."""
    generator = np.random.default_rng(0)
    ids = np.full((len(LENGTHS), max(LENGTHS)), 3)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = [1, *generator.integers(4, 14, length - 1)]
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def generator_inputs(inputs):
    """Return a generator's padded and packed inputs, with the positions of each text's last two tokens."""
    owners, columns = (
        np.repeat(np.arange(len(LENGTHS)), 2),
        np.array([end - back for end in LENGTHS for back in (2, 1)]),
    )
    plain = {"input_ids": inputs["input_ids"], "rows": owners, "columns": columns}
    row = pack(inputs)
    packed_row = {name: row[name] for name in ("input_ids", "bounds", "longest")}
    packed_row |= {"positions": row["position_ids"], "rows": np.zeros_like(owners)}
    return plain, packed_row | {"columns": row["bounds"][owners] + columns}


def outcome(model, inputs, mask, head):
    """Return the logits of real tokens, and the gradients of a loss on them."""
    model.zero_grad()
    logits = model(**on_device(inputs, CPU))
    if head == "span":
        logits = logits[torch.from_numpy(mask) == 1]
    targets = torch.arange(len(logits)) % 2
    functional.cross_entropy(logits, targets).backward()
    gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    return logits.detach(), gradients


def packs_in_training(settings, config):
    return packs_rows(settings, config, trains=True)


@pytest.mark.parametrize("way", ["full", "lora", "checkpointing"])
@pytest.mark.parametrize(
    ("kind", "head"), [(kind, head) for kind in PACKED for head in LOADERS if head != "generate" or kind in CAUSAL]
)
def test_packed_rows_give_the_padded_models_logits_and_gradients(kind, head, way):
    tokenizer = load_tokenizer(tiny_model(kind), None)
    method, recomputes = ("lora", False) if way == "lora" else ("full", way == "checkpointing")
    settings = ModelSettings(tiny_model(kind), None, method, attention="varlen", activation_checkpointing=recomputes)
    model = LOADERS[head](settings, tokenizer).train(recomputes)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    inputs = padded_batch()
    plain, row = generator_inputs(inputs) if head == "generate" else (inputs, pack(inputs))
    wanted, wanted_gradients = outcome(model, plain, inputs["attention_mask"], head)
    use_packed_attention(model.stock_model)
    with HostReads() as reads:
        found, gradients = outcome(model, row, inputs["attention_mask"], head)
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) > 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], atol=3e-6, rtol=1e-4)
    assert reads.count == 0


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_positions_belong_to_the_pad_of_the_config(kind, tmp_path):
    """Its tokenizer pads with 3; the config counts positions from 7, an ordinary token of these texts."""
    folder = str(model_copy(tmp_path / "m", kind, pad_token_id=7))
    tokenizer = load_tokenizer(folder, None)
    model = load_classifier(ModelSettings(folder, None, "full", attention="varlen"), LABELS, tokenizer).eval()
    inputs = padded_batch()
    assert tokenizer.pad_token_id == 3 and any(7 in ids for ids in inputs["input_ids"].tolist())
    stock = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    stock.load_state_dict(model.stock_model.state_dict())
    with torch.inference_mode():
        rows = [torch.from_numpy(ids[:length])[None] for ids, length in zip(inputs["input_ids"], LENGTHS, strict=True)]
        alone = torch.cat([stock(row).logits for row in rows])
        torch.testing.assert_close(model(**on_device(inputs, CPU)), alone)
        use_packed_attention(model.stock_model)
        torch.testing.assert_close(model(**on_device(pack(inputs), CPU)), alone)


def test_an_encoder_of_one_layer_pools_the_first_token_of_each_text(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("bert"), folder)
    config = read_config(str(folder), None)
    config.num_hidden_layers = 1
    BertModel(config).save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder), None)
    model = LOADERS["classify"](ModelSettings(str(folder), None, "lora", attention="varlen"), tokenizer).eval()
    inputs = padded_batch()
    wanted, _ = outcome(model, inputs, inputs["attention_mask"], "classify")
    use_packed_attention(model.stock_model)
    found, _ = outcome(model, pack(inputs), inputs["attention_mask"], "classify")
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("head", ["classify", "span"])
@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind not in CAUSAL])
def test_padded_rows_of_an_encoder_ask_the_device_nothing(kind, head, monkeypatch):
    """Full tuning, with dropout on scores, pads an encoder's rows; sdpa's mask is made without reading the device."""
    settings = ModelSettings(tiny_model(kind), None, "full", attention="sdpa", drop_unpooled=False)
    model = LOADERS[head](settings, load_tokenizer(tiny_model(kind), None)).eval()
    inputs = padded_batch()
    with HostReads() as reads:
        found, gradients = outcome(model, inputs, inputs["attention_mask"], head)
    monkeypatch.setattr(packed, "_key_mask", lambda config, mask: mask)
    with HostReads() as stock_reads:
        wanted, wanted_gradients = outcome(model, inputs, inputs["attention_mask"], head)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)
    assert reads.count < stock_reads.count


def test_what_a_packed_row_is():
    inputs = {"input_ids": np.array([[5, 6, 0], [7, 8, 9]]), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    row = pack(inputs | {"token_type_ids": np.array([[0, 1, 0], [0, 0, 1]])})
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and row["token_type_ids"].tolist() == [[0, 1, 0, 0, 1]]
    assert row["position_ids"].tolist() == [[0, 1, 0, 1, 2]] and row["places"].tolist() == [0, 1, 3, 4, 5]
    assert row["bounds"].tolist() == [0, 2, 5] and row["bounds"].dtype == np.int32 and row["longest"] == 3


def test_who_reads_packed_rows():
    assert {"llama", "gemma", "gemma3_text", "mistral", "qwen2", "qwen3", "distilbert", "bert", "roberta"} <= {*PACKED}
    assert not {"qwen3_5_text", "deberta-v2", "albert", "modernbert"} & {*PACKED}
    config = read_config(tiny_model("llama"), None)
    assert packs_in_training(ModelSettings("m", attention="varlen"), config)
    assert not packs_in_training(ModelSettings("m", attention="sdpa", precision="bf16"), config)
    assert packs_in_training(ModelSettings("m", precision="bf16"), config) == (
        torch.cuda.is_available() and packed.kernel_works()
    )
    with pytest.raises(Refused, match="--attention varlen: deberta-v2 computes its attention differently"):
        attention_kernel("varlen", read_config(tiny_model("deberta-v2"), None))


def test_what_a_gpu_packs(monkeypatch):
    """By default it packs if the kernel gives the reference's numbers; float32 and impossible cases are refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packed, "kernel_works", lambda caps_scores: True)
    config, narrow = read_config(tiny_model("llama"), None), ModelSettings("m", precision="bf16")
    assert packs_in_training(narrow, config) and not packs_in_training(replace(narrow, precision="fp32"), config)
    capped = read_config(tiny_model("gemma2"), None)
    assert not packs_in_training(narrow, capped)
    encoder = read_config(tiny_model("bert"), None)
    encoder.attention_probs_dropout_prob = 0.1  # the kernel has no dropout; LoRA trains without
    assert packs_rows(narrow, encoder, trains=False)  # nothing is dropped
    assert not packs_in_training(narrow, encoder) and packs_in_training(replace(narrow, method="lora"), encoder)
    for attention in ("varlen", "flex_attention"):
        with pytest.raises(Refused, match=f"--attention {attention} has no dropout on a GPU"):
            check_trainable(ModelSettings("m", precision="bf16", attention=attention), encoder, None)
    for width in (26, 100, 264):  # the kernel's own rule
        odd = read_config(tiny_model("llama"), None)
        odd.head_dim = width
        assert f"its heads are {width} wide" in why_not_packed(odd) and not packs_in_training(narrow, odd)
    with pytest.raises(Refused, match="gemma2 caps its attention scores, which needs flash-attn"):
        attention_kernel("varlen", capped)
    monkeypatch.setattr(packed, "is_flash_attn_2_available", lambda: True)
    assert packs_in_training(narrow, capped) and attention_kernel("varlen", capped) == "eager"  # for padded rows
    monkeypatch.setattr(packed, "kernel_works", lambda caps_scores: not caps_scores)
    assert packs_in_training(narrow, config) and not packs_in_training(narrow, capped)
    monkeypatch.setattr(packed, "kernel_works", lambda caps_scores: False)
    assert not packs_in_training(narrow, config)
    with pytest.raises(Refused, match=r"--attention varlen needs a GPU with flash attention"):
        attention_kernel("varlen", config)
    with pytest.raises(Refused, match="--attention varlen computes in 16 bits on a GPU"):
        check_kernel_precision("varlen", "fp32")


@pytest.mark.parametrize(
    ("causal", "window", "sides"),
    [(True, None, (-1, 0)), (True, 5, (4, 0)), (False, None, (-1, -1)), (False, 5, (5, 5))],
)
@pytest.mark.parametrize("takes_groups", [True, False])
def test_what_the_gpus_kernel_is_given(monkeypatch, causal, window, sides, takes_groups):
    """It gets 16 bits, [tokens, heads, dim], and the number of tokens seen on each side, without the token itself."""
    from torch.nn.attention import varlen

    given = {}

    def kernel(query, key, value, bounds, _, longest, __, *, scale, window_size, enable_gqa=False):
        given.update(
            keys=key.shape, dtype=key.dtype, sides=window_size, groups=enable_gqa, longest=longest, scale=scale
        )
        return query

    def without_groups(*states, scale, window_size):
        return kernel(*states, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", kernel if takes_groups else without_groups)
    query, key = torch.randn(1, 4, 24, 8), torch.randn(1, 2, 24, 8)
    bounds = torch.tensor([0, 9, 24], dtype=torch.int32)
    found = packed._varlen(query, key, key.bfloat16(), bounds, 15, 0.1, causal, window)
    assert found.shape == (1, 24, 4, 8) and given == {
        "keys": (24, 2 if takes_groups else 4, 8),
        "dtype": torch.bfloat16,
        "sides": sides,
        "groups": takes_groups,
        "longest": 15,
        "scale": 0.1,
    }


def test_capped_scores_are_flash_attns(monkeypatch):
    """flash-attn is called with its own argument names, and its result goes back into the row."""

    def flash_attn_varlen_func(query, key, value, bounds, bounds_k, longest, longest_k, *, softmax_scale, **how):
        assert bounds is bounds_k and longest == longest_k == 15 and query.dtype == torch.bfloat16
        assert how == {"causal": True, "window_size": (4, 0), "softcap": 2.0}
        heads_first = (each.transpose(0, 1)[None] for each in (query, key, value))
        return packed._reference(*heads_first, bounds, softmax_scale, True, 5, how["softcap"])[0]

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    query, key, value = (torch.randn(1, heads, 24, 8).bfloat16() for heads in (4, 2, 2))
    bounds = torch.tensor([0, 9, 24], dtype=torch.int32)
    arguments = (query, key, value, bounds, 15, 0.5, True, 5)
    wanted = packed._reference(query, key, value, bounds, 0.5, True, 5, 2.0)
    torch.testing.assert_close(packed._varlen(*arguments, 2.0), wanted)
    assert not torch.allclose(wanted, packed._reference(query, key, value, bounds, 0.5, True, 5), atol=1e-3)
