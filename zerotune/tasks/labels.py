"""Labels as rows give them, and the labels that a set of rows must have."""

from collections import Counter
from functools import lru_cache

from zerotune.errors import Refused


def parse_label(value, labels: tuple[str, ...], where: str) -> int | None:
    """Return the index of a label that is given by one of its `spellings`, as text or as a whole number.

    None, "" and -1 mean that the row has no label: None. Raises Refused for anything else, naming row and value."""
    is_word = isinstance(value, str) or type(value) is int  # True and 1.0 are no labels
    word = str(value).strip().casefold() if is_word else None
    if value is None or word in ("", "-1"):
        return None
    label = spellings(labels).get(word)
    if label is None:
        raise Refused(f"{where}: unknown label {str(value)[:40]!r}; wanted {numbered(labels, 'or')}")
    return label


@lru_cache
def spellings(labels: tuple[str, ...]) -> dict[str, int]:
    """Return the index of each way to write a label: the index, the name, the name's first three letters."""
    return {word: index for index, name in enumerate(labels) for word in (str(index), name, name[:3])}


def numbered(labels: tuple[str, ...], conjunction: str) -> str:
    """Return "0 (negative) or 1 (positive)" for a message."""
    return f" {conjunction} ".join(f"{index} ({name})" for index, name in enumerate(labels))


def require_labels(examples: list, name: str, labels: tuple[str, ...], way_out: str, every: bool = True) -> None:
    """Raise Refused where the examples called `name` are none or unlabelled or, with `every`, lack a label."""
    found = Counter(example.label for example in examples)
    if not examples or None in found:
        raise Refused(f"{name}: {'the rows have no labels' if examples else 'no rows'}; {way_out}")
    missing = [label for index, label in enumerate(labels) if index not in found]
    if every and missing:
        raise Refused(f"{name}: none of {len(examples)} rows is {' or '.join(missing)}; {way_out}")
