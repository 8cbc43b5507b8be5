"""Training only the used rows gives the same result as training the whole table."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from zerotune.models.classifier import load_classifier
from zerotune.models.parameters import parameter_groups
from zerotune.models.pretrained import load_tokenizer
from zerotune.models.used_rows import UsedRowsEmbedding, restore_whole_embedding, train_used_rows, unused_decay
from zerotune.settings.groups import ModelSettings

LABELS = ("negative", "positive")
PEAK, DECAY = 1e-2, 0.1
FACTORS = [0.5, 1.0, 0.75, 0.25]


def train(kind: str, only_used: bool):
    """Take four AdamW steps on ids 5…12. Returns the classifier."""
    folder = tiny_model(kind)
    tokenizer = load_tokenizer(folder, None)
    classifier = load_classifier(ModelSettings(folder, None, "full"), LABELS, tokenizer)
    classifier.train()
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    input_ids = torch.arange(5, 13).reshape(2, 4)
    if only_used:
        assert train_used_rows(classifier.stock_model, np.arange(5, 13)) is not None
    optimizer = torch.optim.AdamW(parameter_groups(classifier, PEAK, PEAK, DECAY), fused=True)
    for factor in FACTORS:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * factor
        logits = classifier(input_ids, torch.ones_like(input_ids))
        nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma3_text", "bert", "distilbert"])
def test_same_weights_as_the_whole_table(kind):
    whole, part = train(kind, False), train(kind, True)
    embedding = part.stock_model.get_input_embeddings()
    embedding.unused_decay = unused_decay(FACTORS, PEAK, DECAY)
    other_ids, mask = torch.tensor([[1, 7, 20, 3]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        whole.eval(), part.eval()
        torch.testing.assert_close(part(other_ids, mask), whole(other_ids, mask), rtol=0, atol=1e-5)
    restore_whole_embedding(part.stock_model)
    ours, theirs = part.stock_model.state_dict(), whole.stock_model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # rounding in float32 over four steps: the unused rows decay in one product instead of four
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_only_used_rows_have_gradients_and_padding_has_none():
    embedding = nn.Embedding(10, 3, padding_idx=0)
    part = UsedRowsEmbedding(embedding, np.array([4, 0, 7])).train()
    assert part.weight.shape == (3, 3)
    part(torch.tensor([[4, 0], [4, 7]])).sum().backward()
    assert part.weight.grad.tolist() == [[0.0] * 3, [2.0] * 3, [1.0] * 3]


def test_frozen_and_other_embeddings_are_left_alone():
    folder = tiny_model("llama")
    tokenizer = load_tokenizer(folder, None)
    adapted = load_classifier(ModelSettings(folder, None, "lora"), LABELS, tokenizer)
    assert train_used_rows(adapted.stock_model, np.arange(5)) is None


def test_decay_golden_value():
    assert unused_decay([1.0, 0.5], 0.1, 0.2) == pytest.approx((1 - 0.02) * (1 - 0.01))
