"""Show a finished run: report.html, one self-contained page made only from the run folder's files, and a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_text
from zerotune.metrics.paired import (
    Evaluation,
    Paired,
    as_proportions,
    common_ids,
    is_in_percent,
    paired_comparison,
    paired_f1,
    read_evaluation,
    score_names,
)
from zerotune.metrics.statistics import PairedMeans
from zerotune.report import figures
from zerotune.report.curves import History, curves_of_run, read_history
from zerotune.report.html import (
    TASK_NAMES,
    card,
    interval_text,
    metric_title,
    p_value_text,
    page,
    paragraph,
    percent,
    points,
    score_cell,
    section,
    table,
)
from zerotune.report.tables import data_section, parameters_section, run_section
from zerotune.run.process import is_main_process, say


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; a sentence that gives the reason stands for an evaluation or a test that is missing.

    `base` is the evaluation before training and `tuned` the one after it; `paired` compares them, and so does `f1`
    where items have an F1 of their own.
    """

    path: Path
    run: dict
    parameters: dict
    split: dict
    history: History
    base: Evaluation | str
    tuned: Evaluation | str
    paired: Paired | str
    f1: PairedMeans | None


@dataclass(frozen=True)
class ReportParts:
    """What is shown of a run's task.

    Attributes:
        items: what is scored, in the plural: "items", "questions".
        headline: scores on the cards of the tuned model; the first is on the base model's card and in the figure too.
        columns: scores in the table that a run prints, the first one with its interval.
        rescore: lines of predictions.jsonl -> the part of metrics.json that they give.
        sections: what the run folder holds -> the task's own sections, as HTML.
        remark: metrics.json of the tuned model -> a sentence that completes its scores.
        footnote: metrics.json of the tuned model -> how its scores are counted.
        more_rows: further entries of metrics.json: name -> (title, its value as text).
    """

    items: str
    headline: tuple[str, ...]
    columns: tuple[str, ...]
    rescore: Callable[[list[dict]], dict]
    sections: Callable[[RunFiles], list[str]]
    remark: Callable[[dict], str] = lambda metrics: ""
    footnote: Callable[[dict], str] = lambda metrics: ""
    more_rows: Mapping[str, tuple[str, Callable[[float], str]]] = field(default_factory=dict)


def write_report(run_dir: Path, parts: ReportParts) -> Path:
    """Write run_dir/report.html from the run folder's files, and return its path.

    Where a file is missing, a sentence says so.
    """
    files = read_run_files(Path(run_dir))
    is_logged = files.history.steps or files.history.evaluations
    sections = [
        *_heading(files),
        f'<div class="cards">{"".join(_cards(files, parts))}</div>',
        _scores_section(files, parts),
        section(
            "Training", curves_of_run(files.history) if is_logged else paragraph("metrics.jsonl holds no logged step.")
        ),
        *parts.sections(files),
        data_section(files.split),
        parameters_section(files.parameters),
        run_section(files.run),
    ]
    report = files.path / "report.html"
    write_text(report, page(f"{files.path.resolve().name} – zerotune", sections))
    return report


