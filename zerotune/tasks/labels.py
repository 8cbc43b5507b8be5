"""Read the labels of rows, and check which labels a set of rows must have."""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache

from zerotune.errors import MOST_LISTED, Refused, did_you_mean, listed, quoted
from zerotune.tasks.files import check_unicode

# A column with more is not a column of labels: every label takes outputs, prompts and rows in tables.
MOST_LABELS = 1000


def parse_label(value, labels: tuple[str, ...], where: str) -> int | None:
    """Return the index of a label that is given by one of its `spellings`, as text or as a whole number.

    Return None for None, "" and -1, which mean no label. Raises Refused for anything else, naming row and value."""
    is_word = isinstance(value, str) or type(value) is int  # True and 1.0 are not labels
    word = str(value).strip().casefold() if is_word else None
    if value is None or word in ("", "-1"):
        return None
    label = spellings(labels).get(word)
    if label is None:
        raise Refused(
            f"{where}: unknown label {str(value)[:40]!r}{did_you_mean(str(value), labels)}; "
            f"wanted {numbered(labels, 'or')}, or train/classify.py and eval/classify.py, which read labels of your own"
        )
    return label


@lru_cache
def spellings(labels: tuple[str, ...]) -> dict[str, int]:
    """Return the index of each way to write a label: the index, the name, the name's first three letters."""
    return {word: index for index, name in enumerate(labels) for word in (str(index), name, name[:3])}


def numbered(labels: tuple[str, ...], conjunction: str) -> str:
    """Return "0 (negative) or 1 (positive)" for a message."""
    return f" {conjunction} ".join(f"{index} ({name})" for index, name in enumerate(labels))


# --- labels of the user's own ---

FORMAT_CATEGORY = "Cf"  # the Unicode category of characters without a shape, such as a zero-width space
TRAIN_ON_IT = "train on rows with this label"
GIVE_TWO = "give rows with two labels or more"
INDICATORS = ({"0", "1"}, {"false", "true"})  # words that are hardly labels if a row repeats one


