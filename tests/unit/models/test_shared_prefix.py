"""A prefix computed once gives the hidden states of whole rows, and no part of it is copied."""

import itertools

import numpy as np
import pytest
import torch
from host_reads import HostReads
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import seeded_model

from zerotune.models import shared_prefix as module
from zerotune.models.shared_prefix import SharedPrefix, SharedRows, shared_prefix

CPU = torch.device("cpu")
PREFIX = [1, 4, 6, 7, 8, 10, 5, 9, 11, 30, 31, 32]
TAILS = [[5, 9, 11, 4, 12, 20, 21, 22, 23], [11], [12, 13, 17]]
LENGTHS = np.array([len(tail) for tail in TAILS])
# Some windows are shorter than the prefix, so only some tokens see into it; others are longer than any prompt.
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
CASES = {
    "llama": ("llama", {}),
    "llama, keys for each head": ("llama", {"num_key_value_heads": 4}),
    "mistral, window 7": ("mistral", {"sliding_window": 7}),
    "mistral, window 3": ("mistral", {"sliding_window": 3}),
    "mistral, window 1": ("mistral", {"sliding_window": 1}),
    "mistral, window 12": ("mistral", {"sliding_window": 12}),
    "mistral, window 40": ("mistral", {"sliding_window": 40}),
    "gemma2, capped scores": ("gemma2", {"sliding_window": 7, "attn_logit_softcapping": 1.0, **MIXED}),
    "gemma3, mixed windows": ("gemma3_text", {"sliding_window": 7, **MIXED}),
    "qwen3": ("qwen3", {}),
    "granite": ("granite", {"attention_multiplier": 0.4}),
}
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}  # float32 sums in another order


def model_of(name, **sizes):
    kind, own = CASES[name]
    return seeded_model(kind, 3, 64, initializer_range=0.3, **own | sizes)


@torch.no_grad()
def whole(model, row, num_asked):
    """Return the last hidden states of a row's last tokens, from the stock model and the whole row."""
    return model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0, -num_asked:]


def varlen_attn(query, key, value, *bounds, return_aux, scale, window_size, enable_gqa=False):
    """Imitate torch.nn.attention.varlen.varlen_attn on a GPU; log-sum-exps are [heads, queries]."""
    assert return_aux.lse and enable_gqa == (query.shape[1] > key.shape[1])
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    mixed, sums = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    both = (itertools.pairwise(each.tolist()) for each in bounds[:2])
    for queries, keys in ((slice(*one), slice(*other)) for one, other in zip(*both, strict=True)):
        scores = torch.einsum("qhd,khd->hqk", query[queries], key[keys]) * scale
        num_queries, num_keys = scores.shape[1:]
        behind = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)
        before, after = (torch.inf if side < 0 else side for side in window_size)
        scores.masked_fill_((behind > before) | (behind < -after), -torch.inf)
        sums[:, queries] = scores.logsumexp(-1)
        mixed[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[keys])
    return mixed, sums


@pytest.fixture(params=["torch's kernel", "products", "products, two queries at a time", "packed rows, imitated"])
def kernel(request, monkeypatch):
    if request.param == "packed rows, imitated":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        monkeypatch.setattr(module._Kernel, "takes_bounds", lambda self, query: self.softcap is None)
    elif request.param != "torch's kernel":
        monkeypatch.setattr(module, "_cpu_kernel", None)
    if "two" in request.param:
        monkeypatch.setattr(module, "_MOST_SCORES", 100)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", CASES)
def test_hidden_states_are_those_of_whole_rows(name):
    model = model_of(name)
    before = model.config._attn_implementation
    for prefix_ids, tails in ((PREFIX, TAILS), ([], TAILS), (PREFIX[:1], TAILS[:1])):
        lengths = np.array([len(tail) for tail in tails])
        prefix = shared_prefix(model, prefix_ids, CPU)
        for asked in (lengths, np.ones_like(lengths), (lengths + 1) // 2):
            found = prefix.hidden(model, tails, asked, CPU)
            rows = zip(tails, asked.tolist(), strict=True)
            wanted = torch.cat([whole(model, prefix_ids + tail, number) for tail, number in rows])
            torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert model.config._attn_implementation == before
    model.base_model(torch.tensor([PREFIX]))  # the hooks are gone


@pytest.mark.usefixtures("kernel")
@torch.no_grad()
def test_as_many_prompts_as_heads():
    """Then a kernel's [queries, heads] and [heads, queries] have the same shape."""
    model = model_of("llama")
    prefix = shared_prefix(model, PREFIX, CPU)
    tails = [[5 + number, 9, 11] for number in range(model.config.num_attention_heads)]
    wanted = torch.cat([whole(model, PREFIX + tail, 1) for tail in tails])
    found = prefix.hidden(model, tails, np.ones(len(tails), dtype=int), CPU)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("llama", "qwen3", "mistral, window 40")])
