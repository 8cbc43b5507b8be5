"""Class weights give torch's weighted mean for any cut of a step and both heads, and find more of a rare label."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from default_settings import optimisation_settings
from tiny_models import tiny_model
from torch import nn
from torch.nn import functional

from zerotune.models.generator import load_generator
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.prompts import Prompt
from zerotune.tasks.splits import Example
from zerotune.tasks.tokens import Encoded
from zerotune.training.class_weights import balanced_weights, weights_of
from zerotune.training.classification import LabelledData
from zerotune.training.generation import encode_answers
from zerotune.training.loop import TrainingLoop

CPU = torch.device("cpu")
VOCABULARY, PAD = 8, 8
# tokens per micro-batch, and ranks
CUTS = [(10**6, 1), (40, 1), (30, 2), (12, 3)]


def counts_to_logits(num_labels, seed=1):
    """Return a linear model of the count of each token in a text."""

    class Model(nn.Linear):
        def forward(self, input_ids, attention_mask):
            counts = functional.one_hot(input_ids, VOCABULARY + 1)[..., :VOCABULARY] * attention_mask[..., None]
            return super().forward(counts.sum(dim=1).float())

    torch.manual_seed(seed)
    return Model(VOCABULARY, num_labels)


def some_texts(num_rows, seed=0, balanced=False):
    """Return texts of 6 to 12 tokens with labels: a label's own token is three times as likely as any other.

    Args:
        num_rows: the number of texts for each label.
        balanced: whether to use balanced class weights.
    """
    generator, texts = np.random.default_rng(seed), []
    labels = np.repeat(np.arange(len(num_rows)), num_rows)
    for label in labels:
        shares = np.ones(VOCABULARY)
        shares[label] = 3
        texts.append(generator.choice(VOCABULARY, generator.integers(6, 13), p=shares / shares.sum()))
    offsets = np.cumsum([0, *map(len, texts)])
    encoded = Encoded(np.concatenate(texts).astype(np.int32), offsets, 0, None)
    weights = balanced_weights(labels, len(num_rows)) if balanced else None
    return LabelledData([str(number) for number in range(len(labels))], encoded, labels, PAD, weights)


def parts_of_step(data, rows, budget, num_ranks):
    """Return the micro-batches that the loop gives to all ranks, rank after rank."""
    parts = []
    for rank in range(num_ranks):
        loop = object.__new__(TrainingLoop)
        loop.data, loop.has_dropout = data, False
        loop.optimisation = optimisation_settings(tokens_per_device=budget)
        loop.accelerator = SimpleNamespace(process_index=rank, num_processes=num_ranks, device=CPU)
        loop.engine = SimpleNamespace(gradients_stay_local=lambda is_last: nullcontext())
        parts += loop._micro_batches(1, rows)
    return parts


def step_loss(model, batch):
    """Return a micro-batch's share of the step's loss, as the scripts compute it."""
    losses = functional.cross_entropy(model(**batch.inputs), batch.targets, reduction="none")
    return (losses * batch.target_weights).sum() * batch.weight


def loss_and_gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    total = sum(float(loss.detach()) for loss in losses)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    """Assert equality up to the order of float32 sums."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-5) and found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_balanced_weights_give_each_label_the_same_sum():
    labels = np.array([0] * 6 + [2] * 3 + [1])
    weights = balanced_weights(labels, 3)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 3, 10 / 9])
    assert np.bincount(labels, weights_of(labels, weights)) == pytest.approx([10 / 3] * 3)
    assert weights_of(labels, None).tolist() == [1.0] * 10


@pytest.mark.parametrize(("budget", "num_ranks"), CUTS)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("num_rows", [25, 1])
def test_a_classifiers_step_has_torchs_weighted_mean(num_rows, balanced, budget, num_ranks):
    data, model = some_texts([20, 3, 9], balanced=balanced), counts_to_logits(3)
    rows = np.random.default_rng(2).permutation(32)[:num_rows]
    parts = parts_of_step(data, rows, budget, num_ranks)
    assert num_rows > 1 or sum(part.weight == 0 for part in parts) == num_ranks - 1  # fillers
    found = loss_and_gradients(model, [step_loss(model, batch) for batch in parts])
    weights = torch.tensor(data.class_weights, dtype=torch.float32) if balanced else None
    mean = nn.CrossEntropyLoss(weight=weights)
    loss = mean(model(**data.inputs(rows, CPU)), torch.from_numpy(data.labels[rows]))
    assert_same(found, loss_and_gradients(model, [loss]))
    assert data.num_targets(rows) == pytest.approx(weights_of(data.labels[rows], data.class_weights).sum())


@pytest.mark.parametrize(("budget", "num_ranks"), CUTS)
def test_each_token_of_a_generators_answer_has_the_weight_of_its_label(budget, num_ranks):
    """Compare with each answer's summed loss, one at a time; the label words have different numbers of tokens."""
    folder = tiny_model("llama")
    tokenizer = load_tokenizer(folder, None)
    model = load_generator(ModelSettings(folder), tokenizer).eval()
    texts = ["good", "the very dull film was not good", "not bad", "a bright film", "very very good a the film"]
    examples = [Example(f"t-{number}", text, int(number == 3)) for number, text in enumerate(texts)]
    data = encode_answers(tokenizer, Prompt("the film : {text} was", ("bad", "very good")), examples, 60, 64)
    assert len(set(data.num_answer_tokens)) == 2
    weights = balanced_weights(data.labels, 2)
    assert weights.tolist() == [0.625, 2.5]
    data = replace(data, class_weights=weights)
    rows = np.arange(5)
    found = loss_and_gradients(model, [step_loss(model, part) for part in parts_of_step(data, rows, budget, num_ranks)])
    own = [data.batch(rows[[row]], CPU) for row in rows]
    sums = [functional.cross_entropy(model(**batch.inputs), batch.targets, reduction="sum") for batch in own]
    divisor = sum(weights[label] * count for label, count in zip(data.labels, data.num_answer_tokens, strict=True))
    wanted = [weights[label] * loss / divisor for label, loss in zip(data.labels, sums, strict=True)]
    assert_same(found, loss_and_gradients(model, wanted))


def recalls_after_training(train, test):
    """Return each label's recall on `test` after 4 epochs of `train`."""
    model = counts_to_logits(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for epoch in range(4):
        for rows in train.epoch_steps(32, 0, epoch):
            for part in parts_of_step(train, rows, 10**6, 1):
                step_loss(model, part).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        predictions = model(**test.inputs(np.arange(len(test.labels)), CPU)).argmax(dim=1).numpy()
    return [float((predictions[test.labels == label] == label).mean()) for label in (0, 1)]


def test_weights_find_more_of_a_label_that_one_row_in_51_has():
    """One token hints at the label: without weights, it pays to answer the frequent label nearly always."""
    test = some_texts([300, 300], seed=5)
    plain, weighted = (recalls_after_training(some_texts([1500, 30], balanced=each), test) for each in (False, True))
    print(plain, weighted)  # shown by pytest -rP
    assert plain[1] < 0.15 and weighted[1] > plain[1] + 0.3
    assert sum(weighted) > sum(plain) + 0.2
