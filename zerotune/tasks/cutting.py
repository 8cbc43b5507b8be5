"""Cut texts to a number of tokens by removing their middle: the beginning and end of a review say most."""

from collections.abc import Sequence
from dataclasses import replace

from zerotune.errors import Refused
from zerotune.models.pretrained import leading_ids

# Replaces the middle that was cut out.
CUT_MARK = " ... "
FEWEST_SHOT_TOKENS = 16


def token_ids(tokenizer, texts: list[str], begins: bool) -> list[list[int]]:
    """Return the token ids of whole texts, after the tokenizer's BOS if they begin a row.

    No EOS is added, even if the tokenizer would add one, because the row may continue.
    """
    first = leading_ids(tokenizer) if begins else []
    backend = whole_texts(tokenizer)
    return [first + row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]


def whole_texts(tokenizer):
    """Return the tokenizer's backend without the truncation and padding that earlier calls left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def cut_texts(tokenizer, texts: list[str], most_tokens: Sequence[int]) -> list[str]:
    """Replace the middle of each text by CUT_MARK if it has more tokens than its entry in `most_tokens`."""
    cut, backend = list(texts), whole_texts(tokenizer)
    # a token is at least a byte, except one that some tokenizers put in front
    suspects = [index for index, text in enumerate(texts) if len(text.encode()) >= most_tokens[index]]
    if not suspects:
        return cut
    mark = len(backend.encode(CUT_MARK, add_special_tokens=False).ids)
    rows = backend.encode_batch([texts[index] for index in suspects], add_special_tokens=False)
    for index, row in zip(suspects, rows, strict=True):
        if len(row.ids) > most_tokens[index]:
            cut[index] = _without_middle(texts[index], row.offsets, int(most_tokens[index]), mark)
    return cut


def _without_middle(text: str, offsets: list[tuple[int, int]], most_tokens: int, mark: int) -> str:
    num_kept = most_tokens - mark
    if num_kept < 2:  # no room for two ends
        return _head(text, offsets, most_tokens)
    num_last = num_kept // 2
    # several tokens may be bytes of one character, which is kept or dropped as a whole
    start = max(offsets[-num_last][0], offsets[-num_last - 1][1])
    return _head(text, offsets, num_kept - num_last) + CUT_MARK + text[start:].lstrip()


def _head(text: str, offsets: list[tuple[int, int]], num_tokens: int) -> str:
    return text[: min(offsets[num_tokens - 1][1], offsets[num_tokens][0])] if num_tokens else ""


def fit_shots(tokenizer, shots: Sequence, window: int) -> tuple[list, int]:
    """Return (shots, how many were cut), with the longest texts cut to one length.

    Together, the texts then take at most half of the model's window.

    Args:
        shots: each a zerotune.tasks.splits.Example.
        window: the model's positions, in tokens.
    Raises:
        Refused: texts would be cut to fewer than FEWEST_SHOT_TOKENS.
    """
    texts = [shot.text for shot in shots]
    budget = shot_budget([len(row) for row in token_ids(tokenizer, texts, False)], window)
    cut = cut_texts(tokenizer, texts, [budget] * len(texts))
    num_cut = sum(before != after for before, after in zip(texts, cut, strict=True))
    return [replace(shot, text=text) for shot, text in zip(shots, cut, strict=True)], num_cut


def shot_budget(lengths: list[int], window: int) -> int:
    """Return the most tokens per shot with which all shots together take at most half of the model's window.

    Args:
        lengths: tokens of each shot.
    Raises:
        Refused: the longest would be cut to fewer than FEWEST_SHOT_TOKENS.
    """
    room, budget = window // 2, max(lengths, default=0)
    for place, length in enumerate(sorted(lengths)):
        even = room // (len(lengths) - place)
        if length > even:
            budget = even
            break
        room -= length
    else:
        return budget
    if budget < FEWEST_SHOT_TOKENS:
        raise Refused(
            f"--shots {len(lengths)} do not fit: in half of the model's window of {window} each would be cut to "
            f"{budget} tokens, wanted {FEWEST_SHOT_TOKENS} or more: use fewer --shots"
        )
    return budget
