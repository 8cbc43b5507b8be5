"""Splits of labelled texts: labels, repeats, stratified draws by seed, and a choosing slice of whole sentences.

Everything here is pure and depends only on its arguments, never on Python's hash seed or on numpy's version.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zerotune.errors import Refused
from zerotune.randomness import random_order
from zerotune.tasks.files import Source
from zerotune.tasks.phrases import PhraseIndex

CHOOSE_ROWS = 872
CHOOSE_SHARE_OF_ROWS = 0.10
CHOOSE_SHARE_OF_WHOLE = 0.25


@dataclass(frozen=True)
class Example:
    """One text. `id` is stable ("train-17": row 17, from 0, of the train source); `label` is None where unlabelled."""

    id: str
    text: str
    label: int | None


@dataclass(frozen=True)
class Splits:
    """The rows that train, choose the checkpoint, and report. `record` is what split.json holds."""

    train: list[Example]
    choose: list[Example]
    test: list[Example]
    record: dict


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def parse_label(value, labels: tuple[str, ...], where: str) -> int | None:
    """Index of a label given as index, as digits, as its name or the name's first three letters; None where unlabelled.

    Unlabelled: None, "" or -1. Raises Refused for anything else, naming the row and the value."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if value == -1:
            return None
        if 0 <= value < len(labels):
            return value
    if isinstance(value, str):
        text = value.strip().casefold()
        if text in ("", "-1"):
            return None
        for index, name in enumerate(labels):
            if text in (str(index), name, name[:3]):
                return index
    numbered = " or ".join(f"{index} ({name})" for index, name in enumerate(labels))
    raise Refused(f"{where}: unknown label {str(value)[:40]!r}; wanted {numbered}")


def clean_text(value, where: str) -> str:
    """The text without surrounding white space. Raises Refused unless it is a non-empty, valid Unicode string."""
    if not isinstance(value, str):
        raise Refused(f"{where}: the text is {type(value).__name__}, wanted a string")
    text = value.strip()
    if not text:
        raise Refused(f"{where}: empty text; remove the row or fill it in")
    if "\0" in text:
        raise Refused(f"{where}: the text holds a NUL character; wanted plain text")
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raises Refused for a string that no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(f"{where}: the text holds half of a surrogate pair, which is not Unicode; mend the row") from None


def make_examples(
    source: Source,
    prefix: str,
    text_column: str,
    label_column: str | None,
    labels: tuple[str, ...],
    mend: Callable[[str], str] | None = None,
) -> list[Example]:
    """One Example per row, with ids prefix-0, prefix-1, …; all labelled or, with no label column or no labels, none.

    `mend` takes what is no text, such as markup, out of each one. Raises Refused for an empty text, an unknown label,
    and a source of which only a part is labelled."""
    examples = []
    for row, fields in enumerate(source.rows):
        text = clean_text(fields.get(text_column), source.where(row))
        if mend:
            text = clean_text(mend(text), source.where(row))
        label = None if label_column is None else parse_label(fields.get(label_column), labels, source.where(row))
        examples.append(Example(f"{prefix}-{row}", text, label))
    unlabelled = [row for row, example in enumerate(examples) if example.label is None]
    if unlabelled and len(unlabelled) < len(examples):
        raise Refused(
            f"{source.where(unlabelled[0])}: no label, as in {len(unlabelled)} of {len(examples)} rows; "
            "label every row of a file or none"
        )
    return examples


def require_labels(
    examples: list[Example], name: str, labels: tuple[str, ...], way_out: str, every: bool = True
) -> None:
    """Raises Refused where `examples` (called `name`) are unlabelled or, with `every`, lack one of the labels."""
    found = Counter(example.label for example in examples)
    if not examples or None in found:
        raise Refused(f"{name}: {'no rows' if not examples else 'the rows have no labels'}; {way_out}")
    missing = [label for index, label in enumerate(labels) if index not in found]
    if every and missing:
        raise Refused(f"{name}: none of {len(examples)} rows is {' or '.join(missing)}; {way_out}")


def count_repeats(examples: list[Example]) -> dict:
    """{"duplicates": rows whose text and label an earlier row has, "conflicting_texts": texts with several labels}."""
    labels_of: dict[str, set] = {}
    for example in examples:
        labels_of.setdefault(normalise(example.text), set()).add(example.label)
    num_distinct = sum(len(found) for found in labels_of.values())
    conflicts = sum(len(found) > 1 for found in labels_of.values())
    return {"duplicates": len(examples) - num_distinct, "conflicting_texts": conflicts}


def without_texts_of(examples: list[Example], others: Iterable[Example]) -> list[Example]:
    """The examples whose normalised text is that of none of `others`."""
    seen = {normalise(other.text) for other in others}
    return [example for example in examples if normalise(example.text) not in seen]


# --- draws by seed ---


