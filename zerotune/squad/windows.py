"""Questions and contexts cut into windows for a span head, with the answer's place in each.

    [CLS] who built the tower? [SEP] the tower was built by … [SEP]          an encoder
    <s> who built the tower?↵ the tower was built by … </s>                   a causal model

A context that does not fit is cut into windows that overlap by `doc_stride` tokens, as in transformers' run_qa.py. A
question takes at most a third of a row; a longer one keeps its first tokens.

A window also has a null position, which means "no answer here": an encoder's first token, or a causal model's last, the
only one that has seen the whole window. It is the label of a window that does not hold the whole answer.

Question and context are tokenised separately, each context once for all its questions. An encoder's tokenizer does the
same with a pair of texts. For a causal model it differs from tokenising one string: tokens cannot merge across the line
break between question and context, and SentencePiece marks the context's first word as the beginning of a text. The
name of a special token inside a text is ordinary text.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.run.process import say_how_far
from zerotune.squad.questions import Question, distinct_paragraphs
from zerotune.tasks.cutting import whole_texts
from zerotune.tasks.token_cache import are_rows, cached_arrays, content_key

QUESTION_SHARE = 1 / 3
UNKNOWN = -100  # the label of a window whose question has no known answers
CACHE_FORMAT = "zerotune spans 2"
# Largest share of answers that the tokens may fail to give. Every data set has a few; wrong offsets spoil most.
MOST_UNREADABLE = 0.01
# Texts tokenised at once, whose tokens are Python objects at the same time.
QUESTIONS_PER_CALL, PARAGRAPHS_PER_CALL = 4096, 256
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])


# --- a row's special tokens ---


@dataclass(frozen=True)
class RowForm:
    """The special tokens of a row.

    Attributes:
        before, between, after: token ids before the question, between question and context, after the context.
        type_ids: token types of before, question, between, context and after; None where the model has none.
        ends_with_null: whether the null position is the last token; otherwise it is the first.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    type_ids: tuple[int, int, int, int, int] | None
    ends_with_null: bool

    @property
    def num_special(self) -> int:
        """Count the special tokens of a row."""
        return len(self.before) + len(self.between) + len(self.after)


def row_form(tokenizer, is_causal: bool) -> RowForm:
    """Find the special tokens of a row.

    An encoder's row has those that the tokenizer puts around a pair of texts. A causal model's has the BOS, if the
    tokenizer adds one, and the tokens that the tokenizer adds at a text's end, or else its EOS.

    Raises:
        Refused: the tokenizer has no token for the null position.
    """
    backend = whole_texts(tokenizer)
    encoding = backend.encode("a") if is_causal else backend.encode("a", "a")
    first = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 0]
    before = tuple(encoding.ids[: first[0]])
    if is_causal:
        after = tuple(encoding.ids[first[-1] + 1 :]) or (tokenizer.eos_token_id,)
        if None in after:
            raise Refused(
                f"--head span needs a causal model's EOS to mark that there is no answer, and the tokenizer of "
                f"{tokenizer.name_or_path} has no eos_token: set one in tokenizer_config.json"
            )
        return RowForm(before, (), after, None, True)
    second = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    between = tuple(encoding.ids[first[-1] + 1 : second[0]])
    if not before or not between:
        raise Refused(
            f"--head span needs a first token and a separator, such as [CLS] and [SEP]: the tokenizer of "
            f"{tokenizer.name_or_path} puts {list(before)} before a pair of texts and {list(between)} between them; "
            "correct its post_processor"
        )
    types = None
    if "token_type_ids" in tokenizer.model_input_names:
        types = tuple(encoding.type_ids[place] for place in (0, first[0], first[-1] + 1, second[0], -1))
    return RowForm(before, between, tuple(encoding.ids[second[-1] + 1 :]), types, False)


# --- tokens ---


