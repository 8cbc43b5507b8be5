"""Make the tables of a page from metrics.json, split.json, parameters.json and run.json."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from zerotune.metrics.evaluations import score_names
from zerotune.report import figures, html
from zerotune.report.curves import History
from zerotune.tasks.classify import GLUE

# If the rarer label of a binary task has a smaller share, accuracy says little, and more scores are shown.
BALANCED_SHARE = 0.35
FILES = (
    "final/README.md", "eval/base/metrics.json", "eval/base/predictions.jsonl", "eval/final/metrics.json",
    "eval/final/predictions.jsonl", "eval/final/predictions.json", "metrics.json", "predictions.jsonl",
    "predictions.json", "submission.tsv", "summary.json", "metrics.jsonl", "parameters.json", "split.json", "run.json",
)  # fmt: skip


def main_scores(metrics: dict) -> tuple[str, ...]:
    """Return the names of the scores that a table shows at once; the others are collapsed."""
    if "exact" in metrics:
        return "exact", "f1", "HasAns_f1", "NoAns_f1"
    if "exact_match" in metrics:
        return "exact_match", "f1_micro", "f1_macro", "hamming_loss"
    if "f1" not in metrics:
        return "accuracy", "f1_macro", "precision_macro", "recall_macro"
    labels = tuple(name for name in score_names(metrics) if name.startswith("accuracy_"))
    counts = [metrics.get(f"count_{name.removeprefix('accuracy_')}", 0) for name in labels]
    balanced = not any(counts) or min(counts) >= BALANCED_SHARE * sum(counts)
    return "accuracy", "f1", *labels, *(() if balanced else ("precision", "f1_macro", "matthews"))


def intervals_note(items: str) -> str:
    """Return how the intervals of a table of scores were computed."""
    return html.paragraph(
        f"95 % intervals: Wilson for proportions, bootstrap over {items} for the other scores.", "note"
    )


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
        items: the name of the scored items, in the plural.
        headline, what: the score of the figure, and the rest of its title.
        more_rows: further entries of metrics.json: name -> (title, its value as text).
    """
    score, every = html.metric_title(headline), [metrics for _, metrics, _ in columns]
    dots = [
        (name, 100 * metrics[headline], [100 * bound for bound in interval], colour)
        for name, metrics, colour in columns
        if (interval := metrics.get(f"{headline}_ci95"))
    ]
    figure = figures.intervals(f"{score.capitalize()} {what}", f"{score}, % (95 % interval)", dots) if dots else ""
    shown = main_scores(every[-1])
    rows, folded = [[items, *(f"{metrics['count']:,}" for metrics in every)]], []
    for name in dict.fromkeys([*shown, *(name for metrics in every for name in score_names(metrics))]):
        if any(name in metrics for metrics in every):
            cells = [html.metric_title(name), *(html.score_cell(metrics, name) for metrics in every)]
            (rows if name in shown else folded).append(cells)
    for name, (title, written) in (more_rows or {}).items():
        values = [metrics.get(name) for metrics in every]
        if any(value is not None for value in values):
            rows.append([title, *("–" if value is None else written(value) for value in values)])
    headers = ["", *(name for name, *_ in columns)]
    more = html.details(f"{len(folded)} more scores", html.table(headers, folded)) if folded else ""
    return f'<div class="wide">{figure}</div>\n{html.table(headers, rows)}\n{more}{intervals_note(items)}'


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
    columns = [dict(html.flattened(parameters[name])) for name in ("before", "after")]
    keys = list(dict.fromkeys(key for counts in columns for key in counts))
    rows = [[key, *(counts.get(key, "–") for counts in columns)] for key in keys]
    table = html.table(["", "base model", "this run"], rows)
    return html.section("Parameters", table, *_moved(parameters.get("moved", {})))


def _moved(moved: dict) -> list[str]:
    """Return how far the weights moved: a table by module group, and a curve by layer."""
    title = "<h3>How far the weights moved</h3>"
    if "groups" not in moved:
        return [title, html.paragraph(f"Not known: {moved['reason']}.")] if "reason" in moved else []
    groups = sorted(moved["groups"].items(), key=lambda item: -item[1])
    parts = [title, html.table(["module group", "change"], [(name, html.percent(share, 2)) for name, share in groups])]
    if len(layers := moved.get("layers", [])) > 2:
        line = figures.Series("", range(len(layers)), [100 * share for share in layers], as_points=True)
        parts.append(f'<div class="wide">{figures.curves("Change by layer", "layer", "change, %", [line])}</div>')
    note = "Norm of the change from the base model's weights to final/, as a share of their norm before (Frobenius)."
    return [*parts, html.paragraph(f"{note} Only trained weights count; a new head is left out.", "note")]