def label_word(value, where: str) -> str | None:
    """Return a label of the user's own as a word: "true" for True, "3" for 3 and 3.0; None for a missing value.

    None, NaN and blank text are missing. Words are in NFC, so that no two labels look the same. Raises Refused, naming
    the row, for a value that is not a word or number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):  # of a parquet file
        value = float(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if value is None or isinstance(value, int):
        return None if value is None else str(value)
    if not isinstance(value, str):
        raise Refused(
            f"{where}: the label is {type(value).__name__} {str(value)[:40]!r}, wanted a word or a number: name "
            "another column with --label-column"
            + (", or read several labels a row with --multi-label" if isinstance(value, list) else "")
        )
    check_unicode(value, where, "label")
    return unicodedata.normalize("NFC", " ".join(value.split())) or None


def parse_own_label(value, labels: tuple[str, ...], where: str, way_out: str = TRAIN_ON_IT) -> int | None:
    """Return the index of a `label_word`, None for a missing one.

    Args:
        way_out: besides correcting the row, for messages.
    Raises:
        Refused: the word is not one of the labels; the message names row and value.
    """
    word = label_word(value, where)
    return None if word is None else _place(word, labels, where, way_out)


def _place(word: str, labels: tuple[str, ...], where: str, way_out: str) -> int:
    label = _places(labels).get(word)
    if label is None:
        raise Refused(
            f"{where}: unknown label {word[:40]!r}{did_you_mean(word, labels)}; the {len(labels)} labels are "
            f"{listed(labels)}: correct the row, or {way_out}"
        )
    return label


def label_words(value, separator: str, where: str) -> list[str] | None:
    """Return the labels of a row that may have several, as `label_word`s; None for a missing value (None, NaN).

    Args:
        value: a list of labels, or text with `separator` between them, either of which may be empty; else one label.
    Raises:
        Refused: as `label_word`; a label in a list is missing; a text looks like a list printed by Python.
    """
    if isinstance(value, str):
        if value.strip().startswith("[") and value.strip().endswith("]"):
            raise Refused(
                f"{where}: the labels are {value.strip()[:40]!r}: write them with {separator!r} between them and "
                "without brackets, or as lists in a jsonl or parquet file"
            )
        words = [label_word(part, where) for part in value.split(separator)]
        _refuse_indicators(words, value, where)
        return list(dict.fromkeys(word for word in words if word is not None))
    if not isinstance(value, list | tuple):
        word = label_word(value, where)
        return None if word is None else [word]
    if any(isinstance(each, list | tuple) for each in value):
        raise Refused(f"{where}: the labels are {str(value)[:40]}, a list in a list: give one list of labels a row")
    words = [label_word(each, where) for each in value]
    _refuse_indicators(words, value, where)
    if None in words:
        raise Refused(f"{where}: one of the {len(words)} labels is missing: leave it out, or fill it in")
    return list(dict.fromkeys(words))


def _refuse_indicators(words: list[str | None], value, where: str) -> None:
    """Refuse a 0 or 1, or true or false, for each label. Two different ones may be two labels: see `labels_of`."""
    if any(set(words) <= pair for pair in INDICATORS) and len(words) > max(1, len(set(words))):
        raise Refused(
            f"{where}: the labels are {str(value)[:40]}, which looks like a {words[0]} for each label: write the "
            "names of the labels that the row has"
        )


def parse_label_set(
    value, labels: tuple[str, ...], where: str, separator: str, way_out: str = TRAIN_ON_IT
) -> tuple[int, ...] | None:
    """Return the indices of a row's `label_words` in ascending order; () for no label, None for a missing value.

    Args:
        way_out: as for `parse_own_label`.
    Raises:
        Refused: a word is none of the labels; the message names row and value.
    """
    words = label_words(value, separator, where)
    return None if words is None else tuple(sorted(_place(word, labels, where, way_out) for word in words))


@lru_cache
def _places(labels: tuple[str, ...]) -> dict[str, int]:
    return {unicodedata.normalize("NFC", label): index for index, label in enumerate(labels)}


def collect_labels(
    words: Iterable[str | None],
    source: str,
    order: tuple[str, ...] | None = None,
    way_out: str = GIVE_TWO,
) -> tuple[str, ...]:
    """Return the distinct labels among the `label_word`s of some rows, sorted as numbers if all are, else as words.

    Args:
        source: the rows' name, for messages.
        order: the labels in the data set's own order; None if it has none.
        way_out: if there is a single label, for messages.
    Raises:
        Refused: there are too few or too many labels, or `_require_distinct` refuses them.
    """
    counts = Counter(word for word in words if word is not None)
    if not counts:
        raise Refused(f"{source}: no row has a label: name the column of the labels with --label-column")
    if len(counts) == 1:
        raise Refused(f"{source}: the only label is {listed(counts)}, with nothing to tell apart: {way_out}")
    if len(counts) > MOST_LABELS or (len(counts) > MOST_LISTED and len(counts) == counts.total()):
        found = f"{len(counts):,} different labels in {counts.total():,} rows"
        raise Refused(
            f"{source}: {found}, such as {listed(sorted(counts)[:3])}; a label occurs more than once, and there are at "
            f"most {MOST_LABELS:,}: name another column with --label-column"
        )
    _require_distinct(counts, source)
    return tuple(sorted(counts, key=_by_size if all(map(_is_number, counts)) else None) if order is None else order)


def check_given_labels(labels: tuple[str, ...]) -> None:
    """Refuse labels, of a model or named by the user, that leave nothing to choose from."""
    if len(set(labels)) < max(2, len(labels)):
        raise Refused(f"wanted two or more different labels, found {listed(labels)}: give others, or another model")


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _by_size(word: str) -> tuple[float, str]:
    return float(word), word


def _require_distinct(counts: Counter, source: str) -> None:
    """Refuse labels that differ only in case or invisible characters, and names that metrics.json uses otherwise."""
    seen: dict[str, str] = {}
    for label in counts:
        key = "".join(letter for letter in label.casefold() if unicodedata.category(letter) != FORMAT_CATEGORY)
        other = seen.setdefault(key, label)
        if other != label:
            is_unseen = other.casefold() != label.casefold()
            difference = "invisible characters" if is_unseen else "case (ß counts as ss)"
            raise Refused(
                f"{source}: the labels {other!r} ({counts[other]:,} rows) and {label!r} ({counts[label]:,} rows) "
                f"differ only in {difference}: spell them the same way, or rename one"
            )
        if label.casefold().endswith("ci95"):
            raise Refused(f"{source}: a label cannot end in ci95, as intervals in metrics.json do: rename {label!r}")


def count_line(counts: dict[str, int]) -> str:
    """Return "3 labels, with their training rows: ham (12), …"."""
    named = [f"{quoted(label)} ({count:,})" for label, count in counts.items()]
    more = f" and {len(named) - 2 * MOST_LISTED} more" if len(named) > 2 * MOST_LISTED else ""
    return f"{len(named)} labels, with their training rows: {', '.join(named[: 2 * MOST_LISTED])}{more}"


# --- what a set of rows must have ---


def require_labels(examples: list, name: str, labels: tuple[str, ...], way_out: str, every: bool = True) -> None:
    """Refuse examples, called `name`, if there are none, one is unlabelled or, with `every`, a label has no example."""
    found = {label for example in examples for label in example.labels}
    if not examples or any(example.label is None for example in examples):
        raise Refused(f"{name}: {'the rows have no labels' if examples else 'no rows'}; {way_out}")
    missing = [label for index, label in enumerate(labels) if index not in found]
    if every and missing:
        raise Refused(f"{name}: none of {len(examples)} rows is {listed(missing)}; {way_out}")
