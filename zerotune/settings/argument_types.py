"""Types of flags for argparse: each turns a flag's text into its value, or names the rule that the text breaks."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

from zerotune.settings.groups import Interval


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a whole number, not {text!r}") from None
    if value < least:
        raise ArgumentTypeError(f"must be at least {least}, not {value}")
    if value >= 2**63:
        raise ArgumentTypeError(f"must fit 64 bits, which {text} does not")
    return value


def _number(text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be {wanted}, not {text!r}") from None


def steps_or_minutes(text: str) -> Interval:
    """Parse a whole number of steps, such as 500, or minutes, such as 10m or 0.5m."""
    if text.isdecimal():
        return Interval(steps=positive_int(text))
    wanted = "steps, such as 500, or minutes, such as 10m"
    minutes = _number(text.removesuffix("m"), wanted)
    if not (text.endswith("m") and 0 < minutes < math.inf):
        raise ArgumentTypeError(f"must be {wanted}, not {text!r}")
    return Interval(minutes=minutes)


def _within(fits: Callable[[float], bool], wanted: str, rule: str | None = None) -> Callable[[str], float]:
    """Return a type of numbers that fit.

    Args:
        wanted: what the message names for a text that is no number.
        rule: what it names for a number that does not fit (default: wanted).
    """

    def parse(text: str) -> float:
        value = _number(text, wanted)
        if not fits(value):
            raise ArgumentTypeError(f"must be {rule or wanted}, not {text}")
        return value

    return parse


non_negative_float = _within(lambda value: 0 <= value < math.inf, "a number", "a finite number of at least 0")
positive_float = _within(lambda value: 0 < value < math.inf, "a number above 0")
fraction = _within(lambda value: 0 <= value <= 1, "a number from 0 to 1", "from 0 to 1")
fraction_below_1 = _within(lambda value: 0 <= value < 1, "a number from 0 to below 1", "from 0 to below 1")
_positive = _within(lambda value: 0 < value < math.inf, "a number above 0, or none")


def positive_or_none(text: str) -> float | None:
    """Parse a finite number above 0, or the word none."""
    return None if text == "none" else _positive(text)


def non_empty(text: str) -> str:
    """Return the word as it is; refuse an empty one, which an unset shell variable gives."""
    if not text:
        raise ArgumentTypeError("is empty: is a shell variable unset?")
    return text


def gibibytes(text: str) -> int:
    """Parse the memory of a device, such as 80G or 23.5, in GiB. Returns bytes."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:G|GB|GiB)?", text)
    num_bytes = int(float(size[1]) * 2**30) if size else 0
    if not num_bytes:
        raise ArgumentTypeError(f"must be GiB, such as 80G, not {text!r}")
    return num_bytes
