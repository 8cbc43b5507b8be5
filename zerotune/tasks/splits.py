"""Examples and their splits: removal of repeats, stratified and balanced draws by seed, validation slices.

Everything here is pure and depends only on its arguments, never on Python's hash seed or on numpy's version. A draw
depends on the seed and on a purpose, a string: changing that string changes the splits of every user.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from zerotune.errors import Refused
from zerotune.randomness import random_order
from zerotune.settings.groups import DataSettings
from zerotune.tasks.phrases import PhraseIndex
from zerotune.tasks.stratification import draw_iteratively

# A slice of whole sentences is as large as SST-2's validation set, or these shares of rows or whole sentences if less.
SENTENCES, SHARE_OF_ROWS, SHARE_OF_SENTENCES = 872, 0.10, 0.25


@dataclass(frozen=True, slots=True)
class Example:
    """One text.

    Attributes:
        id: stable: "train-17" is row 17, from 0, of the train source.
        label: the label's index; the indices of all labels, ascending, if rows may have several; None if the row is
            unlabelled.
        index: an unlabelled row's own number from an index column; None without one.
        pair: the two texts that `text` is made of, for models that read pairs; None for a single text.
        normalised: `normalise_text` of the text.
    """

    id: str
    text: str
    label: int | tuple[int, ...] | None
    index: str | None = None
    pair: tuple[str, str] | None = None

    normalised: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "normalised", normalise_text(self.text))

    @property
    def labels(self) -> tuple[int, ...]:
        """The indices of all labels that the row has."""
        if isinstance(self.label, tuple):
            return self.label
        return () if self.label is None else (self.label,)


@dataclass(frozen=True)
class Splits:
    """The rows that train, validate (choose the checkpoint) and test. `record` is the content of split.json."""

    train: list
    validation: list
    test: list
    record: dict


def normalise_text(text: str) -> str:
    """Return the form in which two texts count as the same: NFC, case folded, single spaces.

    A text already in that form is returned itself, which saves memory."""
    normalised = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text if normalised == text else normalised


def count_repeats(examples: list[Example]) -> dict:
    """Return {"duplicates": rows that repeat text and label of an earlier one, "conflicting_texts": texts with several
    labels}."""
    first_label, others = {}, set()
    for example in examples:
        if first_label.setdefault(example.normalised, example.label) != example.label:
            others.add((example.normalised, example.label))
    num_distinct = len(first_label) + len(others)
    return {"duplicates": len(examples) - num_distinct, "conflicting_texts": len({text for text, _ in others})}


def without_texts_of(examples: list[Example], others: Iterable[Example]) -> list[Example]:
    """Return the examples whose normalised text does not occur in `others`."""
    seen = {other.normalised for other in others}
    return [example for example in examples if example.normalised not in seen]


# --- draws by seed ---


def have_label_sets(examples: list[Example]) -> bool:
    """Return whether each example may have several labels."""
    return bool(examples) and isinstance(examples[0].label, tuple)


def _drawn_by_label_sets(examples: list[Example], size: int, seed: int, purpose: str) -> list[Example]:
    order = random_order(len(examples), seed, purpose).tolist()
    return [examples[position] for position in draw_iteratively([each.labels for each in examples], size, order)]


def _shares(counts: list[int], size: int) -> list[int]:
    """Share `size` items among groups of given sizes: in proportion, by largest remainder, 1 each if size allows."""
    total = sum(counts)
    shares = [count * size // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda group: (-(counts[group] * size % total), group))
    for group in by_remainder[: size - sum(shares)]:
        shares[group] += 1
    if size >= sum(count > 0 for count in counts):
        for group, share in enumerate(shares):
            if share == 0 and counts[group]:
                shares[shares.index(max(shares))] -= 1
                shares[group] = 1
    return shares


def _by_label(examples: list[Example]) -> list[list[int]]:
    """Return the positions of the examples of each label, in label order (unlabelled first)."""
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
    """Draw `size` examples (or all, if there are fewer) with the label shares of the whole, in their old order.

    Draws for different purposes are independent under one seed."""
    if size >= len(examples):
        return list(examples)
    if have_label_sets(examples):
        return _drawn_by_label_sets(examples, size, seed, purpose)
    groups = _by_label(examples)
    return _draw(examples, groups, _shares([len(group) for group in groups], size), seed, purpose)


def stratified_split(
    examples: list[Example], share: float, seed: int, purpose: str
) -> tuple[list[Example], list[Example]]:
    """Draw a share of the examples, stratified by label. Returns (rest, drawn), both in their old order.

    At least one example of each label stays in the rest."""
    size = round(len(examples) * share)
    if have_label_sets(examples):
        drawn = _leaving_each_label(examples, _drawn_by_label_sets(examples, size, seed, purpose))
    else:
        groups = _by_label(examples)
        counts = [len(group) for group in groups]
        shares = _shares(counts, size)
        if any(number == count for number, count in zip(shares, counts, strict=True)):
            rest = [count - 1 for count in counts]
            shares = _shares(rest, min(size, sum(rest))) if any(rest) else rest
        drawn = _draw(examples, groups, shares, seed, purpose)
    ids = {example.id for example in drawn}
    return [example for example in examples if example.id not in ids], drawn


def _leaving_each_label(examples: list[Example], drawn: list[Example]) -> list[Example]:
    """Return the drawn examples, less the first one of each label that would otherwise be missing from the rest."""
    num_left = Counter(label for example in examples for label in example.labels)
    num_left.subtract(label for example in drawn for label in example.labels)
    kept = []
    for example in drawn:
        if any(num_left[label] == 0 for label in example.labels):
            num_left.update(example.labels)
        else:
            kept.append(example)
    return kept


def balanced_subset(examples: list[Example], size: int, seed: int, flag: str) -> list[Example]:
    """Draw `size` examples, equally many of each label (or one more of the first labels), in their old order.

    Raises Refused, naming the flag, if a label has too few rows or rows may have several labels."""
    if have_label_sets(examples):
        raise Refused(
            f"{flag} {size}: a balanced subset has equally many rows of each label, and with --multi-label a row has "
            "several: use --limit-train and --limit-eval"
        )
    groups = _by_label(examples)
    shares = [size // len(groups) + (number < size % len(groups)) for number in range(len(groups))]
    fewest = min(len(group) for group in groups)
    if fewest < max(shares):
        raise Refused(
            f"{flag} {size}: a balanced subset needs {max(shares)} rows of each label, but the rarest has {fewest}; "
            f"ask for at most {fewest * len(groups)}"
        )
    return _draw(examples, groups, shares, seed, flag)


# Purpose of drawing a smaller test set, for --limit-eval and for the base evaluation. One seed draws the same items
# first, so that the larger of two sets includes the smaller one (up to the rounding of labels' shares).
TEST_LIMIT = "test limit"


def subset(
    settings: DataSettings,
    part: str,
    rows: list,
    is_sized: bool = False,
    balanced: Callable[[list, int, int, str], list] = balanced_subset,
    limited: Callable[[list, int, int, str], list] = stratified_subset,
) -> list:
    """Cut a part ("train", "validation" or "test") down to its --*-size by `balanced`, then its --limit-* by `limited`.

    This is the last step, so that no size or limit changes which part a row belongs to.

    Args:
        is_sized: whether the part was already drawn at its size.
    """
    size, limit, purpose = {
        "train": (settings.train_size, settings.limit_train, "train limit"),
        "validation": (settings.validation_size, settings.limit_eval, "choose limit"),
        "test": (settings.test_size, settings.limit_eval, TEST_LIMIT),
    }[part]
    if size is not None and not is_sized:
        rows = balanced(rows, size, settings.split_seed, f"--{part}-size")
    return rows if limit is None else limited(rows, limit, settings.split_seed, purpose)


# --- a slice of train that validates ---


def draw_validation(
    train: list[Example], seed: int, balanced_size: int | None, share: float
) -> tuple[list[Example], list[Example], str]:
    """Draw a stratified share of train, or `balanced_size` rows of it, equally many of each label.

    Rows with the text of a drawn one leave train. Returns (rest of train, validation slice, a note)."""
    if balanced_size is not None:
        drawn = balanced_subset(train, balanced_size, seed, "--validation-size")
    else:
        _, drawn = stratified_split(train, share, seed, "choose")
    return without_texts_of(train, drawn), drawn, f"{len(drawn):,} rows of train are set aside for validation"


def draw_validation_sentences(
    train: list[Example], seed: int, balanced_size: int | None = None
) -> tuple[list[Example], list[Example], str]:
    """Draw a validation slice as `draw_validation`, but from whole sentences only.

    Every row that is contained in a drawn one leaves train. Returns (rest of train, validation slice, a note)."""
    index = PhraseIndex(example.normalised for example in train)
    whole = whole_sentences(train, index)
    if not whole:
        raise Refused("no sentence of train can be validated on: every text has several labels; correct the labels")
    if balanced_size is None:
        drawn = stratified_subset(whole, sentence_slice_size(len(train), len(whole)), seed, "choose")
    else:
        drawn = balanced_subset(whole, balanced_size, seed, "--validation-size")
    rest = without_phrases_of(train, drawn, index)
    note = f"{len(drawn):,} of the {len(whole):,} whole sentences of train are set aside for validation"
    return rest, drawn, note


def whole_sentences(examples: list[Example], index: PhraseIndex) -> list[Example]:
    """Return the examples whose normalised text is contained, word for word, in no other text of the `index`.

    Of rows with the same text only the first is returned, or none if their labels differ. The `index` has all texts."""
    whole, first, conflicting = index.outermost(), {}, set()
    for example in examples:
        text = example.normalised
        if text in whole and first.setdefault(text, example).label != example.label:
            conflicting.add(text)
    return [example for text, example in first.items() if text not in conflicting]


def without_phrases_of(examples: list[Example], sentences: list[Example], index: PhraseIndex) -> list[Example]:
    """Return the examples whose normalised text is contained in none of `sentences`. The `index` has all texts."""
    contained = index.inside([sentence.normalised for sentence in sentences])
    return [example for example in examples if example.normalised not in contained]


def sentence_slice_size(num_rows: int, num_whole: int) -> int:
    """Return the number of rows in a validation slice of whole sentences, at least 2."""
    return max(2, min(SENTENCES, int(num_rows * SHARE_OF_ROWS), int(num_whole * SHARE_OF_SENTENCES)))


# --- the record ---


def ids_sha256(examples: list) -> str:
    """Return the sha256 of the sorted ids, joined by newlines."""
    return hashlib.sha256("\n".join(sorted(example.id for example in examples)).encode()).hexdigest()


def describe(examples: list[Example], labels: tuple[str, ...]) -> dict:
    """Return split.json's entry for a part: {"count", "labels": {name: rows with it}, "ids_sha256"}.

    If rows may have several labels, "without_label" counts those that have none."""
    found = Counter(label for example in examples for label in example.labels)
    num_unlabelled = sum(example.label is None for example in examples)
    names = {"unlabelled": num_unlabelled} if num_unlabelled else {name: found[i] for i, name in enumerate(labels)}
    without = {"without_label": sum(not each.label for each in examples)} if have_label_sets(examples) else {}
    return {"count": len(examples), "labels": names, **without, "ids_sha256": ids_sha256(examples)}