def print_run_table(run_dir: Path, parts: ReportParts) -> None:
    """Print a run's scores before and after training, and their difference on the items that both scored."""
    if not is_main_process():
        return
    files, (first, *others) = read_run_files(Path(run_dir)), parts.columns
    rows = [("base", files.base), ("tuned", files.tuned)]
    rows = [(name, evaluation) for name, evaluation in rows if isinstance(evaluation, Evaluation)]
    scale, digits = (100, 2) if any(is_in_percent(evaluation.metrics) for _, evaluation in rows) else (1, 4)

    def interval(bounds, sign: str = "") -> str:
        return "[" + ", ".join(f"{bound:{sign}.{digits}f}" for bound in bounds) + "]"

    say(f"{'':<28}{first:>10}{'95 % interval':>20}{''.join(f'{name:>12}' for name in others)}{parts.items:>11}")
    for name, evaluation in rows:
        metrics = evaluation.metrics
        called = name if name == "tuned" else f"base, {_setting(evaluation, 'before training')}"
        scores = [f"{metrics[other]:.{digits}f}" if other in metrics else "–" for other in others]
        low_high, more = interval(metrics[f"{first}_ci95"]), "".join(f"{score:>12}" for score in scores)
        say(f"{called:<28}{metrics[first]:>10.{digits}f}{low_high:>20}{more}{len(evaluation.predictions):>11,}")
    if isinstance(files.paired, Paired):
        paired, f1 = files.paired, files.f1
        low_high = interval([scale * bound for bound in paired.difference_ci95], "+")
        change = f"{first} {scale * paired.difference:+.{digits}f} {low_high}, McNemar p = {paired.p_value:.2g}"
        more = f"; f1 {scale * f1.difference:+.{digits}f}, p = {f1.p_value:.2g}" if f1 else ""
        say(f"on the {paired.num_common:,} common {parts.items}: {change}{more}")
    if isinstance(files.tuned, Evaluation) and (remark := parts.remark(files.tuned.metrics)):
        say(remark)


def read_run_files(run_dir: Path) -> RunFiles:
    """Read what a run folder holds, as far as it is there. Raises Refused for a damaged file."""
    run, parameters, split = (
        read_json(path) if (path := run_dir / name).is_file() else {}
        for name in ("run.json", "parameters.json", "split.json")
    )
    base = _read_scores(run_dir, "base", "This run has no base evaluation.")
    tuned = _read_scores(run_dir, "final", "This run has no final evaluation yet.")
    f1 = None
    if isinstance(base, str) or isinstance(tuned, str):
        paired = base if isinstance(base, str) else tuned
    else:
        try:
            paired, f1 = paired_comparison(base, tuned), paired_f1(base, tuned)
        except Refused as refusal:
            paired = f"No paired test: {refusal}."
    return RunFiles(run_dir, run, parameters, split, read_history(run_dir), base, tuned, paired, f1)


def _read_scores(run_dir: Path, name: str, absent: str) -> Evaluation | str:
    folder = run_dir / "eval" / name
    if not folder.is_dir():
        return absent
    try:
        return read_evaluation(folder)
    except Refused as refusal:
        return f"No scores in eval/{name}: {refusal}."


def _setting(evaluation: Evaluation, default: str) -> str:
    """Return what gave the predictions: a head, a prompt."""
    return str(evaluation.metrics.get("setting", default))


def _heading(files: RunFiles) -> list[str]:
    """Return the top of the page: task, model, method and folder."""
    flags, name = files.run.get("flags") or {}, files.path.resolve().name
    tuned = files.tuned.metrics if isinstance(files.tuned, Evaluation) else {}
    model, method = (flags.get(key) or tuned.get(key) for key in ("model", "method"))
    model = Path(model).name if model and Path(model).is_absolute() else model
    task = files.split.get("task") or tuned.get("task")
    title = ", ".join(str(part) for part in (model, f"{method} fine-tuning" if method else None) if part)
    overline = " · ".join(str(one) for one in ("zerotune", TASK_NAMES.get(task, task)) if one)
    return [
        f'<p class="overline">{escape(overline)}</p>',
        f"<h1>{escape(title or name)}</h1>",
        paragraph(name, "note") if title else "",
    ]


def _cards(files: RunFiles, parts: ReportParts) -> list[str]:
    wanted = [("tuned", files.tuned, name) for name in parts.headline] + [("base", files.base, parts.headline[0])]
    cards = []
    for kind, evaluation, name in wanted:
        label = f"{kind.capitalize()} {metric_title(name)}"
        if isinstance(evaluation, str):
            cards.append(card(label, "–", evaluation, kind))
        elif name not in evaluation.metrics:
            cards.append(card(label, "–", "not in metrics.json", kind))
        else:
            metrics = as_proportions(evaluation.metrics)
            note = f"{interval_text(metrics.get(f'{name}_ci95'))}, {len(evaluation.predictions):,} {parts.items}"
            cards.append(card(f"{label}, {_setting(evaluation, kind)}", percent(metrics[name]), note, kind))
    if isinstance(files.paired, Paired):
        test = files.f1 or files.paired
        found = f"{interval_text(test.difference_ci95, signed=True)}, {p_value_text(test.p_value)}"
        items = f"on the {files.paired.num_common:,} {parts.items} that both scored"
        cards.append(card("Difference", points(test.difference), f"{found}, {items}"))
    return cards


