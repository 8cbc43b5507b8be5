"""Questions and paragraphs to tokens with their places in the text: a paragraph once for all its questions.

Tokens are those that the tokenizer gives for a question alone and a paragraph alone. An encoder's pair encoding gives
the same ones, for it tokenises the two texts apart. A causal model's row is not that of one string: there tokens could
merge across the line break between question and paragraph, and a SentencePiece tokenizer would leave out the mark of a
text's beginning that it puts before the paragraph's first word. A special token's name inside a text is text.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.squad.questions import Paragraph, Question
from zerotune.tasks.cutting import whole_texts
from zerotune.tasks.token_cache import content_key, load_arrays, save_arrays

CACHE_FORMAT = "zerotune spans 1"
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])
# texts whose tokens exist as Python objects at one time
QUESTIONS_PER_CALL, PARAGRAPHS_PER_CALL = 4096, 256


@dataclass(frozen=True)
class SpanForm:
    """What stands around question and context in a row, with token types beside the ids.

    Attributes:
        before, between, after: token ids in front of the question, between it and the context, after the context.
        type_ids: token types of before, question, between, context and after; None where the model has none.
        ends_with_null: whether the last token is the place of "no answer": a causal model's first has seen nothing.
            Else it is the first one.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    type_ids: tuple[int, int, int, int, int] | None
    ends_with_null: bool

    @property
    def num_special(self) -> int:
        """Tokens of a row beside question and context."""
        return len(self.before) + len(self.between) + len(self.after)


def span_form(tokenizer, is_causal: bool) -> SpanForm:
    """An encoder's form is the tokenizer's own pair, such as [CLS] question [SEP] context [SEP].

    A causal model's: its BOS if the tokenizer puts one, the question with a line break, the context, and what the
    tokenizer ends a text with, else its EOS.

    Raises:
        Refused: the tokenizer has no mark for the place of "no answer".
    """
    backend = whole_texts(tokenizer)
    encoding = backend.encode("a") if is_causal else backend.encode("a", "a")
    first = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 0]
    before = tuple(encoding.ids[: first[0]])
    if is_causal:
        after = tuple(encoding.ids[first[-1] + 1 :]) or (tokenizer.eos_token_id,)
        if None in after:
            raise Refused(
                f"--head span asks a causal model at its EOS whether there is an answer, and the tokenizer of "
                f"{tokenizer.name_or_path} has no eos_token: set one in tokenizer_config.json"
            )
        return SpanForm(before, (), after, None, True)
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
    return SpanForm(before, between, tuple(encoding.ids[second[-1] + 1 :]), types, False)


@dataclass(frozen=True)
class SpanTokens:
    """Tokens of texts, one text after the other: text i's are those from offsets[i] to offsets[i + 1] - 1.

    Attributes:
        question_ids: int32 [question tokens].
        question_offsets: int64 [questions + 1].
        context_ids: int32 [context tokens].
        context_offsets: int64 [paragraphs + 1].
        char_starts, char_ends: int32 [context tokens], the first character of the context that a token stands for and
            the one after its last, without the space around it; they rise along a paragraph. A token of nothing but
            space begins at its end and ends at its beginning, so that a span that it opens or closes has none.
    """

    question_ids: np.ndarray
    question_offsets: np.ndarray
    context_ids: np.ndarray
    context_offsets: np.ndarray
    char_starts: np.ndarray
    char_ends: np.ndarray


def distinct_paragraphs(questions: list[Question]) -> tuple[list[Paragraph], np.ndarray]:
    """The paragraphs of some questions in the order of their first question, and each question's place among them."""
    places: dict[int, int] = {}
    paragraphs: list[Paragraph] = []
    for question in questions:
        if id(question.paragraph) not in places:
            places[id(question.paragraph)] = len(paragraphs)
            paragraphs.append(question.paragraph)
    return paragraphs, np.array([places[id(question.paragraph)] for question in questions], dtype=np.int64)


def tokenise_spans(tokenizer, questions: list[str], contexts: list[str], cache_dir: Path | None) -> SpanTokens:
    """The tokens of questions and contexts, without special tokens; kept in `cache_dir` by content, None: no cache.

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
    arrays = load_arrays(path)
    if arrays is not None:
        return SpanTokens(**arrays)
    tokens = _tokenise(backend, questions, contexts)
    save_arrays(path, vars(tokens))
    return tokens


def _tokenise(backend, questions: list[str], contexts: list[str]) -> SpanTokens:
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # what a text spells is text
    try:
        # half the time of encode_batch, which also computes offsets
        question_ids, question_offsets = _ids(backend.encode_batch_fast, questions)
        context_ids, context_offsets, chars = _ids_and_chars(backend, contexts)
    finally:
        backend.encode_special_tokens = before
    return SpanTokens(question_ids, question_offsets, context_ids, context_offsets, chars[0], chars[1])


def _ids(encode, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, lengths = [np.zeros(0, np.int32)], []
    for first in range(0, len(texts), QUESTIONS_PER_CALL):
        rows = [row.ids for row in encode(texts[first : first + QUESTIONS_PER_CALL], add_special_tokens=False)]
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32))
        lengths.extend(map(len, rows))
    return np.concatenate(ids), _offsets(lengths)


def _ids_and_chars(backend, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, where each text's begin, and first and last-plus-one character of each token, [2, tokens]."""
    ids, chars, lengths = [np.zeros(0, np.int32)], [np.zeros((2, 0), np.int32)], []
    for first in range(0, len(texts), PARAGRAPHS_PER_CALL):
        part = texts[first : first + PARAGRAPHS_PER_CALL]
        rows = backend.encode_batch(part, add_special_tokens=False)
        ids.append(np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32))
        pairs = chain.from_iterable(chain.from_iterable(row.offsets for row in rows))
        own = [len(row) for row in rows]
        chars.append(_without_space(part, own, np.fromiter(pairs, np.int32).reshape(-1, 2).T))
        lengths.extend(own)
    return np.concatenate(ids), _offsets(lengths), np.concatenate(chars, axis=1)


def _without_space(texts: list[str], lengths: list[int], chars: np.ndarray) -> np.ndarray:
    """Starts and ends of tokens, [2, tokens], moved past the space at either side; lengths are each text's tokens."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    place = np.arange(len(codes) + 1, dtype=np.int32)
    is_word = np.append(~_IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)], True)
    next_word = np.minimum.accumulate(np.where(is_word, place, len(codes))[::-1])[::-1]
    word_end = np.maximum.accumulate(np.where(is_word[:-1], place[1:], 0))
    text_starts = np.repeat(_offsets([len(text) for text in texts])[:-1], lengths)
    starts, ends = chars + text_starts
    trimmed = np.minimum(next_word[starts], ends), np.maximum(np.append(0, word_end)[ends], starts)
    return (np.stack(trimmed) - text_starts).astype(np.int32)


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
