"""Build a self-contained HTML page: inline style, a copy script, nothing to fetch. All text is escaped here."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from zerotune.metrics.evaluations import PairedAccuracy
from zerotune.metrics.statistics import PairedMeans
from zerotune.metrics.text_overlap import OVERLAP_TITLES

NO_SHARES = ("matthews",)  # scores from -1 to 1
_TITLES = {"matthews": "Matthews' correlation", "exact": "exact match", **OVERLAP_TITLES}
MOST_WIDE_COLUMNS = 6  # of a confusion matrix
# In some browsers a page opened from a file has no clipboard: the command is then selected instead.
COPY_SCRIPT = """<script>
for (const button of document.querySelectorAll("button.copy")) button.onclick = async () => {
  const code = button.previousElementSibling;
  try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
  catch { getSelection().selectAllChildren(code); button.textContent = "selected"; }
};
</script>"""
NO_BREAK, MINUS = "\u00a0", "\u2212"


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole document; `body` is HTML."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    content = "\n".join(part for part in body if part)
    script = COPY_SCRIPT if 'class="copy"' in content else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{content}\n</main>\n{script}</body>\n</html>\n"
    )


def heading(title: str, overline: str) -> str:
    """Return the top of a page: its title, under a small line that names zerotune."""
    small = " · ".join(part for part in ("zerotune", overline) if part)
    return f'<p class="overline">{escape(small)}</p>\n<h1>{escape(title)}</h1>'


def section(title: str, *parts: str) -> str:
    return "\n".join((f"<section>\n<h2>{escape(title)}</h2>", *(part for part in parts if part), "</section>"))


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(sentences: Sequence[str]) -> str:
    """Return a list of sentences, "" without any."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="said">{items}</ul>' if items else ""


def command(text: str) -> str:
    """Return a command with a button that copies it."""
    return f'<div class="command"><code>{escape(text)}</code><button type="button" class="copy">copy</button></div>'


def file_links(folder: Path, names: Iterable[str]) -> str:
    """Return links to the named files that a folder has, relative to a page in that folder."""
    links = [f'<a href="{quote(name)}">{escape(name)}</a>' for name in names if (folder / name).exists()]
    return f'<p class="files">{" ".join(links)}</p>' if links else ""


def beside(*parts: str) -> str:
    """Return parts next to each other where there is room, else one below the other."""
    return f'<div class="figures">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def card(label: str, value: str, note: str, kind: str = "") -> str:
    return (
        f'<div class="card {kind}"><div class="small">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="small">{escape(note)}</div></div>'
    )