@dataclass(frozen=True)
class Tokens:
    """Token ids of questions and contexts, one text after the other, without special tokens.

    Text i has the tokens from offsets[i] to offsets[i + 1] - 1.

    Attributes:
        question_ids: int32 [question tokens].
        question_offsets: int64 [questions + 1].
        context_ids: int32 [context tokens].
        context_offsets: int64 [paragraphs + 1].
        char_starts, char_ends: int32 [context tokens], each token's first character in the context and the one after
            its last, without surrounding space; both rise along a paragraph. For a token of only space they are
            swapped, so that no span begins or ends with the space, and a span of only that token is empty.
    """

    question_ids: np.ndarray
    question_offsets: np.ndarray
    context_ids: np.ndarray
    context_offsets: np.ndarray
    char_starts: np.ndarray
    char_ends: np.ndarray


def tokenise(tokenizer, questions: list[str], contexts: list[str], cache_dir: Path | None) -> Tokens:
    """Tokenise questions and contexts, or read their tokens from the cache.

    Args:
        cache_dir: folder of the token cache; None: no cache.
    Raises:
        Refused: the cache cannot be written.
    """
    import tokenizers

    backend = whole_texts(tokenizer)
    if cache_dir is None:
        return _tokenise(backend, questions, contexts)
    key = content_key(
        [CACHE_FORMAT, tokenizers.__version__, len(questions)], chain([backend.to_str()], questions, contexts)
    )
    path = Path(cache_dir) / "tokens" / f"{key}.bin"

    def fits(arrays: dict[str, np.ndarray]) -> bool:
        return (
            arrays.keys() == {each.name for each in fields(Tokens)}
            and are_rows(arrays["question_ids"], arrays["question_offsets"], len(questions))
            and are_rows(arrays["context_ids"], arrays["context_offsets"], len(contexts))
            and arrays["char_starts"].shape == arrays["char_ends"].shape == arrays["context_ids"].shape
        )

    return Tokens(**cached_arrays(path, lambda: vars(_tokenise(backend, questions, contexts)), fits))


def _tokenise(backend, questions: list[str], contexts: list[str]) -> Tokens:
    before, post_processor = backend.encode_special_tokens, backend.post_processor
    backend.encode_special_tokens = True  # a special token's name in a text is ordinary text
    backend.post_processor = None  # it adds nothing here, but some take a letter off every word's offsets
    try:
        question_ids, question_offsets = _token_ids(backend, questions)
        context_ids, context_offsets, chars = _token_ids_and_characters(backend, contexts)
    finally:
        backend.encode_special_tokens, backend.post_processor = before, post_processor
    return Tokens(question_ids, question_offsets, context_ids, context_offsets, chars[0], chars[1])


def _token_ids(backend, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts' token ids and each text's offset."""
    ids, lengths = [np.zeros(0, np.int32)], []
    starts = range(0, len(texts), QUESTIONS_PER_CALL)
    for first in say_how_far(starts, "tokenising", "questions", QUESTIONS_PER_CALL, len(texts)):
        # takes half the time of encode_batch, which also computes characters
        rows = backend.encode_batch_fast(texts[first : first + QUESTIONS_PER_CALL], add_special_tokens=False)
        ids.append(np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32))
        lengths.extend(map(len, rows))
    return np.concatenate(ids), _offsets(lengths)


def _token_ids_and_characters(backend, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the texts' token ids, each text's offset, and the tokens' char_starts and char_ends, [2, tokens]."""
    ids, chars, lengths = [np.zeros(0, np.int32)], [np.zeros((2, 0), np.int32)], []
    starts = range(0, len(texts), PARAGRAPHS_PER_CALL)
    for first in say_how_far(starts, "tokenising", "paragraphs", PARAGRAPHS_PER_CALL, len(texts)):
        part = texts[first : first + PARAGRAPHS_PER_CALL]
        rows = backend.encode_batch(part, add_special_tokens=False)
        ids.append(np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32))
        pairs = chain.from_iterable(chain.from_iterable(row.offsets for row in rows))
        own = [len(row) for row in rows]
        chars.append(_character_ranges(part, own, np.fromiter(pairs, np.int32).reshape(-1, 2).T))
        lengths.extend(own)
    return np.concatenate(ids), _offsets(lengths), np.concatenate(chars, axis=1)


