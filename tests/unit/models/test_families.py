"""A family is supported if tiny models of it pass here: each head and method, through final/, and every fast path."""

import re

import numpy as np
import pytest
import torch
from tiny_models import IDS, LABELS, MASK, TEXT_PARTS, task_record, tiny_model, tuned_model
from torch.nn import functional

from zerotune.models.branches import branch_rows, can_share
from zerotune.models.families import CAUSAL, SUPPORTED, projections
from zerotune.models.final_folder import load_final_or_base, load_final_span, save_final
from zerotune.models.generator import load_language_model
from zerotune.models.heads import stock_name
from zerotune.models.parameters import model_size, parameter_table
from zerotune.models.pretrained import read_config
from zerotune.models.shared_prefix import prefix_cache
from zerotune.settings.groups import ModelSettings

pytestmark = pytest.mark.usefixtures("plain_four_bits")

KINDS = (*SUPPORTED, *TEXT_PARTS)
WITH_EXPERTS = ("mixtral",)  # no --method qlora, which would leave the experts in 16 bits
WRITERS = (*CAUSAL, *TEXT_PARTS)
CASES = [
    (kind, head, method)
    for kind in KINDS
    for head in ("classify", "span", "generate")
    for method in ("full", "lora", "qlora")
    if (head != "generate" or kind in WRITERS) and (method != "qlora" or kind not in (*WITH_EXPERTS, *TEXT_PARTS))
]
CPU = torch.device("cpu")


def logits(model, head, ids=IDS, mask=MASK):
    """Return the logits of the tokens that count."""
    if head == "generate":
        return model(ids, *torch.nonzero(mask, as_tuple=True))
    found = model(ids, mask)
    return found[mask == 1] if head == "span" else found


def plain_logits(model, head, ids=IDS, mask=MASK):
    """Return the same of a model of plain transformers or peft."""
    output = model(input_ids=ids, attention_mask=mask)
    if head == "span":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)[mask == 1]
    return output.logits if head == "classify" else output.logits[mask == 1]


def check_trainable(model, head, method):
    """Check that all trains in full, else an adapter on each projection and the head."""
    trainable = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    if method == "full":
        assert trainable == {name for name, _ in model.model.named_parameters()}
        return
    adapted = {name.partition(".lora_")[0] for name in trainable if ".lora_" in name}
    found = {stock_name(name) for name in adapted}
    assert found == {stock_name(path) for path in projections(model.stock_model) if ".lora_" not in path}
    others = {stock_name(name).partition(".")[0] for name in trainable if ".lora_" not in name}
    backbone = {name.partition(".")[0] for name in found}
    assert bool(others) == (head != "generate") and (not others & backbone or model.config.model_type in POOLERS)


POOLERS = ("bert", "albert")  # inside of the backbone


def check_step(model, head):
    """Check that a step forward and backward reaches all that trains."""
    model.train()
    found = logits(model, head)
    functional.cross_entropy(found, torch.arange(len(found)) % found.shape[-1]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize(("kind", "head", "method"), CASES)
def test_a_family(kind, head, method, tmp_path, monkeypatch):
    """2e-5: float32 sums in another order; the tiny logits are about 1."""
    folder = tiny_model(kind)
    model, tokenizer = tuned_model(folder, method, head)
    check_trainable(model, head, method)
    check_step(model, head)
    table = parameter_table(model)
    settings = ModelSettings(folder, None, method)
    assert model_size(read_config(folder, None), head, 2, settings) == (table["total"], table["trainable"])
    save_final(model, tokenizer, tmp_path, task_record(head))
    with torch.no_grad():
        found = logits(model, head)
        assert found.std() > 0.05, "the logits must differ for this to test anything"
        # ours, again
        settings = ModelSettings(str(tmp_path))
        if head == "generate":
            again = load_language_model(settings, CPU)
            torch.testing.assert_close(plain_logits(again, head), found, atol=2e-5, rtol=0)
        else:
            again, _, _ = load_final_span(settings) if head == "span" else load_final_or_base(settings, LABELS)
            assert torch.equal(logits(again, head), found)
        if method == "qlora":  # test_final_folder.py runs its lines
            return
        # plain transformers and peft, by the lines of its README: padded, and row by row
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(code, names)
        plain = names["model"].eval()
        torch.testing.assert_close(plain_logits(plain, head), found, atol=2e-5, rtol=0)
        rows = [ids[mask == 1][None] for ids, mask in zip(IDS, MASK, strict=True)]
        alone = torch.cat([plain_logits(plain, head, row, torch.ones_like(row)) for row in rows])
        torch.testing.assert_close(alone, found, atol=2e-5, rtol=0)


PREFIX = [1, 4, 6, 7, 8, 10]
TAILS = [[5, 9, 11, 4, 12], [11], [12, 13]]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_fast_paths_of_a_causal_model_are_exact_or_not_taken(kind):
    """A shared prefix and branches give the logits of whole rows; windows are shorter than the prefix."""
    model, _ = tuned_model(tiny_model(kind), "full", "generate")
    stock, config = model.stock_model, model.config
    with torch.no_grad():
        wanted = [stock(torch.tensor([PREFIX + tail])).logits[0, len(PREFIX) :] for tail in TAILS]
        prefix = prefix_cache(stock, PREFIX, CPU)
        assert (prefix is None) == (kind in ("qwen3_5_text", "qwen3_5")), "its linear attention keeps a state"
        if prefix is not None:
            positions = torch.arange(len(PREFIX), len(PREFIX) + 5)[None]
            for tail, expected in zip(TAILS, wanted, strict=True):
                found = stock(
                    torch.tensor([tail]), position_ids=positions[:, : len(tail)], past_key_values=prefix, use_cache=True
                ).logits[0]
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        shares = can_share(config, config._attn_implementation)
        assert shares == (prefix is not None)
        if shares:
            laid = branch_rows([PREFIX], [TAILS], 3)
            rows, columns = np.nonzero(laid.branches > 0)
            arrays = [laid.input_ids, rows, columns, laid.positions, laid.branches]
            found = model(*map(torch.from_numpy, arrays))
            torch.testing.assert_close(found, torch.cat(wanted), atol=2e-5, rtol=0)
