"""Test the best spans against all spans; and the cost, loss and answer of a question with all its windows."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_cases import ask, pair_tokenizer
from tiny_models import WORDS, tiny_model
from torch.nn import functional as F

from zerotune.evaluation.scoring import is_finite
from zerotune.models.pretrained import load_tokenizer
from zerotune.models.span_head import load_span_model
from zerotune.settings.groups import ModelSettings
from zerotune.squad.questions import Paragraph, Question
from zerotune.squad.spans import ABSENT, SpanData, null_scores, question_spans, window_losses, window_spans
from zerotune.squad.windows import UNKNOWN, cut_windows
from zerotune.training.batches import cut_by_budget, epoch_steps, evaluation_batches, micro_batches

CPU = torch.device("cpu")


# --- the best spans ---


def every_span(logits, column, count, longest):
    """Return (score, first, last) of all spans of one window, best first."""
    start, end = logits[:, 0], logits[:, 1]
    pairs = itertools.product(range(column, column + count), repeat=2)
    spans = [((start[i] + end[j]).item(), i, j) for i, j in pairs if i <= j < i + longest]
    return sorted(spans, key=lambda span: -span[0])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 12), st.integers(1, 20))
def test_the_best_spans_of_windows_are_those_of_all_spans(seed, num_columns, longest, num_best):
    generator = np.random.RandomState(seed)
    logits = torch.from_numpy(generator.permutation(6 * num_columns).reshape(3, num_columns, 2) ** 1.5).float()
    columns = generator.randint(0, num_columns, 3)
    counts = np.array([generator.randint(0, num_columns - column + 1) for column in columns])
    places = torch.from_numpy(columns), torch.from_numpy(counts)
    scores, first, last = window_spans(logits, *places, num_best, longest)
    assert scores.shape == first.shape == last.shape == (3, num_best)
    for window in range(3):
        expected = every_span(logits[window], columns[window], counts[window], longest)
        exists = scores[window] > ABSENT
        assert exists.sum() == min(num_best, len(expected))
        assert scores[window][exists].tolist() == [span[0] for span in expected[:num_best]]
        for score, i, j in zip(*(each[window][exists].tolist() for each in (scores, first, last)), strict=True):
            assert (score, i, j) in expected
        assert (scores[window][~exists] == ABSENT).all()


def test_padding_question_and_no_answer_are_never_chosen():
    logits = torch.zeros(1, 8, 2)
    logits[0, [0, 1, 6, 7]] = 100.0
    logits[0, 4] = 1.0
    scores, first, last = window_spans(logits, torch.tensor([2]), torch.tensor([4]), 1, 3)
    assert (scores.item(), first.item(), last.item()) == (2.0, 4, 4)


def test_a_span_ends_no_earlier_than_it_begins_and_is_no_longer_than_asked():
    logits = torch.zeros(1, 8, 2)
    logits[0, 4, 0], logits[0, 1, 1], logits[0, 0, 0], logits[0, 7, 1] = 9.0, 8.0, 5.0, 5.5
    for longest, expected in ((1, (9, 4, 4)), (2, (13, 0, 1)), (4, (14.5, 4, 7)), (99, (14.5, 4, 7))):
        found = window_spans(logits, torch.tensor([0]), torch.tensor([8]), 1, longest)
        assert tuple(each.item() for each in found) == expected, "never from 4 back to 1, which would score 17"


def test_spans_of_a_question_are_merged_over_its_windows():
    scores = np.array([[5, 3, 1], [4, 2, ABSENT], [7, ABSENT, ABSENT]], np.float32)
    chars = np.array([[[0, 4], [5, 9], [0, 9]], [[5, 9], [10, 12], [9, 9]], [[3, 4], [0, 0], [0, 0]]])
    best, found = question_spans(np.array([0, 0, 2]), scores, chars, 3)
    assert best.tolist() == [[5, 4, 2], [np.float32(ABSENT)] * 3, [7, np.float32(ABSENT), np.float32(ABSENT)]]
    assert found[0].tolist() == [[0, 4], [5, 9], [10, 12]], "5 … 9 once, with the better of its scores"
    assert found[2].tolist() == [[3, 4], [-1, -1], [-1, -1]] and (found[1] == -1).all()


def test_of_equal_spans_the_earlier_and_the_shorter_come_first():
    chars = np.array([[[5, 9], [0, 8], [0, 4]]])
    _, found = question_spans(np.array([0]), np.ones((1, 3), np.float32), chars, 1)
    assert found[0].tolist() == [[0, 4], [0, 8], [5, 9]]


def test_the_null_score_is_that_of_the_window_surest_of_an_answer():
    assert null_scores(np.array([0, 0, 1, 2, 2]), np.array([3.0, -1.0, 2.0, 0.0, 5.0])).tolist() == [-1, 2, 0]


def test_the_loss_of_a_window_by_hand():
    """Two columns with equal logits share the probability, padding has none, and an unknown answer has no loss."""
    logits = torch.zeros(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    logits[0, 2:] = 50.0
    losses = window_losses(logits, mask, torch.tensor([[0, 1], [2, 3], [UNKNOWN, UNKNOWN]]))
    assert losses.tolist() == pytest.approx([np.log(2), np.log(4), 0.0])


def test_a_smoothed_loss_is_torchs_on_each_window_without_its_padding():
    generator = torch.Generator().manual_seed(5)
    logits, lengths = torch.randn(4, 6, 2, generator=generator), [6, 3, 2, 4]
    mask = torch.tensor([[1] * length + [0] * (6 - length) for length in lengths])
    targets = torch.tensor([[1, 4], [0, 2], [1, 1], [UNKNOWN, UNKNOWN]])
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = window_losses(ours, mask, targets, label_smoothing=0.3)
    alone = [
        F.cross_entropy(row[:length].T, target, ignore_index=UNKNOWN, label_smoothing=0.3, reduction="none")
        for row, length, target in zip(theirs, lengths, targets, strict=True)
    ]
    wanted = torch.stack(alone).mean(dim=1)
    torch.testing.assert_close(losses, wanted)
    assert losses[3] == 0 and losses[0] != window_losses(logits, mask, targets)[0]
    losses.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# --- questions with their windows ---


def some_questions(lengths=(1, 5, 12, 25, 40, 60), seed=0):
    """Return two questions about each paragraph, one of them without an answer."""
    generator, questions = np.random.RandomState(seed), []
    for number, length in enumerate(lengths):
        context = " ".join(generator.choice(WORDS, length))
        answer = " ".join(context.split()[length // 2 : length // 2 + 2])
        asked = ask(context, ("was it good" if number % 2 else "film", answer), ("not dull", None))
        questions += [Question(f"{number}-{place}", q.text, q.paragraph, q.answers) for place, q in enumerate(asked)]
    return questions


def some_data(kind="bert", questions=None, max_length=24, doc_stride=6, num_best=3):
    questions = some_questions() if questions is None else questions
    causal = kind not in ("bert", "distilbert", "roberta")
    tokenizer = load_tokenizer(tiny_model(kind), None) if causal else pair_tokenizer()
    windows = cut_windows(tokenizer, questions, causal, max_length, doc_stride, None)
    return SpanData(questions, windows, 3, num_best, 4)


def load(kind):
    folder = tiny_model(kind)
    return load_span_model(ModelSettings(folder, None, "full"), load_tokenizer(folder, None)).eval()


def window_inputs(data, window):
    return {name: torch.tensor(values) for name, values in data.windows.inputs(np.array([window]), data.pad_id).items()}


def loss_sum(data, model, rows):
    batch = data.batch(rows, CPU)
    return window_losses(model(**batch.inputs), batch.inputs["attention_mask"], batch.targets).sum()


def test_every_id_is_there_once():
    data = some_data()
    assert data.ids == [question.id for question in data.questions] and len(set(data.ids)) == len(data.ids)
    batches = evaluation_batches(data.scored_lengths, 100)
    windows = np.concatenate([data.windows_of(batch) for batch in batches])
    assert sorted(windows.tolist()) == list(range(len(data.windows.question_of)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=12), st.integers(20, 200), st.integers(0, 2**16))
def test_padded_tokens_never_exceed_the_longest_question_times_their_number(lengths, budget, seed):
    """So a micro-batch that fits the token budget by `lengths` really fits it."""
    data = some_data(questions=some_questions(lengths, seed))
    steps = epoch_steps(data.lengths, 5, seed, 0)
    batches = [batch for step in steps for batch in micro_batches(step, data.lengths, budget, 1)[0]]
    for batch in [*batches, *evaluation_batches(data.lengths, budget)]:
        padded = data.batch(batch, CPU).inputs["input_ids"].numel()
        assert padded <= data.lengths[batch].max() * len(batch)
        assert padded <= budget or len(batch) == 1
    assert cut_by_budget(np.sort(data.lengths)[::-1], budget)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama", "gemma2"])
def test_the_loss_is_that_of_each_window_alone(kind):
    data, model = some_data(kind), load(kind)
    expected = []
    for window, labels in enumerate(data.windows.labels):
        with torch.no_grad():
            logits = model(**window_inputs(data, window))[0]
        expected.append(sum(F.cross_entropy(logits[:, side], torch.tensor(labels[side])) for side in (0, 1)) / 2)
    rows = np.array([7, 0, 10, 3])
    with torch.no_grad():
        loss = loss_sum(data, model, rows)
    windows = data.windows_of(rows)
    assert len(windows) == data.num_targets(rows) > len(rows)
    # float32 sums of about ten losses near 3, in another order
    torch.testing.assert_close(loss, torch.stack([expected[window] for window in windows]).sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama", "gemma2"])
def test_scores_are_the_best_of_all_spans_of_all_windows(kind):
    data, model = some_data(kind), load(kind)
    rows = np.array([11, 2, 8, 1])
    with torch.no_grad():
        scores = data.scores(model, rows, CPU)
        alone = [data.scores(model, rows[[place]], CPU)[0] for place in range(len(rows))]
    for row, found, by_itself in zip(rows, scores, alone, strict=True):
        assert found.keys() == {"null", "loss", "spans"}
        assert [found["null"], found["loss"]] == pytest.approx([by_itself["null"], by_itself["loss"]], abs=2e-4)
        np.testing.assert_allclose(found["spans"], by_itself["spans"], atol=2e-4)
        spans, nulls = {}, []
        windows = data.windows
        for window in data.windows_of(np.array([row])):
            with torch.no_grad():
                logits = model(**window_inputs(data, window))[0].numpy()
            nulls.append(logits[windows.null_columns[window]].sum())
            context = windows.tokens.context_offsets[windows.paragraph_of[row]] + windows.starts[window]
            for i in range(windows.counts[window]):
                for j in range(i, min(i + data.max_answer_length, windows.counts[window])):
                    chars = windows.tokens.char_starts[context + i], windows.tokens.char_ends[context + j]
                    column = windows.context_columns[window]
                    spans[chars] = max(spans.get(chars, -np.inf), logits[column + i, 0] + logits[column + j, 1])
        best = sorted(spans.items(), key=lambda pair: -pair[1])[: data.num_best]
        assert found["null"] == pytest.approx(min(nulls), abs=2e-4)
        assert [score for score, *_ in found["spans"]] == pytest.approx([score for _, score in best], abs=2e-4)
        assert [tuple(chars) for _, *chars in found["spans"]] == [chars for chars, _ in best]


def test_answers_are_the_paragraphs_text():
    data, model = some_data("distilbert"), load("distilbert")
    with torch.no_grad():
        scores = [data.scores(model, np.array([row]), CPU)[0] for row in range(len(data.ids))]
    for question, spans in zip(data.questions, data.n_best(scores), strict=True):
        assert len(spans) == (1 if len(question.paragraph.context.split()) == 1 else 3)
        for span in spans:
            assert question.paragraph.context[span["start"] :].startswith(span["text"])
            assert 1 <= len(span["text"].split()) <= 4
        assert [span["score"] for span in spans] == sorted((span["score"] for span in spans), reverse=True)
    assert data.best_texts(scores) == [spans[0]["text"] for spans in data.n_best(scores)]
    best = [spans[0]["score"] for spans in data.n_best(scores)]
    nulls = np.float32([record["null"] for record in scores])
    np.testing.assert_array_equal(data.null_odds(scores), nulls - np.float32(best))


def test_a_paragraph_without_tokens_has_no_span_and_finite_scores():
    data, model = some_data("bert", [Question("a", "what", Paragraph("T", 0, " "), ())]), load("bert")
    with torch.no_grad():
        scores = data.scores(model, np.array([0]), CPU)
    assert (
        is_finite(scores)
        and data.n_best(scores) == [[]]
        and data.best_texts(scores) == [""]
        and data.null_odds(scores) > 1e29
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_tiny_model_learns_its_answers(kind):
    """It learns 20 questions by heart, half of them without an answer."""
    data = some_data(kind, some_questions((3, 5, 8, 12, 25, 40, 9, 11, 14, 30), seed=4))
    model = load(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    every, losses = np.arange(len(data.ids)), []
    for _ in range(150):
        loss = loss_sum(data, model, every) / data.num_targets(every)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        scores = data.scores(model, every, CPU)
    assert data.mean_loss(scores) == pytest.approx(
        sum(record["loss"] for record in scores) / len(data.windows.question_of)
    )
    assert data.mean_loss(scores) < 0.1 < 1 < losses[0]
    for question, odds, text in zip(data.questions, data.null_odds(scores), data.best_texts(scores), strict=True):
        assert (odds < 0) == bool(question.answers)
        assert not question.answers or text == question.answers[0].text