def test_the_cases_differ_in_what_they_are_there_for(name):
    """Without its windows, caps and scales, a case has different hidden states."""
    kind, own = CASES[name]
    plain = {"sliding_window": None, "attn_logit_softcapping": None, "attention_multiplier": 1.0}
    changed = {part: plain[part] for part in own if part in plain} or {"num_key_value_heads": 2}
    if "layer_types" in own:
        changed["sliding_window"] = 64
    found = whole(seeded_model(kind, 3, 64, initializer_range=0.3, **own | changed), PREFIX + TAILS[0], 3)
    assert (found - whole(model_of(name), PREFIX + TAILS[0], 3)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral, window 7", "gemma2, capped scores", "gemma3, mixed windows"])
def test_in_16_bits_it_is_as_near_as_the_model_itself(name):
    exact, narrow = model_of(name), model_of(name).to(torch.bfloat16)
    wanted = torch.cat([whole(exact, PREFIX + tail, len(tail)) for tail in TAILS])
    own = torch.cat([whole(narrow, PREFIX + tail, len(tail)) for tail in TAILS]).float()
    found = shared_prefix(narrow, PREFIX, CPU).hidden(narrow, TAILS, LENGTHS, CPU).float()
    assert (found - wanted).abs().mean() < 1.5 * (own - wanted).abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        found = shared_prefix(exact, PREFIX, CPU).hidden(exact, TAILS, LENGTHS, CPU).float()
    assert (found - wanted).abs().mean() < 2 * (own - wanted).abs().mean()


def test_the_prefix_is_neither_copied_for_rows_nor_for_heads(monkeypatch):
    """All queries use one copy of the keys, 2 heads for their 4; the last layer computes only the requested queries."""
    model, seen = model_of("llama"), []
    real = module._Kernel.__call__

    def spy(self, query, key, *others):
        seen.append((tuple(query.shape), tuple(key.shape), key.untyped_storage().data_ptr()))
        return real(self, query, key, *others)

    prefix = shared_prefix(model, PREFIX, CPU)
    monkeypatch.setattr(module._Kernel, "__call__", spy)
    prefix.hidden(model, TAILS, np.ones_like(LENGTHS), CPU)
    own, shared = seen[::2], seen[1::2]
    assert [shapes[:2] for shapes in shared] == [((1, 4, 13, 8), (1, 2, 12, 8)), ((1, 4, 3, 8), (1, 2, 12, 8))]
    assert [pointer for *_, pointer in shared] == [keys.untyped_storage().data_ptr() for keys, _ in prefix.layers]
    assert [shapes[:2] for shapes in own] == [((3, 4, 9, 8), (3, 2, 9, 8)), ((3, 4, 1, 8), (3, 2, 9, 8))]


@pytest.mark.parametrize("name", ["mistral, window 7", "gemma2, capped scores"])
def test_a_batch_reads_nothing_from_the_device(name):
    model = model_of(name)
    prefix = shared_prefix(model, PREFIX, CPU)
    with HostReads() as reads:
        prefix.hidden(model, TAILS, np.ones_like(LENGTHS), CPU)
    assert reads.count == 0


def test_masks_are_made_once_for_all_layers(monkeypatch):
    """Of four layers two have a window; a batch needs one mask for its own tokens and one for the prefix's."""
    model, made = model_of("gemma3, mixed windows"), []
    prefix, real = shared_prefix(model, PREFIX, CPU), torch.Tensor.masked_fill_
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda self, *args: made.append(self.shape) or real(self, *args))
    prefix.hidden(model, TAILS, LENGTHS, CPU)
    assert made == [(1, 1, 9, 9), (1, 1, 13, 6)]


def test_a_model_without_keys_and_values_shares_nothing():
    kind = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    model = seeded_model("qwen3_5_text", 3, 64, **kind, linear_num_value_heads=4, linear_value_head_dim=8)
    assert shared_prefix(model, PREFIX, CPU) is None
    assert shared_prefix(model_of("llama"), [], CPU) == SharedPrefix()


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8))
def test_rows_that_begin_alike_are_kept_once_and_read_whole(rows):
    found = SharedRows()
    for row in rows:
        found.append(row)
    assert [list(row) for row in found] == rows and found.lengths.tolist() == list(map(len, rows))
    first, last = min(rows), max(rows)  # these have the shortest common prefix
    common = next((place for place, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))
    assert list(found.head) == first[:common]
    assert sum(map(len, found.tails)) == sum(map(len, rows)) - common * len(rows)
