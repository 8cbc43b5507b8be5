"""Examples, and the splits of them: removal of repeats, stratified and balanced draws by seed, validation slices.

Everything here is pure and depends only on its arguments, never on Python's hash seed or on numpy's version. A draw is
seeded by a purpose beside the seed: changing that string moves the splits of every user.
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

# A slice of whole sentences has as many rows as SST-2's validation set, but no larger share of its rows or sentences.
SENTENCES, SHARE_OF_ROWS, SHARE_OF_SENTENCES = 872, 0.10, 0.25


@dataclass(frozen=True, slots=True)
class Example:
    """One text.

    Attributes:
        id: stable: "train-17" is row 17, from 0, of the train source.
        label: the label's number; where a row may have several labels, the numbers of all, rising; None where the row
            is not labelled.
        index: the number that an unlabelled row has in a column of its own; None without one.
        pair: the two texts of which `text` is made, for models that read two; None where there is one.
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
        """The numbers of all labels that the row has."""
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

    A text in that form is returned itself: it takes no memory twice."""
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
    """Return the examples whose normalised text is that of none of `others`."""
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
    """Draw `size` examples (all, where there are no more) with the label shares of the whole, in their old order.

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
    """Return (rest, drawn): a share of the examples, stratified by label, and the others in their old order.

    At least one example of each label stays."""
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
    """Return the drawn examples but, for each label that no other example has, the first of its rows."""
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
    """Draw `size` examples, as many of each label (the first labels one more where it does not divide), in their old
    order. Raises Refused, naming the flag that asks for it, where a label has too few rows or a row several labels."""
    if have_label_sets(examples):
        raise Refused(
            f"{flag} {size}: a balanced subset has as many rows of each label, and with --multi-label a row may have "
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


# What a smaller test set is drawn for, by --limit-eval or for the base evaluation: one seed draws the same items first,
# so that two sizes have those of the smaller one in common (but for the rounding of labels' shares).
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

    This comes last, so that no size or limit changes which part a row belongs to.

    Args:
        is_sized: the part was drawn in its size already.
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
    """Return (rest of train, validation slice, a note): a stratified share of train, or `balanced_size` rows of it, as
    many of each label. Rows with the text of a drawn one leave train."""
    if balanced_size is not None:
        drawn = balanced_subset(train, balanced_size, seed, "--validation-size")
    elif have_label_sets(train):
        _, drawn = stratified_split(train, share, seed, "choose")
    else:
        drawn = stratified_subset(train, round(share * len(train)), seed, "choose")
    return without_texts_of(train, drawn), drawn, f"{len(drawn)} rows of train validate"


def draw_validation_sentences(
    train: list[Example], seed: int, balanced_size: int | None = None
) -> tuple[list[Example], list[Example], str]:
    """Return (rest of train, validation slice, a note) as `draw_validation`, drawn from whole sentences: every row that
    is contained in a drawn one leaves train."""
    index = PhraseIndex(example.normalised for example in train)
    whole = whole_sentences(train, index)
    if not whole:
        raise Refused("no sentence of train can validate: every text has several labels; correct the labels")
    if balanced_size is None:
        drawn = stratified_subset(whole, sentence_slice_size(len(train), len(whole)), seed, "choose")
    else:
        drawn = balanced_subset(whole, balanced_size, seed, "--validation-size")
    rest = without_phrases_of(train, drawn, index)
    return rest, drawn, f"{len(drawn)} rows validate, drawn from the {len(whole)} whole sentences of train"


def whole_sentences(examples: list[Example], index: PhraseIndex) -> list[Example]:
    """Return the examples whose normalised text is contained, word for word, in no other of the `index` of all; of
    equal rows with one label the first, and none of equal rows with several labels."""
    whole, first, conflicting = index.outermost(), {}, set()
    for example in examples:
        text = example.normalised
        if text in whole and first.setdefault(text, example).label != example.label:
            conflicting.add(text)
    return [example for text, example in first.items() if text not in conflicting]


def without_phrases_of(examples: list[Example], sentences: list[Example], index: PhraseIndex) -> list[Example]:
    """Return the examples, all of the `index`, whose normalised text is contained in none of `sentences`."""
    contained = index.inside([sentence.normalised for sentence in sentences])
    return [example for example in examples if example.normalised not in contained]


def sentence_slice_size(num_rows: int, num_whole: int) -> int:
    """Return the rows of a validation slice of whole sentences, at least 2."""
    return max(2, min(SENTENCES, int(num_rows * SHARE_OF_ROWS), int(num_whole * SHARE_OF_SENTENCES)))


# --- the record ---


def ids_sha256(examples: list) -> str:
    """Return the sha256 of the sorted ids, joined by newlines."""
    return hashlib.sha256("\n".join(sorted(example.id for example in examples)).encode()).hexdigest()


def describe(examples: list[Example], labels: tuple[str, ...]) -> dict:
    """Return split.json's entry for a part: {"count", "labels": {name: rows with it}, "ids_sha256"}.

    Where rows may have several labels, "without_label" counts those that have none."""
    found = Counter(label for example in examples for label in example.labels)
    num_unlabelled = sum(example.label is None for example in examples)
    names = {"unlabelled": num_unlabelled} if num_unlabelled else {name: found[i] for i, name in enumerate(labels)}
    without = {"without_label": sum(not each.label for each in examples)} if have_label_sets(examples) else {}
    return {"count": len(examples), "labels": names, **without, "ids_sha256": ids_sha256(examples)}
