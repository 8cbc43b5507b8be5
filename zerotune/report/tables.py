"""Make the tables of report.html from split.json, parameters.json and run.json."""

from collections.abc import Mapping, Sequence
from html import escape

from zerotune.report.curves import History
from zerotune.report.html import details, flattened, paragraph, plain, section, table


def data_section(split: dict) -> str:
    if not split:
        return section("Data", paragraph("This run has no split.json."))
    rest = dict(split)
    parts = [paragraph(f"Split rule: {rest.pop('rule')}")] if isinstance(rest.get("rule"), str) else []
    splits = rest.pop("splits", None)
    if isinstance(splits, Mapping) and splits:
        labels = list(dict.fromkeys(name for one in splits.values() for name in one.get("labels") or {}))
        rows = [
            [
                name,
                plain(one.get("count")),
                *(plain((one.get("labels") or {}).get(label, 0)) for label in labels),
                str(one.get("ids_sha256", "–"))[:12],
            ]
            for name, one in splits.items()
        ]
        parts.append(table(["split", "rows", *labels, "hash of ids"], rows))
    removed = rest.pop("removed_rows", None)
    if isinstance(removed, Mapping):
        rows = [[name.replace("_", " "), plain(count)] for name, count in removed.items()]
        parts.append(table(["rows removed", "count"], rows) if rows else paragraph("No row was removed."))
    notes = rest.pop("notes", None) or []
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in notes) + "</ul>")
    if rest:
        parts.append(details("Sources and settings of the split", table([], flattened(rest), num_text_columns=2)))
    return section("Data", *parts)


def parameters_section(parameters: dict) -> str:
    if not parameters:
        return section("Parameters", paragraph("This run has no parameters.json."))
    columns = {name: dict(flattened(value)) for name, value in parameters.items() if isinstance(value, Mapping)}
    rest = {name: value for name, value in parameters.items() if name not in columns}
    parts = []
    if columns:
        keys = list(dict.fromkeys(key for counts in columns.values() for key in counts))
        rows = [[key, *(counts.get(key, "–") for counts in columns.values())] for key in keys]
        titles = {"before": "as published", "after": "this run"}
        parts.append(table(["", *(titles.get(name, name) for name in columns)], rows))
    return section("Parameters", *parts, table([], flattened(rest)) if rest else "")


def run_section(run: dict) -> str:
    if not run:
        return section("Run", paragraph("This run has no run.json."))
    rest = dict(run)
    command, flags = rest.pop("command", None), rest.pop("flags", None)
    command = " ".join(command) if isinstance(command, list) else command
    rows = [_with_unit(name, value) for name, value in flattened(rest)]
    return section(
        "Run",
        f"<pre>{escape(command)}</pre>" if command else paragraph("The command was not recorded."),
        table([], rows, num_text_columns=2),
        details("All flags", table([], flattened(flags), num_text_columns=2)) if flags else "",
    )


def timings_table(names: Sequence[str], runs: Sequence[dict], histories: Sequence[History]) -> str:
    """Return what trained several runs and how fast, a column for each run.json."""
    steps = [history.steps[-1]["step"] if history.steps else None for history in histories]
    rows = [
        ["engine", *((run.get("flags") or {}).get("engine", "loop") for run in runs)],
        ["processes", *(plain((run.get("world") or {}).get("num_processes")) for run in runs)],
        ["optimizer steps", *map(plain, steps)],
    ]
    for key in ("train_examples_per_s", "train_tokens_per_s", "train_s", "peak_memory_bytes"):
        values, name = [(run.get("timings") or {}).get(key) for run in runs], key.replace("_", " ")
        shown = ["–" if value is None else _with_unit(name, plain(value))[1] for value in values]
        rows.append([_with_unit(name, "0")[0], *shown])
    return table(["", *names], rows)


def _with_unit(name: str, text: str) -> tuple[str, str]:
    """Move the unit from a name to its number ("startup s", "12" -> "startup", "12 s"), and write bytes as GiB."""
    if name.endswith(" bytes") and text.replace(",", "").isdigit():
        return name.removesuffix(" bytes"), f"{int(text.replace(',', '')) / 2**30:.2f} GiB"
    if name.endswith(" per s"):
        return name.removesuffix(" per s"), f"{text} per second"
    return (name.removesuffix(" s"), f"{text} s") if name.endswith(" s") else (name, text)
