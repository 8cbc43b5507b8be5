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


def test_long_names_that_differ_are_shown_differently():
    flags = "learning_rate-1e-5_lora_rank-{}_warmup_ratio-0.06_weight_decay-0.01_seed-{}"
    names = [flags.format(rank, seed) for rank in (8, 64) for seed in (0, 1)]
    shown = figures.shown_labels(names)
    assert shown[0].startswith("…rank-8_warmup") and shown[3].endswith("seed-1")
    alike = [f"{'x' * 40}{middle}{'y' * 40}" for middle in "ab"]
    for labels in (shown, figures.shown_labels(alike)):
        assert len(set(labels)) == len(labels) and max(map(len, labels)) <= figures.MOST_CHARACTERS
    assert figures.shown_labels(["short", "other"]) == ["short", "other"] and figures.shown_labels([]) == []


@pytest.mark.parametrize("length", [20, 27, 40, 60, 180])
def test_long_names_leave_room_for_the_plot_and_stay_in_the_figure(length):
    """Runs are named after model and method, and those of a sweep after all values that differ."""
    names = [f"runs/{'a' * (length - 6)}{number}" for number in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dots = figures.intervals("t", "x", [(name, 0.5, [0.1, 0.9], figures.TUNED) for name in names])
        lines = figures.curves("t", "x", "y", [Series(name, [1, 2], [1.0, 2.0]) for name in names])
    for svg in (dots, lines):
        width = float(re.search(r'viewBox="0 0 ([0-9.]+)', svg)[1])
        placed = re.findall(r'text-anchor: (\w+)[^>]* x="([0-9.]+)"[^>]*>([^<]*)</text>', svg)
        named = [(anchor, float(x), 6.2 * len(label)) for anchor, x, label in placed if label[-2:] in ("a0", "a1")]
        assert len(named) == 2
        for anchor, x, long in named:  # 6.2 points a character is about the width in a browser's own font
            assert (x - long if anchor == "end" else x) > -5 and (x if anchor == "end" else x + long) < width + 5
        ticks = [float(x) for anchor, x, label in placed if anchor == "middle" and re.fullmatch(r"[0-9.]+", label)]
        assert max(ticks) - min(ticks) > 0.4 * width


def test_numbers_that_cannot_be_drawn_leave_a_gap():
    numbers = [1.0, None, float("nan"), 1e308, -1e308, 2.0]
    assert "<svg" in figures.curves("t", "x", "y", [Series("a", [1, 2, 3, 4, 5, 9 * 10**18], numbers)])
