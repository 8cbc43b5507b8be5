"""Windows for a span head: the question first, then a stretch of the context, with every answer's place in them.

    [CLS] who built the tower? [SEP] the tower was built by … [SEP]          an encoder
    <s> who built the tower?↵ the tower was built by … </s>                   a causal model

A context that does not fit goes into several windows that share `doc_stride` tokens, as in transformers' run_qa.py. A
question takes a third of a row at most: of a longer one its first tokens are kept.
"Does not answer" has a place too: the first token of an encoder, the last one of a causal model, which has seen the
context. It is the label of a window that does not hold the whole answer.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.squad.questions import Question
from zerotune.squad.span_tokens import SpanForm, SpanTokens, distinct_paragraphs, span_form, tokenise_spans

QUESTION_SHARE = 1 / 3
UNKNOWN = -100  # the label of a window whose question's answers nobody gives


@dataclass(frozen=True)
class SpanFeatures:
    """Windows as arrays of numbers; their rows of tokens are put together when they are asked for.

    Attributes:
        form: what stands around question and context.
        tokens: of all questions and paragraphs.
        paragraph: int64 [questions], which of the tokens' paragraphs a question is about.
        question_lengths: int64 [questions], tokens that are kept of it.
        num_truncated: questions that were cut.
        window_offsets: int64 [questions + 1]; question i has windows window_offsets[i] … window_offsets[i + 1] - 1.
        questions: int64 [windows], the question of each.
        starts, counts: int64 [windows], the stretch of the paragraph's tokens in it.
        labels: int64 [windows, 2], columns of the answer's first and last token; the place of "no answer", twice, where
            the window does not hold the whole answer; UNKNOWN where nobody says.
        num_lost: answerable questions whose answer no window holds whole.
    """

    form: SpanForm
    tokens: SpanTokens
    paragraph: np.ndarray
    question_lengths: np.ndarray
    num_truncated: int
    window_offsets: np.ndarray
    questions: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    num_lost: int

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each window's row, int64 [windows]."""
        return self.form.num_special + self.question_lengths[self.questions] + self.counts

    @cached_property
    def context_columns(self) -> np.ndarray:
        """Where the context begins in each window's row, int64 [windows]."""
        return len(self.form.before) + self.question_lengths[self.questions] + len(self.form.between)

    @cached_property
    def null_columns(self) -> np.ndarray:
        """The place of "no answer" in each window's row, int64 [windows]."""
        return self.lengths - 1 if self.form.ends_with_null else np.zeros_like(self.lengths)

    @cached_property
    def pool(self) -> np.ndarray:
        """Every token that a row is made of: int32 [special + question tokens + context tokens]."""
        special = [*self.form.before, *self.form.between, *self.form.after]
        return np.concatenate([np.array(special, np.int32), self.tokens.question_ids, self.tokens.context_ids])

    def inputs(self, windows: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
        """Right-padded rows of some windows, int64 [windows, longest]: input_ids, attention_mask, and token_type_ids
        where the model has them."""
        form, tokens = self.form, self.tokens
        questions = self.questions[windows]
        num_special, num_question_tokens = form.num_special, len(tokens.question_ids)
        first_of_context = tokens.context_offsets[self.paragraph[questions]] + self.starts[windows]
        # of the five parts of a row: how long each is, and where it begins in the pool
        lengths = np.empty((5, len(windows)), np.int64)
        lengths[:] = [[len(form.before)], [0], [len(form.between)], [0], [len(form.after)]]
        lengths[1], lengths[3] = self.question_lengths[questions], self.counts[windows]
        sources = np.empty_like(lengths)
        sources[:] = [[0], [0], [len(form.before)], [0], [len(form.before) + len(form.between)]]
        sources[1] = num_special + tokens.question_offsets[questions]
        sources[3] = num_special + num_question_tokens + first_of_context
        stops = lengths.cumsum(axis=0)
        column = np.arange(stops[-1].max())
        part = np.sum(column[None, None] >= stops[:, :, None], axis=0).clip(max=4)
        row = np.arange(len(windows))[:, None]
        places = sources[part, row] + column - (stops - lengths)[part, row]
        mask = column < stops[-1][:, None]
        found = {"input_ids": np.where(mask, self.pool[np.where(mask, places, 0)], pad_id).astype(np.int64)}
        found["attention_mask"] = mask.astype(np.int64)
        if form.type_ids is not None:
            found["token_type_ids"] = np.where(mask, np.array(form.type_ids)[part], 0)
        return found

    def characters(self, windows: np.ndarray, columns: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """The characters of the context at which some tokens begin or end: int32 [...].

        windows and the tokens' columns in them are [...]; edges is the tokens' char_starts or char_ends.
        """
        place = self.starts[windows] + columns - self.context_columns[windows]
        return edges[self.tokens.context_offsets[self.paragraph[self.questions[windows]]] + place]


def span_features(
    tokenizer, questions: list[Question], is_causal: bool, max_length: int, doc_stride: int, cache_dir: Path | None
) -> SpanFeatures:
    """The windows of some questions, at most `max_length` tokens each.

    Args:
        is_causal: which of the two forms a row has.
        doc_stride: tokens that neighbouring windows of a context share.
        cache_dir: keeps the tokens, by content; None: no cache.
    Raises:
        Refused: no room for windows to go on, and as `span_form` and `tokenise_spans` do.
    """
    form = span_form(tokenizer, is_causal)
    share = int(max_length * QUESTION_SHARE)
    if max_length - form.num_special - share <= doc_stride:
        raise Refused(
            f"windows of --max-length {max_length} that share --doc-stride {doc_stride} tokens do not get on: beside "
            f"{share} tokens for the question and {form.num_special} special ones, the stride must be below "
            f"{max_length - form.num_special - share}; lower it, or raise --max-length"
        )
    paragraphs, paragraph = distinct_paragraphs(questions)
    ends_line = "\n" if is_causal else ""
    texts = [question.text.strip() + ends_line for question in questions]
    tokens = tokenise_spans(tokenizer, texts, [one.context for one in paragraphs], cache_dir)

    whole = np.diff(tokens.question_offsets)
    question_lengths = np.minimum(whole, share)
    num_context = np.diff(tokens.context_offsets)[paragraph]
    room = max_length - form.num_special - question_lengths
    step = room - doc_stride
    num_windows = 1 + -(-np.maximum(num_context - room, 0) // step)
    window_offsets = np.concatenate([[0], np.cumsum(num_windows)])
    of_window = np.repeat(np.arange(len(questions)), num_windows)
    starts = (np.arange(len(of_window)) - window_offsets[of_window]) * step[of_window]
    counts = np.minimum(room[of_window], num_context[of_window] - starts)

    features = SpanFeatures(
        form=form,
        tokens=tokens,
        paragraph=paragraph,
        question_lengths=question_lengths,
        num_truncated=int((whole > share).sum()),
        window_offsets=window_offsets,
        questions=of_window,
        starts=starts,
        counts=counts,
        labels=np.empty((len(of_window), 2), np.int64),
        num_lost=0,
    )
    return _labelled(features, questions)


def _labelled(features: SpanFeatures, questions: list[Question]) -> SpanFeatures:
    """The same windows, labelled with each question's first answer."""
    first, last = answer_tokens(features.tokens, features.paragraph, questions)
    first, last = first[features.questions] - features.starts, last[features.questions] - features.starts
    known = np.array([question.answers is not None for question in questions], dtype=bool)
    answered = np.array([bool(question.answers) for question in questions], dtype=bool)
    holds = answered[features.questions] & (first >= 0) & (first <= last) & (last < features.counts)
    places = np.stack([first, last], axis=1) + features.context_columns[:, None]
    labels = np.where(holds[:, None], places, features.null_columns[:, None])
    labels[~known[features.questions]] = UNKNOWN
    found = np.zeros(len(questions), dtype=bool)
    found[features.questions[holds]] = True
    return replace(features, labels=labels, num_lost=int((answered & ~found).sum()))


def answer_tokens(
    tokens: SpanTokens, paragraph: np.ndarray, questions: list[Question]
) -> tuple[np.ndarray, np.ndarray]:
    """First and last token of each question's first answer, counted from its paragraph's first: int64 [questions] each.

    The first token that ends behind the answer's first character, and the last that begins before its end; 0 and -1 or
    another pair that falls where there is none.
    """
    answers = [question.answers[0] if question.answers else None for question in questions]
    starts = np.array([0 if answer is None else answer.start for answer in answers], dtype=np.int64)
    stops = np.array([0 if answer is None else answer.start + len(answer.text) for answer in answers], dtype=np.int64)
    # one sorted array for all paragraphs: a paragraph's characters lie between its own multiples of a large number
    of_token = np.repeat(np.arange(len(tokens.context_offsets) - 1), np.diff(tokens.context_offsets))
    own, begins = paragraph << 32, tokens.context_offsets[paragraph]
    edges = [(of_token << 32) + chars for chars in (tokens.char_starts, tokens.char_ends)]
    assert all((np.diff(edge) >= 0).all() for edge in edges), "a tokenizer that changes the order of characters"
    last = np.searchsorted(edges[0], own + stops, side="left") - 1 - begins
    first = np.searchsorted(edges[1], own + starts, side="right") - begins
    return first, last