def launch_line(run: dict) -> str | None:
    """Return the command of a run.json with the launcher that starts it; None if it is not recorded."""
    command, processes = run.get("command"), (run.get("world") or {}).get("num_processes") or 1
    if not command:
        return None
    if processes == 1:
        return f"python {command}"
    on_cpu = str(run["world"].get("device", "")).startswith("cpu")  # where accelerate would start one process
    launcher = "torchrun --nproc_per_node" if on_cpu else "accelerate launch --num_processes"
    return f"{launcher} {processes} {command}"


def next_commands(run: dict) -> list[tuple[str, str]]:
    """Return (purpose, command) of each possible next step after a run or an evaluation; [] if run.json lacks data."""
    flags, words = run.get("flags") or {}, run.get("command", "").split()
    folder, script = flags.get("output_dir"), Path(words[0]).name if words else ""
    if not folder or not script.endswith(".py"):
        return []
    folder = shlex.quote(str(folder))
    if "method" not in flags:  # an evaluation's
        return [("Compare it with another evaluation", f"python eval/compare.py {folder} runs/OTHER")]
    script = f"{'qa' if run.get('task') == 'squad' else run.get('task')}.py"  # the command may have started a copy
    text = '--question "…" --context "…"' if script == "qa.py" else '"a text of yours"'
    if _reads_pairs(flags):
        text = "--file FILE --output predicted.csv"
    commands = [
        ("Evaluate it on other items", f"python eval/{script} --model {folder}/final --test-file FILE"),
        ("Predict", f"python eval/predict.py --model {folder} {text}"),
        ("Compare it with another run", f"python eval/compare.py {folder} runs/OTHER"),
        ("Upload it to the hub", f"python eval/publish.py {folder} ORG/NAME"),
    ]
    if flags.get("method") in ("lora", "qlora"):
        commands.append(("Merge the adapter into its base", f"python eval/publish.py {folder} --merge models/NAME"))
    return commands


def _reads_pairs(flags: Mapping) -> bool:
    """Return whether a run's flags say that it read two texts a row."""
    if columns := flags.get("text_column"):
        return "," in columns
    return flags.get("glue") in GLUE and GLUE[flags["glue"]].pair_column is not None


def run_section(folder: Path, run: dict) -> str:
    """Return the launch line, the next commands, links to the folder's files, and the facts of run.json."""
    files = html.file_links(folder, FILES)
    if not run:
        return html.section("Run", html.paragraph("This run has no run.json."), files)
    rest, launch = dict(run), launch_line(run)
    _, flags = rest.pop("command", None), rest.pop("flags", None)
    rows = [_with_unit(name, value) for name, value in html.flattened(rest)]
    return html.section(
        "Run",
        html.command(launch) if launch else html.paragraph("The command was not recorded."),
        *(f"<h3>{escape(title)}</h3>{html.command(command)}" for title, command in next_commands(run)),
        f"<h3>Files</h3>{files}" if files else "",
        html.table([], rows, num_text_columns=2),
        html.details("All flags", html.table([], html.flattened(flags), num_text_columns=2)) if flags else "",
    )


def timings_table(names: Sequence[str], runs: Sequence[dict], histories: Sequence[History]) -> str:
    """Return a table of several runs' engine, processes and speed, a column for each run.json."""
    steps = [history.steps[-1]["step"] if history.steps else None for history in histories]
    rows = [
        ["device", *(html.plain((run.get("world") or {}).get("device")) for run in runs)],
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
        return name.removesuffix(" per s"), f"{_measured(text)} per second"
    return (name.removesuffix(" s"), f"{_measured(text)} s") if name.endswith(" s") else (name, text)


def _measured(text: str) -> str:
    """Round a decimal number to three significant digits, from 100 on to a whole one; return other text unchanged."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return text
    return text if "." not in text else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