def _character_ranges(texts: list[str], lengths: list[int], chars: np.ndarray) -> np.ndarray:
    """Return the tokens' starts and ends, [2, tokens], which leave out surrounding space but no other characters.

    A tokenizer's own may leave out characters that its normaliser drops, such as an accent after its letter. They are
    added to the token that they touch, or to the one before if there are two.

    Args:
        lengths: tokens of each text.
        chars: the tokens' starts and ends in their texts, [2, tokens].
    """
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    place = np.arange(len(codes) + 1, dtype=np.int32)
    is_word = np.append(~_IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)], True)
    next_word = np.minimum.accumulate(np.where(is_word, place, len(codes))[::-1])[::-1]
    word_end = np.maximum.accumulate(np.where(is_word[:-1], place[1:], 0))
    text_offsets = _offsets([len(text) for text in texts])
    text_starts, text_ends = (np.repeat(each, lengths) for each in (text_offsets[:-1], text_offsets[1:]))
    starts, ends = chars + text_starts
    starts, ends = np.minimum(next_word[starts], ends), np.maximum(np.append(0, word_end)[ends], starts)

    next_space = np.minimum.accumulate(np.where(is_word, len(codes), place)[::-1])[::-1]
    behind_space = np.maximum.accumulate(np.where(is_word, 0, place + 1))
    is_first, is_last = (np.zeros(len(starts), bool) for _ in range(2))
    bounds = _offsets(lengths)
    is_first[bounds[:-1][np.diff(bounds) > 0]] = is_last[bounds[1:][np.diff(bounds) > 0] - 1] = True
    following = np.where(is_last, text_ends, np.append(starts[1:], 0))
    ends = np.maximum(ends, np.minimum(next_space[ends], following))
    preceding = np.where(is_first, text_starts, np.append(0, ends[:-1]))
    starts = np.minimum(starts, np.maximum(np.append(0, behind_space)[starts], preceding))
    return (np.stack([starts, ends]) - text_starts).astype(np.int32)


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


# --- windows ---


