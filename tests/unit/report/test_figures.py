"""Test figures with arbitrary names and numbers."""

import re
import warnings

import pytest

from zerotune.report import figures
from zerotune.report.figures import Series

NAMES = ["a$x^{$", "$$", r"\$c$d\$", "_hidden", "<b>&", "\u65e5\u672c"]


def texts(svg):
    return [text.replace("\u200b", "") for text in re.findall(r">([^<>]+)</text>", svg)]


def shown(name):
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name):
    """matplotlib reads text between dollar signs as mathematics, and leaves names that start with _ out of legends."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dots = figures.intervals("t", "x", [(name, 0.5, [0.1, 0.9], figures.TUNED), ("b", 0.5, None, figures.BASE)])
        lines = figures.curves("t", "x", "y", [Series(name, [1, 2], [1.0, 2.0]), Series("b", [1, 2], [2.0, 1.0])])
    assert shown(name) in texts(dots) and shown(name) in texts(lines)


def test_numbers_that_cannot_be_drawn_leave_a_gap():
    numbers = [1.0, None, float("nan"), 1e308, -1e308, 2.0]
    assert "<svg" in figures.curves("t", "x", "y", [Series("a", [1, 2, 3, 4, 5, 9 * 10**18], numbers)])
