"""Types of flags for argparse: each turns a flag's text into its value or raises ValueError."""

import re
from argparse import ArgumentTypeError

from zerotune.settings.groups import Interval


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = non_negative_int(text)
    if value < 1:
        raise ValueError(text)
    return value


def non_negative_int(text: str) -> int:
    """Parse a whole number from 0 that fits 64 bits."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError(text)
    return value


def steps_or_minutes(text: str) -> Interval:
    """Parse a whole number of steps, such as 500, or minutes, such as 10m or 0.5m."""
    if not text.endswith("m"):
        return Interval(steps=positive_int(text))
    minutes = non_negative_float(text.removesuffix("m"))
    if minutes == 0:
        raise ValueError(text)
    return Interval(minutes=minutes)


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def non_empty(text: str) -> str:
    """Return the word as it is; refuse an empty one, which an unset shell variable gives."""
    if not text:
        raise ValueError(text)
    return text


def positive_or_none(text: str) -> float | None:
    """Parse a finite number above 0, or the word none."""
    if text == "none":
        return None
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def fraction_below_1(text: str) -> float:
    """Parse a number from 0 to below 1."""
    value = fraction(text)
    if value == 1:
        raise ValueError(text)
    return value


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def gibibytes(text: str) -> int:
    """Parse the memory of a device, such as 80G or 23.5, in GiB. Returns bytes."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:G|GB|GiB)?", text)
    if not size or not float(size[1]):
        raise ArgumentTypeError(f"must be GiB, such as 80G, not {text!r}")
    return int(float(size[1]) * 2**30)
