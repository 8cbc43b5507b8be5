"""A question with all its windows as one example: what it costs, its loss, and its answer."""

from types import SimpleNamespace

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
from zerotune.squad.span_data import SpanData
from zerotune.squad.windows import cut_windows
from zerotune.training.batches import cut_by_budget, epoch_steps, evaluation_batches, micro_batches

CPU = torch.device("cpu")


def some_questions(lengths=(1, 5, 12, 25, 40, 60), seed=0):
    """Two questions about each of some paragraphs, one of them without an answer."""
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
    features = cut_windows(tokenizer, questions, causal, max_length, doc_stride, None)
    return SpanData(questions, features, 3, num_best, 4)


def load(kind):
    folder = tiny_model(kind)
    return load_span_model(ModelSettings(folder, None, "full"), load_tokenizer(folder, None)).eval()


def engine_of(model):
    return SimpleNamespace(accelerator=SimpleNamespace(device=CPU), forward=model)


def test_every_id_is_there_once():
    data = some_data()
    assert data.ids == [question.id for question in data.questions] and len(set(data.ids)) == len(data.ids)
    batches = evaluation_batches(data.scored_lengths, 100)
    windows = np.concatenate([data.windows(batch) for batch in batches])
    assert sorted(windows.tolist()) == list(range(len(data.features.question_of)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=12), st.integers(20, 200), st.integers(0, 2**16))
def test_padded_tokens_never_exceed_the_longest_question_times_their_number(lengths, budget, seed):
    """So that a micro-batch within the token budget, by `lengths`, is within it in truth."""
    data = some_data(questions=some_questions(lengths, seed))
    steps = epoch_steps(data.lengths, 5, seed, 0)
    batches = [batch for step in steps for batch in micro_batches(step, data.lengths, budget, 1)[0]]
    for batch in [*batches, *evaluation_batches(data.lengths, budget)]:
        padded = data.batch(data.windows(batch), CPU)["input_ids"].numel()
        assert padded <= data.lengths[batch].max() * len(batch)
        assert padded <= budget or len(batch) == 1
    assert cut_by_budget(np.sort(data.lengths)[::-1], budget)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama", "gemma2"])
def test_the_loss_is_that_of_each_window_alone(kind):
    data, model = some_data(kind), load(kind)
    expected = []
    for window, labels in enumerate(data.features.labels):
        with torch.no_grad():
            logits = model(**data.batch(np.array([window]), CPU))[0]
        expected.append(sum(F.cross_entropy(logits[:, side], torch.tensor(labels[side])) for side in (0, 1)) / 2)
    rows = np.array([7, 0, 10, 3])
    with torch.no_grad():
        loss = data.loss_sum(engine_of(model), rows)
    windows = data.windows(rows)
    assert len(windows) == data.num_targets(rows) > len(rows)
    # float32 sums in another order, of about ten losses near 3
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
        features = data.features
        for window in data.windows(np.array([row])):
            with torch.no_grad():
                logits = model(**data.batch(np.array([window]), CPU))[0].numpy()
            nulls.append(logits[features.null_columns[window]].sum())
            context = features.tokens.context_offsets[features.paragraph_of[row]] + features.starts[window]
            for i in range(features.counts[window]):
                for j in range(i, min(i + data.max_answer_length, features.counts[window])):
                    chars = features.tokens.char_starts[context + i], features.tokens.char_ends[context + j]
                    column = features.context_columns[window]
                    spans[chars] = max(spans.get(chars, -np.inf), logits[column + i, 0] + logits[column + j, 1])
        best = sorted(spans.items(), key=lambda pair: -pair[1])[: data.num_best]
        assert found["null"] == pytest.approx(min(nulls), abs=2e-4)
        assert [score for score, *_ in found["spans"]] == pytest.approx([score for _, score in best], abs=2e-4)
        assert [tuple(chars) for _, *chars in found["spans"]] == [chars for chars, _ in best]


def test_answers_are_the_paragraphs_text():
    data, model = some_data("distilbert"), load("distilbert")
    with torch.no_grad():
        scores = [data.scores(model, np.array([row]), CPU)[0] for row in range(len(data.ids))]
    for question, spans in zip(data.questions, data.answers(scores), strict=True):
        assert len(spans) == (1 if len(question.paragraph.context.split()) == 1 else 3)
        for span in spans:
            assert question.paragraph.context[span.start : span.start + len(span.text)] == span.text != ""
            assert 1 <= len(span.text.split()) <= 4
        assert [span.score for span in spans] == sorted((span.score for span in spans), reverse=True)
    best = [spans[0].score for spans in data.answers(scores)]
    nulls = np.float32([record["null"] for record in scores])
    np.testing.assert_array_equal(data.null_odds(scores), nulls - np.float32(best))


def test_a_paragraph_without_tokens_has_no_span_and_finite_scores():
    data, model = some_data("bert", [Question("a", "what", Paragraph("T", 0, " "), ())]), load("bert")
    with torch.no_grad():
        scores = data.scores(model, np.array([0]), CPU)
    assert is_finite(scores) and data.answers(scores) == [[]] and data.null_odds(scores) > 1e29


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_tiny_model_learns_its_answers(kind):
    """20 questions by heart, half of them without an answer."""
    data = some_data(kind, some_questions((3, 5, 8, 12, 25, 40, 9, 11, 14, 30), seed=4))
    model = load(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    every, losses = np.arange(len(data.ids)), []
    for _ in range(150):
        loss = data.loss_sum(engine_of(model), every) / data.num_targets(every)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        scores = data.scores(model, every, CPU)
    assert data.mean_loss(scores) == pytest.approx(
        sum(record["loss"] for record in scores) / len(data.features.question_of)
    )
    assert data.mean_loss(scores) < 0.1 < 1 < losses[0]
    for question, odds, spans in zip(data.questions, data.null_odds(scores), data.answers(scores), strict=True):
        assert (odds < 0) == bool(question.answers)
        assert not question.answers or spans[0].text == question.answers[0].text