def _scores_section(files: RunFiles, parts: ReportParts) -> str:
    if isinstance(files.base, str) and isinstance(files.tuned, str):
        return section("Before and after", paragraph(files.base), paragraph(files.tuned))
    columns: list[tuple[str, dict, int, str]] = []
    if isinstance(files.base, Evaluation):
        title = f"base: {_setting(files.base, 'before training')}"
        columns.append((title, files.base.metrics, len(files.base.predictions), figures.BASE))
    if isinstance(files.tuned, Evaluation):
        count = len(files.tuned.predictions)
        if isinstance(files.paired, Paired) and files.paired.num_common < count:
            lines = [files.tuned.predictions[one] for one in common_ids(files.tuned, files.base)]
            rescored = {"task": files.tuned.metrics.get("task")} | parts.rescore(lines)
            columns.append((f"tuned, the same {parts.items}", rescored, len(lines), figures.TUNED))
        title = f"tuned: {_setting(files.tuned, 'after training')}"
        columns.append((title, files.tuned.metrics, count, figures.TUNED))
    columns = [(title, as_proportions(metrics), *rest) for title, metrics, *rest in columns]
    every = [metrics for _, metrics, *_ in columns]
    rows = [[parts.items, *(f"{count:,}" for *_, count, _ in columns)]]
    for name in dict.fromkeys(name for metrics in every for name in score_names(metrics)):
        rows.append([metric_title(name), *(score_cell(metrics, name) for metrics in every)])
    for name, (title, shown) in parts.more_rows.items():
        values = [metrics.get(name) for metrics in every]
        if any(value is not None for value in values):
            rows.append([title, *("–" if value is None else shown(value) for value in values)])
    score = parts.headline[0]
    dots = [
        (title, 100 * metrics[score], [100 * bound for bound in metrics[f"{score}_ci95"]], colour)
        for title, metrics, _, colour in columns
        if metrics.get(f"{score}_ci95")
    ]
    name, remark, footnote = metric_title(score), "", ""
    figure = figures.intervals(f"{name.capitalize()} before and after", f"{name}, % (95 % interval)", dots)
    if isinstance(files.tuned, Evaluation):
        remark, footnote = parts.remark(files.tuned.metrics), parts.footnote(files.tuned.metrics)
    intervals = f"95 % intervals: Wilson for proportions, bootstrap over {parts.items} for the other scores. {footnote}"
    return section(
        "Before and after",
        paragraph(_paired_sentences(files, parts.items)),
        paragraph(remark) if remark else "",
        f'<div class="wide">{figure}</div>' if dots else "",
        table(["", *(title for title, *_ in columns)], rows),
        paragraph(intervals, "note"),
    )


def _paired_sentences(files: RunFiles, items: str) -> str:
    paired, f1 = files.paired, files.f1
    if isinstance(paired, str):
        return paired
    score = "exact" if f1 else "accuracy"
    sentences = (
        f"On the {paired.num_common:,} {items} that both scored, {score} went from {percent(paired.accuracy_first)} to "
        f"{percent(paired.accuracy_second)}: {points(paired.difference)} "
        f"{interval_text(paired.difference_ci95, signed=True)} (Newcombe's paired 95 % interval). The tuned model "
        f"alone is right on {paired.only_second:,} of them, the base alone on {paired.only_first:,}; exact McNemar "
        f"test, {p_value_text(paired.p_value)}."
    )
    if f1:
        sentences += (
            f" F1 went from {percent(f1.first)} to {percent(f1.second)}: {points(f1.difference)} "
            f"{interval_text(f1.difference_ci95, signed=True)} (bootstrap; randomisation test, "
            f"{p_value_text(f1.p_value)})."
        )
    return sentences
