"""Make the tables of a page from metrics.json, split.json, parameters.json and run.json."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from zerotune.metrics.evaluations import score_names
from zerotune.report import figures, html
from zerotune.report.curves import History


def scores_block(
    columns: Sequence[tuple[str, dict, str]],
    items: str,
    headline: str,
    what: str,
    more_rows: Mapping[str, tuple[str, Callable[[float], str]]] | None = None,
) -> str:
    """Return a figure of one score of several evaluations, a table with a row for each score, and a note on intervals.

    Args:
        columns: name, metrics.json with its scores in 0-1, and colour of each evaluation.
        items: what is scored, in the plural.
        headline, what: the score of the figure, and what follows it in the title.
        more_rows: further entries of metrics.json: name -> (title, its value as text).
    """
    score, every = html.metric_title(headline), [metrics for _, metrics, _ in columns]
    dots = [
        (name, 100 * metrics[headline], [100 * bound for bound in interval], colour)
        for name, metrics, colour in columns
        if (interval := metrics.get(f"{headline}_ci95"))
    ]
    figure = figures.intervals(f"{score.capitalize()} {what}", f"{score}, % (95 % interval)", dots) if dots else ""
    rows = [[items, *(f"{metrics['count']:,}" for metrics in every)]]
    for name in dict.fromkeys(name for metrics in every for name in score_names(metrics)):
        rows.append([html.metric_title(name), *(html.score_cell(metrics, name) for metrics in every)])
    for name, (title, shown) in (more_rows or {}).items():
        values = [metrics.get(name) for metrics in every]
        if any(value is not None for value in values):
            rows.append([title, *("–" if value is None else shown(value) for value in values)])
    note = f"95 % intervals: Wilson for proportions, bootstrap over {items} for the other scores."
    table = html.table(["", *(name for name, *_ in columns)], rows)
    return f'<div class="wide">{figure}</div>\n{table}\n{html.paragraph(note, "note")}'


def data_section(split: dict) -> str:
    if not split:
        return html.section("Data", html.paragraph("This run has no split.json."))
    rest = dict(split)
    parts = [html.paragraph(f"Split rule: {rest.pop('rule')}")] if isinstance(rest.get("rule"), str) else []
    splits = rest.pop("splits", None)
    if isinstance(splits, Mapping) and splits:
        labels = list(dict.fromkeys(name for one in splits.values() for name in one.get("labels") or {}))
        rows = [
            [
                name,
                html.plain(one.get("count")),
                *(html.plain((one.get("labels") or {}).get(label, 0)) for label in labels),
                str(one.get("ids_sha256", "–"))[:12],
            ]
            for name, one in splits.items()
        ]
        parts.append(html.table(["split", "rows", *labels, "hash of ids"], rows))
    removed = rest.pop("removed_rows", None)
    if isinstance(removed, Mapping):
        rows = [[name.replace("_", " "), html.plain(count)] for name, count in removed.items()]
        parts.append(html.table(["rows removed", "count"], rows) if rows else html.paragraph("No row was removed."))
    notes = rest.pop("notes", None) or []
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in notes) + "</ul>")
    if rest:
        settings = html.table([], html.flattened(rest), num_text_columns=2)
        parts.append(html.details("Sources and settings of the split", settings))
    return html.section("Data", *parts)


def parameters_section(parameters: dict) -> str:
    if not parameters:
        return html.section("Parameters", html.paragraph("This run has no parameters.json."))
    columns = {name: dict(html.flattened(value)) for name, value in parameters.items() if isinstance(value, Mapping)}
    rest = {name: value for name, value in parameters.items() if name not in columns}
    parts = []
    if columns:
        keys = list(dict.fromkeys(key for counts in columns.values() for key in counts))
        rows = [[key, *(counts.get(key, "–") for counts in columns.values())] for key in keys]
        titles = {"before": "as published", "after": "this run"}
        parts.append(html.table(["", *(titles.get(name, name) for name in columns)], rows))
    return html.section("Parameters", *parts, html.table([], html.flattened(rest)) if rest else "")


def run_section(run: dict) -> str:
    if not run:
        return html.section("Run", html.paragraph("This run has no run.json."))
    rest = dict(run)
    command, flags = rest.pop("command", None), rest.pop("flags", None)
    command = " ".join(command) if isinstance(command, list) else command
    rows = [_with_unit(name, value) for name, value in html.flattened(rest)]
    return html.section(
        "Run",
        f"<pre>{escape(command)}</pre>" if command else html.paragraph("The command was not recorded."),
        html.table([], rows, num_text_columns=2),
        html.details("All flags", html.table([], html.flattened(flags), num_text_columns=2)) if flags else "",
    )


def timings_table(names: Sequence[str], runs: Sequence[dict], histories: Sequence[History]) -> str:
    """Return a table of several runs' engine, processes and speed, a column for each run.json."""
    steps = [history.steps[-1]["step"] if history.steps else None for history in histories]
    rows = [
        ["engine", *((run.get("flags") or {}).get("engine", "loop") for run in runs)],
        ["processes", *(html.plain((run.get("world") or {}).get("num_processes")) for run in runs)],
        ["optimizer steps", *map(html.plain, steps)],
    ]
    for key in ("train_examples_per_s", "train_tokens_per_s", "train_s", "peak_memory_bytes"):
        values, name = [(run.get("timings") or {}).get(key) for run in runs], key.replace("_", " ")
        shown = ["–" if value is None else _with_unit(name, html.plain(value))[1] for value in values]
        rows.append([_with_unit(name, "0")[0], *shown])
    return html.table(["", *names], rows)


def _with_unit(name: str, text: str) -> tuple[str, str]:
    """Move the unit from a name to its number ("startup s", "12" -> "startup", "12 s"), and write bytes as GiB."""
    if name.endswith(" bytes") and text.replace(",", "").isdigit():
        return name.removesuffix(" bytes"), f"{int(text.replace(',', '')) / 2**30:.2f} GiB"
    if name.endswith(" per s"):
        return name.removesuffix(" per s"), f"{text} per second"
    return (name.removesuffix(" s"), f"{text} s") if name.endswith(" s") else (name, text)
