"""Tokenise texts with the fast tokenizer in batches, and keep the token ids in a cache keyed by their content."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.run.process import say_how_far
from zerotune.tasks.cutting import whole_texts
from zerotune.tasks.token_cache import are_rows, cached_arrays, content_key

CACHE_FORMAT = "zerotune tokens 1"
TEXTS_PER_CALL = 2048
# The share of "head-and-tail" that comes from a text's head: best on IMDB (Sun et al. 2019, arXiv:1905.05583, section
# 5.3.1: 128 and 382 of 510 tokens).
HEAD_SHARE = 0.25


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts, one after the other. Text i has `ids[offsets[i]:offsets[i + 1]]`. The arrays are read-only.

    Attributes:
        ids: int32 [tokens].
        offsets: int64 [texts + 1].
        num_truncated: number of texts longer than the maximum length.
        type_ids: uint8 [tokens], None if the model has no token types.
    """

    ids: np.ndarray
    offsets: np.ndarray
    num_truncated: int
    type_ids: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each text, special tokens included: int64 [texts]."""
        return np.diff(self.offsets)

    def row(self, text: int) -> np.ndarray:
        """Return the token ids of one text: int32 [its length], a view."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]


def encode_texts(
    tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, cache_dir: Path | None, truncation: str = "head"
) -> Encoded:
    """Tokenise texts, with the tokenizer's own special tokens, each cut to `max_length` tokens.

    Args:
        texts: all single, or all pairs, whose longer text is cut first.
        cache_dir: folder of the token cache; None: no cache.
        truncation: "head" keeps a longer text's head, "head-and-tail" a quarter from its head and the rest from its
            tail.
    Raises:
        Refused: `max_length` has no room for text, a text begins with a second BOS, or the cache cannot be written.
    """
    are_pairs = bool(texts) and isinstance(texts[0], tuple)
    if are_pairs and truncation != "head":
        raise Refused(
            f"--truncation {truncation} is for single texts; of a pair the longer text loses its end: leave it out"
        )
    num_special = tokenizer.num_special_tokens_to_add(pair=are_pairs)
    if max_length <= num_special:
        raise Refused(
            f"--max-length {max_length} leaves no room for text beside the special tokens ({num_special}); raise it"
        )
    if cache_dir is None:
        arrays = _encode(tokenizer, texts, max_length, truncation)
    else:
        path = Path(cache_dir) / "tokens" / f"{_cache_key(tokenizer, texts, max_length, truncation)}.bin"
        names = {"ids", "offsets", "num_truncated"} | ({"type_ids"} if _settings(tokenizer)[2] else set())

        def fits(arrays: dict[str, np.ndarray]) -> bool:
            return (
                arrays.keys() == names
                and are_rows(arrays["ids"], arrays["offsets"], len(texts))
                and arrays.get("type_ids", arrays["ids"]).shape == arrays["ids"].shape
                and arrays["num_truncated"].shape == ()
            )

        arrays = cached_arrays(path, lambda: _encode(tokenizer, texts, max_length, truncation), fits)
    for array in arrays.values():
        array.flags.writeable = False
    return Encoded(arrays["ids"], arrays["offsets"], int(arrays["num_truncated"]), arrays.get("type_ids"))


def _cache_key(tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, truncation: str) -> str:
    """Return a hash of everything that determines the ids."""
    import tokenizers

    backend = whole_texts(tokenizer)
    settings = [CACHE_FORMAT, tokenizers.__version__, max_length, truncation, *_settings(tokenizer)]
    if texts and isinstance(texts[0], tuple):
        settings, texts = [*settings, "pairs"], chain.from_iterable(texts)
    return content_key(settings, chain([backend.to_str()], texts))


def _settings(tokenizer) -> tuple[str, bool, bool]:
    """Return a tokenizer's settings outside its backend: truncation side, splitting of special tokens, type ids."""
    has_types = "token_type_ids" in tokenizer.model_input_names
    return tokenizer.truncation_side, tokenizer.split_special_tokens, has_types


def _encode(
    tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, truncation: str
) -> dict[str, np.ndarray]:
    backend, (side, split_special, has_types) = tokenizer.backend_tokenizer, _settings(tokenizer)
    keeps_tail = truncation == "head-and-tail"
    first = []
    if texts:
        columns = zip(*texts[:8], strict=True) if isinstance(texts[0], tuple) else [texts[:8]]
        first = tokenizer(*map(list, columns), truncation=True, max_length=max_length)["input_ids"]
    if keeps_tail:
        backend.no_truncation()
    else:
        backend.enable_truncation(max_length, direction=side)
    backend.no_padding()
    backend.encode_special_tokens = split_special
    ids, types, lengths, num_truncated = [], [], [], 0
    starts = range(0, len(texts), TEXTS_PER_CALL)
    for start in say_how_far(starts, "tokenising", "texts", TEXTS_PER_CALL, len(texts)):
        # half the time of tokenizer(texts), which also computes and converts offsets and masks
        rows = backend.encode_batch_fast(texts[start : start + TEXTS_PER_CALL])
        gaps = [_gap(row, max_length) for row in rows]
        num_truncated += sum(gap is not None or bool(row.overflowing) for row, gap in zip(rows, gaps, strict=True))
        ids.append(_joined([row.ids for row in rows], gaps, np.int32))
        lengths.extend(min(len(row), max_length) for row in rows)
        if has_types:
            types.append(_joined([row.type_ids for row in rows], gaps, np.uint8))
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    arrays = {"ids": np.concatenate([np.zeros(0, np.int32), *ids]), "offsets": offsets}
    arrays["num_truncated"] = np.array(num_truncated)
    if has_types:
        arrays["type_ids"] = np.concatenate([np.zeros(0, np.uint8), *types])
    for row, start, end in zip(first, offsets, offsets[1:], strict=False):
        agrees = arrays["ids"][start:end].tolist() == row
        assert agrees or (keeps_tail and len(row) == max_length), "backend and tokenizer disagree"
    _require_one_bos(tokenizer, arrays["ids"], offsets)
    return arrays


def _gap(row, max_length: int) -> slice | None:
    """Return the tokens to drop between head and tail of a row that was not truncated; None if it fits."""
    excess = len(row) - max_length
    if excess <= 0:
        return None
    special = row.special_tokens_mask
    head = special.index(0) + int(HEAD_SHARE * (max_length - sum(special)))
    return slice(head, head + excess)


def _joined(rows: list[list[int]], gaps: list[slice | None], dtype) -> np.ndarray:
    """Return all rows without their gaps, one after the other."""
    kept = (row if gap is None else row[: gap.start] + row[gap.stop :] for row, gap in zip(rows, gaps, strict=True))
    return np.fromiter(chain.from_iterable(kept), dtype)


def _require_one_bos(tokenizer, ids: np.ndarray, offsets: np.ndarray) -> None:
    """Raise Refused if a text itself begins with the BOS that the tokenizer adds."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("")["input_ids"][:1] != [bos]:
        return
    starts = offsets[:-1]
    assert (ids[starts] == bos).all(), "a tokenizer that adds BOS left one out"
    seconds = starts[np.diff(offsets) > 1] + 1
    # an empty text is BOS EOS, which look like two BOS if both have the same id
    twice = np.flatnonzero(ids[seconds] == bos)
    if len(twice) and bos != tokenizer.eos_token_id:
        text = int(np.searchsorted(offsets, seconds[twice[0]], side="right")) - 1
        raise Refused(
            f"text {text} itself begins with {tokenizer.bos_token}, which the tokenizer of {tokenizer.name_or_path} "
            "adds: remove it from the text"
        )
