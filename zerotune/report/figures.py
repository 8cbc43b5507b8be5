"""Draw curves and intervals as inline SVG in the colours of the page, without a display or pyplot's global state."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

# matplotlib writes out these colours; each is replaced by a variable of the page, which has light and dark modes.
INK, SOFT, LINE, TUNED, BASE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
THIRD, FOURTH = "#101112", "#131415"
COLOUR_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", TUNED: "tuned", BASE: "base"}
COLOUR_VARIABLES |= {THIRD: "third", FOURTH: "fourth"}
MOST_DRAWN = 1e100  # matplotlib's ticks overflow near the largest float
RUNS = (TUNED, BASE, THIRD, FOURTH)


@dataclass(frozen=True)
class Series:
    """A line: x and y, [points] each; a y that is None, not finite or beyond MOST_DRAWN leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str = TUNED
    as_points: bool = False


def curves(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Draw lines, or points joined by lines, with a legend if there are several; returns `<svg>`."""
    figure, axes = _axes(5.2, 3.3)
    for one in series:
        y = [math.nan if value is None or not abs(value) < MOST_DRAWN else value for value in one.y]
        # a line through a single point would show nothing
        marker = "o" if one.as_points or len(y) == 1 else None
        axes.plot(one.x, y, color=one.colour, marker=marker, markersize=4.5, linewidth=1.6, label=_literal(one.label))
    axes.set_xlabel(x_label, color=SOFT)
    axes.set_ylabel(y_label, color=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    # a fixed number of ticks: one that follows the size of the axes makes matplotlib lay them out again
    axes.locator_params(axis="x", nbins=7, integer=True)
    axes.locator_params(axis="y", nbins=7)
    axes.margins(x=0.02)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=11)
    return _svg(figure, title)


def intervals(title: str, x_label: str, rows: Sequence[tuple[str, float, Sequence[float] | None, str]]) -> str:
    """Draw a row for each (label, value, [low, high] or None, colour), the first on top; returns `<svg>`."""
    figure, axes = _axes(5.2, 0.9 + 0.4 * len(rows))
    for row, (_, value, interval, colour) in enumerate(rows):
        if interval is not None:
            axes.plot(interval, [row, row], color=colour, linewidth=2.4, solid_capstyle="round")
        axes.plot([value], [row], color=colour, marker="o", markersize=7)
    axes.set_yticks(range(len(rows)), [_literal(label) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(x_label, color=SOFT)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    return _svg(figure, title)


def _literal(label: str) -> str:
    """Return a label as matplotlib shows it unchanged.

    It would read the text between dollar signs as mathematics, and leave a label that begins with _ out of a legend.
    """
    escaped = label.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


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
