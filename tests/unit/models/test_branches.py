"""Branches that share a trunk get the logits and gradients of separate rows, also in layers with short windows."""

import numpy as np
import pytest
import torch
from tiny_models import seeded_model

from zerotune.models.branches import (
    PADDING,
    Places,
    branch_masks,
    branch_rows,
    can_share,
    layer_types,
    visible,
)
from zerotune.models.generator import TextGenerator

CPU = torch.device("cpu")
VOCABULARY, PAD = 64, 3
# sliding windows are shorter than the trunks and some branches
SHAPES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 5},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
TRUNKS = [list(range(4, 15)), [20, 21, 22]]
BRANCHES = [[[30, 31, 32, 33, 34, 35], [40], [50, 51]], [[60, 61], [30, 31, 32, 33, 34, 35, 36]]]
CASES = [
    (kind, attention) for kind in SHAPES for attention in ("sdpa", "eager") if (kind, attention) != ("gemma2", "sdpa")
]


def model_of(kind, attention="eager"):
    model = seeded_model(kind, 3, VOCABULARY, **SHAPES[kind], attn_implementation=attention)
    return TextGenerator(model)


def inputs_of(laid):
    """Return inputs for the logits after every token of the branches, row after row."""
    rows, columns = np.nonzero(laid.branches > 0)
    arrays = {"input_ids": laid.input_ids, "rows": rows, "columns": columns}
    if not laid.is_plain:
        arrays |= {"positions": laid.positions, "branches": laid.branches}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def alone(model):
    """Return the logits after every token of the branches, each after its trunk in its own row, without padding."""
    found = []
    for trunk, own in zip(TRUNKS, BRANCHES, strict=True):
        for branch in own:
            hidden = model.stock_model.base_model(torch.tensor([trunk + branch]), use_cache=False).last_hidden_state
            found.append(hidden[0, len(trunk) :])
    logits = model.stock_model.get_output_embeddings()(torch.cat(found))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_logits_and_gradients_are_those_of_rows_of_their_own(kind, attention):
    model = model_of(kind, attention)
    found, gradients = [], []
    for logits in (model(**inputs_of(branch_rows(TRUNKS, BRANCHES, PAD))), alone(model)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))).backward()
        found.append(logits.detach())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    # float32; the largest logits are near 10
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_by_index_would_be_wrong(kind):
    """With columns as positions, the window would hide the trunk from later branches: the test above can fail."""
    model = model_of(kind)
    inputs = inputs_of(branch_rows(TRUNKS, BRANCHES, PAD))
    right = model(**inputs)
    columns = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["positions"])
    stock = model.stock_model
    places = Places(columns, inputs["branches"])
    wrong = stock.base_model(
        inputs["input_ids"],
        position_ids=inputs["positions"],
        attention_mask=branch_masks(stock.config, places, places, torch.float32),
        use_cache=False,
    ).last_hidden_state
    wrong = stock.get_output_embeddings()(wrong[inputs["rows"], inputs["columns"]])
    assert float((wrong.detach() - right.detach()).abs().max()) > 0.05


def test_one_branch_a_row_needs_no_mask():
    laid = branch_rows(TRUNKS, [own[:1] for own in BRANCHES], PAD)
    assert laid.is_plain and not branch_rows(TRUNKS, BRANCHES, PAD).is_plain
    model = model_of("mistral", "sdpa")
    first = [0, 1, 2, 3, 4, 5, 9, 10]  # indices of the first branches' tokens among all branches'
    torch.testing.assert_close(model(**inputs_of(laid)), alone(model)[first], rtol=0, atol=2e-5)


def test_the_layout_by_hand():
    laid = branch_rows([[7, 8], [9]], [[[1], [2, 3]], [[4]]], PAD)
    assert laid.input_ids.tolist() == [[7, 8, 1, 2, 3], [9, 4, PAD, PAD, PAD]]
    assert laid.positions.tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    assert laid.branches.tolist() == [[0, 0, 1, 2, 2], [0, 1, PADDING, PADDING, PADDING]]
    assert (laid.rows.tolist(), laid.starts.tolist()) == ([0, 0, 1], [2, 3, 1])


def test_what_is_seen_by_hand():
    places = Places.of(branch_rows([[7, 8]], [[[1], [2, 3]]], PAD), CPU)
    full = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert visible(places, places, None).int().tolist() == [[full]]
    sliding = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(places, places, 2).int().tolist() == [[sliding]]


def test_masks_are_by_layer_type():
    places = Places.of(branch_rows(TRUNKS, BRANCHES, PAD), CPU)
    masks = {kind: branch_masks(model_of(kind).config, places, places, torch.bfloat16) for kind in SHAPES}
    assert set(masks["gemma2"]) == {"full_attention", "sliding_attention"}
    assert masks["llama"].dtype == torch.bfloat16 and not torch.equal(masks["llama"], masks["mistral"])
    assert torch.equal(masks["llama"], masks["gemma2"]["full_attention"])
    assert all((mask == 0).any(-1).all() for mask in (masks["llama"], masks["mistral"])), "each query sees something"


def test_who_can_share():
    config = model_of("gemma2").config
    assert can_share(config, "eager") and not can_share(config, "flash_attention_2")
    assert layer_types(config) == ("full_attention", "sliding_attention")
    config.layer_types = ["full_attention", "chunked_attention"]
    assert not can_share(config, "eager")