@dataclass(frozen=True)
class Windows:
    """Windows as arrays of numbers; their rows of token ids are built on demand.

    A "column" is a place in a window's row. Question i has the windows window_offsets[i] to window_offsets[i + 1] - 1.

    Attributes:
        form: the special tokens.
        tokens: those of all questions and contexts.
        paragraph_of: int64 [questions], each question's context, as an index among those of `tokens`.
        question_lengths: int64 [questions], tokens kept of each question.
        num_truncated: number of questions that were cut.
        window_offsets: int64 [questions + 1].
        question_of: int64 [windows].
        starts, counts: int64 [windows], the first of the context's tokens in a window, and their number.
        labels: int64 [windows, 2], columns of the answer's first and last token; the null position twice if the window
            does not hold the whole answer; UNKNOWN twice if the answers are not known.
        num_lost: number of answerable questions whose whole answer is in no window.
    """

    form: RowForm
    tokens: Tokens
    paragraph_of: np.ndarray
    question_lengths: np.ndarray
    num_truncated: int
    window_offsets: np.ndarray
    question_of: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    num_lost: int

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each window's row, int64 [windows]."""
        return self.form.num_special + self.question_lengths[self.question_of] + self.counts

    @cached_property
    def context_columns(self) -> np.ndarray:
        """Return the column at which the context begins in each window, int64 [windows]."""
        return len(self.form.before) + self.question_lengths[self.question_of] + len(self.form.between)

    @cached_property
    def null_columns(self) -> np.ndarray:
        """Return the column of the null position in each window, int64 [windows]."""
        return self.lengths - 1 if self.form.ends_with_null else np.zeros_like(self.lengths)

    @cached_property
    def token_ids(self) -> np.ndarray:
        """Return every token id that rows are made of, once: int32 [ids]."""
        special = np.array([*self.form.before, *self.form.between, *self.form.after], np.int32)
        return np.unique(np.concatenate([special, self.tokens.question_ids, self.tokens.context_ids]))

    def inputs(self, windows: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
        """Build the right-padded rows of some windows.

        Returns:
            input_ids, attention_mask and, where the model has them, token_type_ids: int64 [windows, longest].
        """
        form, tokens = self.form, self.tokens
        before, between, after = (np.array(part, np.int32) for part in (form.before, form.between, form.after))
        input_ids = np.full((len(windows), self.lengths[windows].max()), pad_id, np.int64)
        mask, types = np.zeros_like(input_ids), np.zeros_like(input_ids)
        for row, window in enumerate(windows):
            question = self.question_of[window]
            asked = tokens.question_offsets[question]
            told = tokens.context_offsets[self.paragraph_of[question]] + self.starts[window]
            asks = tokens.question_ids[asked : asked + self.question_lengths[question]]
            tells = tokens.context_ids[told : told + self.counts[window]]
            parts = (before, asks, between, tells, after)
            input_ids[row, : self.lengths[window]] = np.concatenate(parts)
            mask[row, : self.lengths[window]] = 1
            if form.type_ids is not None:
                types[row, : self.lengths[window]] = np.repeat(form.type_ids, [len(part) for part in parts])
        found = {"input_ids": input_ids, "attention_mask": mask}
        return found if form.type_ids is None else found | {"token_type_ids": types}

    def characters(self, windows: np.ndarray, columns: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Return the characters of the context at which some tokens start or end, int32 [...].

        Args:
            windows, columns: the tokens' windows, and their columns there, [...] each.
            edges: tokens.char_starts or tokens.char_ends.
        """
        place = self.starts[windows] + columns - self.context_columns[windows]
        return edges[self.tokens.context_offsets[self.paragraph_of[self.question_of[windows]]] + place]


def cut_windows(
    tokenizer, questions: list[Question], is_causal: bool, max_length: int, doc_stride: int, cache_dir: Path | None
) -> Windows:
    """Cut questions and their contexts into windows of at most `max_length` tokens.

    Args:
        is_causal: whether rows have a causal model's form, otherwise an encoder's.
        doc_stride: tokens that neighbouring windows of a context share.
        cache_dir: folder of the token cache; None: no cache.
    Raises:
        Refused: the stride leaves windows no room to advance; also as `row_form` and `tokenise`.
    """
    form = row_form(tokenizer, is_causal)
    most_of_question = int(max_length * QUESTION_SHARE)
    room = max_length - form.num_special - most_of_question
    if room <= doc_stride:
        raise Refused(
            f"--max-length {max_length} with --doc-stride {doc_stride} leaves windows no room to advance: beside "
            f"{most_of_question} tokens of the question and {form.num_special} special ones, the stride must be below "
            f"{room}; lower it, or raise --max-length"
        )
    paragraphs, places = distinct_paragraphs(questions)
    paragraph_of = np.array(places, dtype=np.int64)
    ends_line = "\n" if is_causal else ""
    texts = [question.text.strip() + ends_line for question in questions]
    tokens = tokenise(tokenizer, texts, [paragraph.context for paragraph in paragraphs], cache_dir)

    whole = np.diff(tokens.question_offsets)
    question_lengths = np.minimum(whole, most_of_question)
    num_context = np.diff(tokens.context_offsets)[paragraph_of]
    rooms = max_length - form.num_special - question_lengths
    step = rooms - doc_stride
    num_windows = 1 + -(-np.maximum(num_context - rooms, 0) // step)
    window_offsets = np.concatenate([[0], np.cumsum(num_windows)])
    question_of = np.repeat(np.arange(len(questions)), num_windows)
    starts = (np.arange(len(question_of)) - window_offsets[question_of]) * step[question_of]
    windows = Windows(
        form=form,
        tokens=tokens,
        paragraph_of=paragraph_of,
        question_lengths=question_lengths,
        num_truncated=int((whole > most_of_question).sum()),
        window_offsets=window_offsets,
        question_of=question_of,
        starts=starts,
        counts=np.minimum(rooms[question_of], num_context[question_of] - starts),
        labels=np.empty((len(question_of), 2), np.int64),
        num_lost=0,
    )
    first, last = answer_tokens(tokens, paragraph_of, questions)
    check_answer_tokens(tokenizer.name_or_path, tokens, paragraph_of, questions, first, last)
    return _labelled(windows, questions, first, last)


def _labelled(windows: Windows, questions: list[Question], first: np.ndarray, last: np.ndarray) -> Windows:
    """Label the windows with each question's first answer, whose tokens `answer_tokens` found."""
    question_of = windows.question_of
    first, last = first[question_of] - windows.starts, last[question_of] - windows.starts
    known = np.array([question.answers is not None for question in questions], dtype=bool)
    answered = np.array([bool(question.answers) for question in questions], dtype=bool)
    holds = answered[question_of] & (first >= 0) & (first <= last) & (last < windows.counts)
    columns = np.stack([first, last], axis=1) + windows.context_columns[:, None]
    labels = np.where(holds[:, None], columns, windows.null_columns[:, None])
    labels[~known[question_of]] = UNKNOWN
    found = np.zeros(len(questions), dtype=bool)
    found[question_of[holds]] = True
    return replace(windows, labels=labels, num_lost=int((answered & ~found).sum()))


def answer_tokens(tokens: Tokens, paragraph_of: np.ndarray, questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
    """Find the first and last token of each question's first answer.

    These are the first token that ends after the answer's first character, and the last that starts before its end.

    Returns:
        Places among the context's own tokens, int64 [questions] each; meaningless for questions without an answer.
    Raises:
        Refused: the tokens' offsets in their text do not rise.
    """
    answers = [question.answers[0] if question.answers else None for question in questions]
    starts = np.array([0 if answer is None else answer.start for answer in answers], dtype=np.int64)
    stops = np.array([0 if answer is None else answer.start + len(answer.text) for answer in answers], dtype=np.int64)
    # one sorted array for all paragraphs: the characters of paragraph i lie between i << 32 and (i + 1) << 32
    paragraph_of_token = np.repeat(np.arange(len(tokens.context_offsets) - 1), np.diff(tokens.context_offsets))
    own, begins = paragraph_of << 32, tokens.context_offsets[paragraph_of]
    edges = [(paragraph_of_token << 32) + chars for chars in (tokens.char_starts, tokens.char_ends)]
    if any((np.diff(edge) < 0).any() for edge in edges):
        raise Refused(
            "--head span reads answers from their tokens' places in the text, and this model's tokenizer gives places "
            "out of order: correct its pre_tokenizer and normalizer, or use --head generate"
        )
    last = np.searchsorted(edges[0], own + stops, side="left") - 1 - begins
    first = np.searchsorted(edges[1], own + starts, side="right") - begins
    return first, last


def check_answer_tokens(
    name: str,
    tokens: Tokens,
    paragraph_of: np.ndarray,
    questions: list[Question],
    first: np.ndarray,
    last: np.ndarray,
) -> None:
    """Refuse a tokenizer if more than MOST_UNREADABLE of the answers cannot be read back from its tokens.

    Args:
        name: of the tokenizer.
        first, last: as `answer_tokens` returns them.
    """
    begins = tokens.context_offsets[paragraph_of]
    answered = [place for place, question in enumerate(questions) if question.answers]
    unreadable = []
    for place in answered:
        own = slice(begins[place] + first[place], begins[place] + last[place] + 1)
        start, stop = tokens.char_starts[own][:1].sum(), tokens.char_ends[own][-1:].sum()  # 0 for no tokens
        question = questions[place]
        wanted, found = question.answers[0].text.strip(), question.paragraph.context[start:stop]
        if wanted not in found:
            unreadable.append((wanted, found))
    if len(unreadable) > max(1, MOST_UNREADABLE * len(answered)):  # one may be odd, as of an invisible character
        wanted, found = unreadable[0]
        raise Refused(
            f"--head span reads answers from their tokens' places in the text, and by the tokenizer of {name} "
            f"{len(unreadable)} of {len(answered)} answers lose characters, such as {wanted[:40]!r}, read as "
            f"{found[:40]!r}: correct its pre_tokenizer and normalizer, or use --head generate"
        )
