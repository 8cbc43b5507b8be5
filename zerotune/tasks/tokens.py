"""Texts to token ids: once, by the fast tokenizer in batches, kept in a cache that is named after its content."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.tasks.cutting import whole_texts
from zerotune.tasks.token_cache import content_key, load_arrays, save_arrays

CACHE_FORMAT = "zerotune tokens 1"
TEXTS_PER_CALL = 2048
# What is kept of a long text: its head, or a quarter from its head and the rest from its tail, which is best on IMDB
# (Sun et al. 2019, arXiv:1905.05583, section 5.3.1: 128 and 382 of 510 tokens).
TRUNCATIONS = ("head", "head-and-tail")
HEAD_SHARE = 0.25


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts, one after the other. Text i has `ids[offsets[i]:offsets[i + 1]]`.

    ids: int32 [tokens]; offsets: int64 [texts + 1]; type_ids: uint8 [tokens], None where the model has no token types;
    num_truncated: texts that were longer than the maximum length. The arrays are read-only."""

    ids: np.ndarray
    offsets: np.ndarray
    num_truncated: int
    type_ids: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, special tokens included: int64 [texts]."""
        return np.diff(self.offsets)

    def row(self, text: int) -> np.ndarray:
        """Token ids of one text: int32 [its length], a view."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]


def encode_texts(
    tokenizer, texts: list[str], max_length: int, cache_dir: Path | None, truncation: str = "head"
) -> Encoded:
    """The texts with the tokenizer's own special tokens, each cut to `max_length` tokens as TRUNCATIONS says.

    Kept in `cache_dir` by content; None: no cache. Raises Refused for a `max_length` without room for text, for a
    second BOS in front of a text, and for a cache that cannot be written."""
    num_special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= num_special:
        raise Refused(f"--max-length {max_length} has no room beside {num_special} special tokens; raise it")
    if cache_dir is None:
        return _encode(tokenizer, texts, max_length, truncation)
    path = Path(cache_dir) / "tokens" / f"{_cache_key(tokenizer, texts, max_length, truncation)}.bin"
    encoded = _load(path)
    if encoded is None:
        encoded = _encode(tokenizer, texts, max_length, truncation)
        _save(encoded, path)
    assert len(encoded.offsets) == len(texts) + 1, path
    return encoded


def _cache_key(tokenizer, texts: list[str], max_length: int, truncation: str) -> str:
    """Hash of everything that decides the ids."""
    import tokenizers

    backend = whole_texts(tokenizer)
    settings = [CACHE_FORMAT, tokenizers.__version__, max_length, truncation, *_settings(tokenizer)]
    return content_key(settings, chain([backend.to_str()], texts))


def _settings(tokenizer) -> tuple[str, bool, bool]:
    """What a tokenizer holds apart from its backend: which side is cut, special tokens are split, it has type ids."""
    has_types = "token_type_ids" in tokenizer.model_input_names
    return tokenizer.truncation_side, tokenizer.split_special_tokens, has_types


def _encode(tokenizer, texts: list[str], max_length: int, truncation: str) -> Encoded:
    backend, (side, split_special, has_types) = tokenizer.backend_tokenizer, _settings(tokenizer)
    keeps_tail = truncation == "head-and-tail"
    first = tokenizer(texts[:8], truncation=True, max_length=max_length)["input_ids"] if texts else []
    if keeps_tail:
        backend.no_truncation()
    else:
        backend.enable_truncation(max_length, direction=side)
    backend.no_padding()
    backend.encode_special_tokens = split_special
    ids, types, lengths, num_truncated = [], [], [], 0
    for start in range(0, len(texts), TEXTS_PER_CALL):
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
    type_ids = np.concatenate([np.zeros(0, np.uint8), *types]) if has_types else None
    encoded = Encoded(np.concatenate([np.zeros(0, np.int32), *ids]), offsets, num_truncated, type_ids)
    agree = [
        encoded.row(text).tolist() == row for text, row in enumerate(first) if len(row) < max_length or not keeps_tail
    ]
    assert all(agree), "backend and tokenizer disagree"
    _require_one_bos(tokenizer, encoded.ids, offsets)
    return _read_only(encoded)


def _gap(row, max_length: int) -> slice | None:
    """The tokens between head and tail of a row that was not truncated and is too long; special tokens stay."""
    excess = len(row) - max_length
    if excess <= 0:
        return None
    special = row.special_tokens_mask
    head = special.index(0) + int(HEAD_SHARE * (max_length - sum(special)))
    return slice(head, head + excess)


def _joined(rows: list[list[int]], gaps: list[slice | None], dtype) -> np.ndarray:
    """All rows without their gaps, one after the other."""
    kept = (row if gap is None else row[: gap.start] + row[gap.stop :] for row, gap in zip(rows, gaps, strict=True))
    return np.fromiter(chain.from_iterable(kept), dtype)


def _require_one_bos(tokenizer, ids: np.ndarray, offsets: np.ndarray) -> None:
    """Where the tokenizer adds a BOS, every text starts with one and only one."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("")["input_ids"][:1] != [bos]:
        return
    starts = offsets[:-1]
    assert (ids[starts] == bos).all(), "a tokenizer that adds BOS left one out"
    seconds = starts[np.diff(offsets) > 1] + 1
    # an empty text after a tokenizer that closes with the same token has BOS EOS, of one id
    twice = np.flatnonzero(ids[seconds] == bos)
    if len(twice) and bos != tokenizer.eos_token_id:
        text = int(np.searchsorted(offsets, seconds[twice[0]], side="right")) - 1
        raise Refused(
            f"text {text} itself begins with {tokenizer.bos_token}, which the tokenizer of {tokenizer.name_or_path} "
            "adds: a text has exactly one; take it out of the text"
        )


def _read_only(encoded: Encoded) -> Encoded:
    for array in (encoded.ids, encoded.offsets, encoded.type_ids):
        if array is not None:
            array.flags.writeable = False
    return encoded


def _save(encoded: Encoded, path: Path) -> None:
    arrays = {"ids": encoded.ids, "offsets": encoded.offsets, "num_truncated": np.int64(encoded.num_truncated)}
    if encoded.type_ids is not None:
        arrays["type_ids"] = encoded.type_ids
    save_arrays(path, arrays)


def _load(path: Path) -> Encoded | None:
    arrays = load_arrays(path)
    if arrays is None:
        return None
    num_truncated = int(arrays["num_truncated"])
    return _read_only(Encoded(arrays["ids"], arrays["offsets"], num_truncated, arrays.get("type_ids")))
