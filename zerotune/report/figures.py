"""Draw curves and intervals as inline SVG in the colours of the page, without a display or pyplot's global state."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

from zerotune.metrics.calibration import Bin
from zerotune.metrics.statistics import wilson_interval

# Placeholders in matplotlib's output; each is replaced by a variable of the page, which has light and dark modes.
INK, SOFT, LINE, TUNED, BASE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
THIRD, FOURTH = "#101112", "#131415"
COLOUR_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", TUNED: "tuned", BASE: "base"}
COLOUR_VARIABLES |= {THIRD: "third", FOURTH: "fourth"}
# Most characters of two labels side by side, of a label beside the axes, and of any label: the tables have it whole.
MOST_SIDE_BY_SIDE, MOST_BESIDE, MOST_CHARACTERS = 40, 26, 48
MOST_DRAWN = 1e100  # matplotlib's ticks overflow near the largest float
RUNS = (TUNED, BASE, THIRD, FOURTH)


@dataclass(frozen=True)
class Series:
    """A line: x and y, [points] each; a y that is None, not finite or beyond MOST_DRAWN leaves a gap.

    A series without a label is left out of the legend; a faint one is drawn pale, under its smoothed curve.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str = TUNED
    as_points: bool = False
    is_faint: bool = False


def curves(
    title: str, x_label: str, y_label: str, series: Sequence[Series], steps_per_epoch: float | None = None
) -> str:
    """Draw lines, or points joined by lines, with a legend above them if there are several; returns `<svg>`.

    Args:
        steps_per_epoch: if given, the upper axis counts epochs.
    """
    num_labelled = sum(bool(one.label) for one in series)
    figure, axes = _axes(5.2, 3.3 + 0.25 * num_labelled * (num_labelled > 1))
    labels = iter(shown_labels([one.label for one in series if one.label]))
    for one in series:
        y = drawable(one.y)
        # a line through a single point would show nothing
        marker = "o" if one.as_points or len(y) == 1 else None
        style = {"linewidth": 1.0, "alpha": 0.35} if one.is_faint else {"linewidth": 1.8}
        label = next(labels) if one.label else "_"  # matplotlib leaves such labels out of the legend
        axes.plot(one.x, y, color=one.colour, marker=marker, markersize=4.5, label=label, **style)
    axes.set_xlabel(x_label, color=SOFT)
    axes.set_ylabel(y_label, color=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    # a fixed number of ticks: the default depends on the size of the axes, so matplotlib would lay them out again
    axes.locator_params(axis="x", nbins=7, integer=True)
    axes.locator_params(axis="y", nbins=7)
    axes.margins(x=0.02)
    if steps_per_epoch:
        epochs = axes.secondary_xaxis(
            "top", functions=(lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
        )
        epochs.set_xlabel("epoch", color=SOFT, size=11)
        epochs.tick_params(colors=SOFT, labelsize=10, length=3)
        epochs.locator_params(axis="x", nbins=6)
        epochs.spines["top"].set_color(LINE)
    _legend(figure)
    return _svg(figure, title)


def drawable(values: Sequence[float | None]) -> list[float]:
    """Return values, with NaN for those that cannot be drawn."""
    return [math.nan if value is None or not abs(value) < MOST_DRAWN else value for value in values]


def reliability(title: str, named: Sequence[tuple[str, Sequence[Bin], str]]) -> str:
    """Draw the share of right answers over the mean probability in bins, with Wilson intervals; returns `<svg>`.

    Args:
        named: name, bins and colour of each model.
    """
    figure, axes = _axes(5.2, 4.2)
    axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle="--", label="perfectly calibrated")
    lowest = 100.0
    labels = shown_labels([name for name, *_ in named])
    for label, (_, bins, colour) in zip(labels, named, strict=True):
        x, y = (
            [100 * share for share in shares]
            for shares in zip(*((b.probability, b.num_right / b.count) for b in bins), strict=True)
        )
        for at, each in zip(x, bins, strict=True):
            low, high = wilson_interval(each.num_right, each.count)
            axes.plot([at, at], [100 * low, 100 * high], color=colour, linewidth=1.2, alpha=0.5)
        axes.plot(x, y, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=label)
        lowest = min(lowest, *x)
    axes.set_xlim(max(0.0, lowest - 5), 102)
    axes.set_ylim(-2, 102)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_xlabel("probability of the predicted label, %", color=SOFT)
    axes.set_ylabel("share that is right, %", color=SOFT)
    _legend(figure)
    return _svg(figure, title)


def _legend(figure) -> None:
    """Put a legend above the axes, off the data, unless there is a single entry."""
    _, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        in_one_row = len(labels) == 2 and sum(map(len, labels)) <= MOST_SIDE_BY_SIDE
        style = {"frameon": False, "labelcolor": INK, "fontsize": 11}
        figure.legend(loc="outside upper left", ncols=2 if in_one_row else 1, **style)


def intervals(
    title: str,
    x_label: str,
    rows: Sequence[tuple[str, float, Sequence[float] | None, str]],
    dots: Mapping[int, Sequence[float]] | None = None,
) -> str:
    """Draw a row for each (label, value, [low, high] or None, colour), the first on top; returns `<svg>`.

    Labels are beside the rows, or above them if one is long.

    Args:
        dots: by row number, the values whose mean the row shows; they are drawn small and pale.
    """
    labels = shown_labels([label for label, *_ in rows])
    are_beside = max(len(label) for label, *_ in rows) <= MOST_BESIDE
    figure, axes = _axes(5.2, 0.9 + (0.4 if are_beside else 0.55) * len(rows))
    for row, (_, value, interval, colour) in enumerate(rows):
        if interval is not None:
            axes.plot(interval, [row, row], color=colour, linewidth=2.4, solid_capstyle="round")
        single = (dots or {}).get(row, ())
        axes.plot(single, [row] * len(single), color=colour, marker="o", markersize=5, linestyle="", alpha=0.35)
        axes.plot([value], [row], color=colour, marker="o", markersize=7)
    if are_beside:
        axes.set_yticks(range(len(rows)), labels)
    else:
        axes.set_yticks([])
        for row, label in enumerate(labels):
            place = {"xy": (0, row), "xycoords": ("axes fraction", "data"), "xytext": (4, 6)}
            axes.annotate(label, **place, textcoords="offset points", color=SOFT, size=11)
    axes.set_ylim(len(rows) - 0.4, -0.6 if are_beside else -0.9)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(x_label, color=SOFT)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    return _svg(figure, title)


def shown_labels(labels: Sequence[str]) -> list[str]:
    """Return the labels of a figure, escaped so that matplotlib shows them unchanged.

    It would read text between dollar signs as mathematics, and leave a label that begins with _ out of a legend. If one
    is longer than MOST_CHARACTERS, the beginning that all share is dropped, long labels are cut in the middle, and
    labels that are then equal are numbered.
    """
    if max(map(len, labels), default=0) > MOST_CHARACTERS:
        first, last = min(labels), max(labels)
        num_same = next((place for place, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), 0)
        begin = first[: max(first.rfind("_", 0, num_same), first.rfind("/", 0, num_same)) + 1]
        labels = [f"…{label.removeprefix(begin)}" if begin else label for label in labels]
        half = MOST_CHARACTERS // 2 - 3
        labels = [f"{each[:half]}…{each[-half:]}" if len(each) > MOST_CHARACTERS else each for each in labels]
        labels = [
            f"{each} ({number})" if labels.count(each) > 1 else each for number, each in enumerate(labels, start=1)
        ]
    escaped = [label.replace("$", r"\$") for label in labels]
    return [f"\u200b{label}" if label.startswith("_") else label for label in escaped]


def _axes(width: float, height: float):
    """Return a figure of width × height inches, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=11, length=3)
    axes.xaxis.label.set_size(11.5)
    axes.yaxis.label.set_size(11.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    return figure, axes


def _svg(figure, title: str) -> str:
    """Return the figure as an `<svg>` that scales with the page; the same figure gives the same bytes."""
    from matplotlib import rc_context

    name = re.sub(r"\W+", "-", title.lower())
    buffer = StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has the font
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # several figures share one document, in which ids must differ
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in COLOUR_VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r" font-family: [^;]*;", "", text)
    (view_box,) = re.findall(r'viewBox="[^"]*"', text)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {view_box} role="img" aria-label="{escape(title)}">' + text[text.index(">") + 1 :]