def table(headers: Sequence[str], rows: Sequence[Sequence], num_text_columns: int = 1) -> str:
    """Return a table in its own scrolling box. A cell is text, or a (text, smaller text) pair.

    The first column names the row. The first `num_text_columns` columns are aligned left; the others, numbers, right.
    """

    def cell(column: int, value) -> str:
        text, small = value if isinstance(value, tuple) else (value, "")
        tag = "th" if column == 0 else "td"
        kind = "long" if column < num_text_columns else "number"
        below = f"<small>{escape(str(small))}</small>" if small else ""
        return f'<{tag} class="{kind}">{escape(str(text))}{below}</{tag}>'

    def head(column: int, text: str) -> str:
        return f'<th class="{"number" if column >= num_text_columns else ""}">{escape(text)}</th>'

    top = "".join(head(column, text) for column, text in enumerate(headers))
    lines = ["<tr>" + "".join(cell(column, value) for column, value in enumerate(row)) + "</tr>" for row in rows]
    thead = f"<thead><tr>{top}</tr></thead>\n" if headers else ""
    return f'<div class="scroll"><table>\n{thead}<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def confusion_table(title: str, confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Return the counts of a confusion matrix, each with its share of the label's items and shaded by it.

    Rows are labels and columns predictions; one more column counts answers that name no label. If there are many
    labels, cells are small and show the share only by their shading."""
    is_large, lines = len(labels) > MOST_WIDE_COLUMNS, []
    for label, row in zip(labels, confusion, strict=True):
        shares = [count / sum(row) if sum(row) else 0.0 for count in row]
        cells = ""
        for count, share in zip(row, shares, strict=True):
            if is_large and not count:
                cells += "<td></td>"
                continue
            number = (f"{count:,}" if count else "") if is_large else f"{count:,}<small>{share:.1%}</small>"
            shade = f"background: rgb(var(--wash) / {0.5 * share:.3f})"
            cells += f'<td style="{shade}" title="{share:.1%}">{number}</td>'
        named = f'title="labelled {escape(label)}">{"" if is_large else "labelled "}{escape(label)}'
        lines.append(f"<tr><th {named}</th>{cells}</tr>")
    columns = [*(f"{'' if is_large else 'predicted '}{label}" for label in labels), "no label read"]
    columns = columns[: len(confusion[0])]
    top = "".join(
        f'<th style="text-align: center" title="{escape(column)}"><span>{escape(column)}</span></th>'
        for column in columns
    )
    return (
        f'<div class="confusion{" large" if is_large else ""}"><h3>{escape(title)}</h3><div class="scroll"><table>\n'
        f"<thead><tr><th></th>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div></div>"
    )


def example_list(examples: Iterable[tuple[str, ...]]) -> str:
    """Return a list of examples: each the facts, the text and, in small type, its context if there is one."""
    items = []
    for facts, text, *context in examples:
        below = "".join(f'<p class="small">{escape(one)}</p>' for one in context)
        items.append(f'<li><span class="small">{escape(facts)}</span><p>{escape(text)}</p>{below}</li>')
    return f'<ol class="examples">{"".join(items)}</ol>'


def isolated(text: str) -> str:
    """Return a text for use in a left-to-right sentence: right-to-left words are put between isolates (bdi)."""
    is_right_to_left = any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
    return f"\u2068{text}\u2069" if is_right_to_left else text


def details(summary: str, *parts: str) -> str:
    return "\n".join((f"<details><summary>{escape(summary)}</summary>", *parts, "</details>"))


def digits_of(shares: Sequence[float], fewest: int = 1) -> int:
    """Return how many digits of a percentage show that no share is 0 % or 100 % that is not quite so."""

    def hides(share: float, digits: int) -> bool:
        is_whole = min(abs(share - whole) for whole in (-1, 0, 1)) < 1e-9  # up to rounding
        return float(f"{100 * share:.{digits}f}") in (0, 100, -100) and not is_whole

    return next((digits for digits in range(fewest, 6) if not any(hides(share, digits) for share in shares)), 6)


def percent(value: float, digits: int = 1) -> str:
    """Return a share as text, with more digits where it would be rounded to 0 % or 100 %."""
    return f"{100 * value:.{digits_of([value], digits)}f}{NO_BREAK}%".replace("-", MINUS)


def interval_text(interval: Sequence[float] | None, signed: bool = False, name: str = "") -> str:
    """Return a [low, high] pair of proportions as percentages; that of a score named in NO_SHARES keeps its scale."""
    if interval is None:
        return "no interval"
    digits, scale = (3, 1) if name in NO_SHARES else (digits_of(interval), 100)
    low, high = (format(scale * bound, f"{'+' if signed else ''}.{digits}f") for bound in interval)
    return f"[{low},{NO_BREAK}{high}]".replace("-", MINUS)


def change(test: PairedAccuracy | PairedMeans) -> tuple[str, str]:
    """Return the difference that a paired test found, in points, and its interval."""
    difference = f"{100 * test.difference:+.{digits_of([test.difference])}f} points".replace("-", MINUS)
    return difference, interval_text(test.difference_ci95, signed=True)


def p_value_text(p_value: float) -> str:
    digits = 4 if not 0.04995 <= p_value < 0.05 else 6  # not rounded up to the usual bound
    text = "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.{digits}f}"
    return text.replace(" ", NO_BREAK)


def plain(value) -> str:
    """Return a value from a JSON file as readable text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) if value else "none"
    return str(value)


def flattened(value: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (path, text) rows; " · " separates the keys of a path."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping) and item:
            rows += flattened(item, f"{name} · ")
        elif isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item):
            rows += flattened({str(number + 1): entry for number, entry in enumerate(item)}, f"{name} · ")
        else:
            rows.append((name, "none" if item == {} else plain(item)))
    return rows


def metric_title(name: str) -> str:
    """Return the title of a score: "accuracy on negative" for accuracy_negative, "exact match" for exact.

    Others are "F1, macro" for f1_macro, "F1 on negative" for f1_label_negative and "HasAns F1" for HasAns_f1."""
    if name.startswith("accuracy_"):
        return f"accuracy on {name.removeprefix('accuracy_')}"
    if name.startswith("f1_label_"):
        return f"F1 on {name.removeprefix('f1_label_')}"
    words = name.replace("f1", "F1").replace("_macro", ", macro").replace("_micro", ", micro").replace("_", " ")
    return _TITLES.get(name, words)


def score_cell(metrics: dict, name: str) -> str | tuple[str, str]:
    """Return a score with its interval under it; "undefined" if its denominator is 0, a dash without a score."""
    if name not in metrics or metrics[name] is None:
        return "–"
    interval = f"{name}_ci95"
    if interval in metrics and metrics[interval] is None:
        return "undefined", "0 of 0"
    found = interval_text(metrics[interval], name=name) if interval in metrics else "no interval"
    value = metrics[name]
    return f"{value:.3f}".replace("-", MINUS) if name in NO_SHARES else percent(value), found