def _shares(counts: list[int], size: int) -> list[int]:
    """`size` items over groups of given sizes: proportional, by largest remainder, at least 1 each if size allows."""
    total = sum(counts)
    shares = [count * size // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda group: (-(counts[group] * size % total), group))
    for group in by_remainder[: size - sum(shares)]:
        shares[group] += 1
    if size >= len(counts):
        for group, share in enumerate(shares):
            if share == 0:
                shares[shares.index(max(shares))] -= 1
                shares[group] = 1
    return shares


def _by_label(examples: list[Example]) -> list[list[int]]:
    """Positions of the examples of each label, in label order (unlabelled first)."""
    groups: dict[int | None, list[int]] = {}
    for position, example in enumerate(examples):
        groups.setdefault(example.label, []).append(position)
    return [groups[label] for label in sorted(groups, key=lambda label: -1 if label is None else label)]


def _draw(
    examples: list[Example], groups: list[list[int]], shares: list[int], seed: int, purpose: str
) -> list[Example]:
    chosen = []
    for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
        order = random_order(len(group), seed, f"{purpose}/{number}")
        chosen.extend(group[position] for position in order[:share])
    return [examples[position] for position in sorted(chosen)]


def stratified_subset(examples: list[Example], size: int, seed: int, purpose: str) -> list[Example]:
    """`size` examples (all, where there are no more) with the label shares of the whole, in their old order.

    Draws for different purposes are independent under one seed."""
    if size >= len(examples):
        return list(examples)
    groups = _by_label(examples)
    return _draw(examples, groups, _shares([len(group) for group in groups], size), seed, purpose)


def stratified_split(
    examples: list[Example], share: float, seed: int, purpose: str
) -> tuple[list[Example], list[Example]]:
    """(rest, drawn): a share of the examples drawn with the label shares of the whole; both in their old order."""
    drawn = stratified_subset(examples, round(len(examples) * share), seed, purpose)
    ids = {example.id for example in drawn}
    return [example for example in examples if example.id not in ids], drawn


def balanced_subset(examples: list[Example], size: int, seed: int, purpose: str) -> list[Example]:
    """`size` examples, as many of each label (the first label one more where size is odd), in their old order.

    Raises Refused, with `purpose` for the flag, where a label has too few rows."""
    groups = _by_label(examples)
    shares = [size // len(groups) + (number < size % len(groups)) for number in range(len(groups))]
    fewest = min(len(group) for group in groups)
    if fewest < max(shares):
        raise Refused(
            f"{purpose} {size}: a balanced subset needs {max(shares)} rows of each label, but the rarest has {fewest}; "
            f"ask for at most {fewest * len(groups)}"
        )
    return _draw(examples, groups, shares, seed, purpose)


# --- a choosing slice of whole sentences ---


def whole_sentences(examples: list[Example]) -> list[Example]:
    """The examples whose normalised text stands, word for word, in no other; of equal rows with one label the first.

    Equal rows with several labels are left out."""
    whole = PhraseIndex(normalise(example.text) for example in examples).outermost()
    labels_of: dict[str, set] = {}
    first: dict[str, Example] = {}
    for example in examples:
        text = normalise(example.text)
        labels_of.setdefault(text, set()).add(example.label)
        first.setdefault(text, example)
    return [example for text, example in first.items() if text in whole and len(labels_of[text]) == 1]


def without_phrases_of(examples: list[Example], sentences: list[Example]) -> list[Example]:
    """The examples whose normalised text stands inside none of `sentences` (nor equals one)."""
    index = PhraseIndex(normalise(example.text) for example in examples)
    found = {text for sentence in sentences for text in index.inside(normalise(sentence.text))}
    return [example for example in examples if normalise(example.text) not in found]


def choosing_size(num_rows: int, num_whole: int) -> int:
    """Rows of a choosing slice: 872 (as many as SST-2's validation set), but at most 10 % of the rows and 25 % of the
    whole sentences, and at least 2."""
    return max(2, min(CHOOSE_ROWS, int(num_rows * CHOOSE_SHARE_OF_ROWS), int(num_whole * CHOOSE_SHARE_OF_WHOLE)))


def draw_choosing_slice(
    train: list[Example], seed: int, balanced_size: int | None = None
) -> tuple[list[Example], list[Example], int]:
    """(rest of train, choosing slice, number of whole sentences it was drawn from).

    The slice is drawn from whole sentences; every row that stands inside a drawn one leaves train. With `balanced_size`
    the slice has that many rows, as many of each label."""
    whole = whole_sentences(train)
    if not whole:
        raise Refused("train holds no sentence that can choose: every text carries several labels; mend the labels")
    if balanced_size is None:
        chosen = stratified_subset(whole, choosing_size(len(train), len(whole)), seed, "choose")
    else:
        chosen = balanced_subset(whole, balanced_size, seed, "--validation-size")
    return without_phrases_of(train, chosen), chosen, len(whole)


# --- the record ---


def ids_sha256(examples: list[Example]) -> str:
    """sha256 of the sorted ids, joined by newlines."""
    return hashlib.sha256("\n".join(sorted(example.id for example in examples)).encode()).hexdigest()


def describe(examples: list[Example], labels: tuple[str, ...]) -> dict:
    """What split.json says of one split: {"count", "labels": {name: count}, "ids_sha256"}."""
    found = Counter(example.label for example in examples)
    names = {"unlabelled": found[None]} if found[None] else {name: found[index] for index, name in enumerate(labels)}
    return {"count": len(examples), "labels": names, "ids_sha256": ids_sha256(examples)}
