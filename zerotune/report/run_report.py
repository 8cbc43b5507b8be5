"""report.html of a run folder: one self-contained page, made only from the folder's files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import write_text
from zerotune.metrics.labels import METRIC_NAMES
from zerotune.metrics.paired import Evaluation, Paired, paired_comparison, read_evaluation, restricted_metrics
from zerotune.report import figures
from zerotune.report.curves import History, curves_of_run, read_history
from zerotune.report.html import (
    TASK_NAMES,
    card,
    confusion_table,
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

LABELS = ("negative", "positive")
NUM_ERRORS = 12
MOST_CHARACTERS = 700


@dataclass(frozen=True)
class RunFiles:
    """What the folder holds. `base` and `tuned` are evaluations, or a sentence that says why there is none."""

    run: dict
    parameters: dict
    split: dict
    history: History
    base: Evaluation | str
    tuned: Evaluation | str


def write_report(run_dir: Path, texts: dict[str, str] | None = None) -> Path:
    """Write run_dir/report.html from the run folder's files; returns its path.

    texts: item id -> text, for the most confident errors; ids that are missing are shown without their text.
    A piece whose file is missing is left out with a sentence in its place.
    """
    run_dir = Path(run_dir)
    files = read_run_files(run_dir)
    paired = paired_or_reason(files)
    sections = [
        _headline(run_dir, files, paired),
        _scores_section(files, paired),
        curves_section(files.history),
        _confusion_section(files),
        _errors_section(files, texts or {}),
        data_section(files.split),
        parameters_section(files.parameters),
        run_section(files.run),
    ]
    report = run_dir / "report.html"
    write_text(report, page(f"{run_dir.resolve().name} – zerotune", sections))
    return report


def read_run_files(run_dir: Path) -> RunFiles:
    """What a run folder holds; what is missing is said in a sentence."""

    def read_object(name: str) -> dict:
        path = run_dir / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def read_scores(name: str, absent: str) -> Evaluation | str:
        folder = run_dir / "eval" / name
        if not folder.is_dir():
            return absent
        try:
            return read_evaluation(folder)
        except Refused as refusal:
            return f"No scores in eval/{name}: {refusal}."

    return RunFiles(
        run=read_object("run.json"),
        parameters=read_object("parameters.json"),
        split=read_object("split.json"),
        history=read_history(run_dir),
        base=read_scores("base", "This run has no base evaluation."),
        tuned=read_scores("final", "This run has no final evaluation yet."),
    )


def paired_or_reason(files: RunFiles) -> Paired | str:
    """The paired test of both evaluations, or a sentence that says why there is none."""
    for evaluation in (files.base, files.tuned):
        if isinstance(evaluation, str):
            return evaluation
    try:
        return paired_comparison(files.base, files.tuned)
    except Refused as refusal:
        return f"No paired test: {refusal}."


def setting(evaluation: Evaluation, default: str) -> str:
    """What was asked: a head, a prompt."""
    return str(evaluation.metrics.get("setting", default))


def heading(run_dir: Path, files: RunFiles) -> list[str]:
    """Task, model, method and folder of a run, as the top of its page."""
    flags = files.run.get("flags") or {}
    tuned = files.tuned.metrics if isinstance(files.tuned, Evaluation) else {}
    model, method = (flags.get(key) or tuned.get(key) for key in ("model", "method"))
    model = Path(model).name if model and Path(model).is_absolute() else model
    task = files.split.get("task") or tuned.get("task")
    title = ", ".join(str(part) for part in (model, f"{method} fine-tuning" if method else None) if part)
    task_name = TASK_NAMES.get(task, task)
    parts = [f'<p class="overline">{escape(" · ".join(str(one) for one in ("zerotune", task_name) if one))}</p>']
    parts.append(f"<h1>{escape(title or run_dir.resolve().name)}</h1>")
    parts.append(paragraph(run_dir.resolve().name, "note") if title else "")
    return parts


def _headline(run_dir: Path, files: RunFiles, paired: Paired | str) -> str:
    cards = [
        _accuracy_card("tuned", files.tuned, "Tuned accuracy"),
        _accuracy_card("base", files.base, "Base accuracy"),
    ]
    if isinstance(paired, Paired):
        note = f"{interval_text(paired.difference_ci95, signed=True)}, {p_value_text(paired.p_value)}"
        items = f"on the {paired.num_common:,} items that both scored"
        cards.append(card("Difference", points(paired.difference), f"{note}, {items}"))
    return "\n".join([*heading(run_dir, files), f'<div class="cards">{"".join(cards)}</div>'])


def _accuracy_card(kind: str, evaluation: Evaluation | str, label: str) -> str:
    if isinstance(evaluation, str):
        return card(label, "–", evaluation, kind)
    metrics = evaluation.metrics
    if "accuracy" not in metrics:
        return card(label, "–", "not in metrics.json", kind)
    interval = interval_text(metrics.get("accuracy_ci95"))
    note = f"{interval}, {len(evaluation.predictions):,} items"
    return card(f"{label}, {setting(evaluation, kind)}", percent(metrics["accuracy"]), note, kind)


def _scores_section(files: RunFiles, paired: Paired | str) -> str:
    columns: list[tuple[str, dict, int, str]] = []
    if isinstance(files.base, Evaluation):
        count = len(files.base.predictions)
        columns.append((f"base: {setting(files.base, 'before training')}", files.base.metrics, count, figures.BASE))
    if isinstance(files.tuned, Evaluation):
        count = len(files.tuned.predictions)
        if isinstance(paired, Paired) and paired.num_common < count:
            metrics = restricted_metrics(files.tuned, files.base)
            columns.append(("tuned, the same items", metrics, paired.num_common, figures.TUNED))
        columns.append((f"tuned: {setting(files.tuned, 'after training')}", files.tuned.metrics, count, figures.TUNED))
    if not columns:
        return section("Before and after", paragraph(str(files.base)), paragraph(str(files.tuned)))
    rows = [["items", *(f"{count:,}" for _, _, count, _ in columns)]]
    rows += [[metric_title(name), *(score_cell(column[1], name) for column in columns)] for name in METRIC_NAMES]
    dots = [
        (name, 100 * metrics["accuracy"], [100 * bound for bound in metrics["accuracy_ci95"]], colour)
        for name, metrics, _, colour in columns
        if metrics.get("accuracy_ci95")
    ]
    figure = figures.intervals("Accuracy before and after", "accuracy, % (95 % interval)", dots) if dots else ""
    return section(
        "Before and after",
        paragraph(_paired_sentence(paired)),
        f'<div class="wide">{figure}</div>' if figure else "",
        table(["", *(name for name, *_ in columns)], rows),
        paragraph("95 % intervals: Wilson for proportions, bootstrap over items for F1 and macro means.", "note"),
    )


def _paired_sentence(paired: Paired | str) -> str:
    if isinstance(paired, str):
        return paired
    return (
        f"On the {paired.num_common:,} items that both scored, accuracy went from {percent(paired.accuracy_first)} to "
        f"{percent(paired.accuracy_second)}: {points(paired.difference)} "
        f"{interval_text(paired.difference_ci95, signed=True)} (Newcombe's paired 95 % interval). The tuned model "
        f"alone is right on {paired.only_second:,} of them, the base alone on {paired.only_first:,}; exact McNemar "
        f"test, {p_value_text(paired.p_value)}."
    )


def curves_section(history: History) -> str:
    """What metrics.jsonl tells."""
    if not history.steps and not history.evaluations:
        return section("Training", paragraph("metrics.jsonl holds no logged step."))
    return section("Training", curves_of_run(history))


def _confusion_section(files: RunFiles) -> str:
    tables = []
    for name, evaluation in (("Base", files.base), ("Tuned", files.tuned)):
        if isinstance(evaluation, Evaluation) and evaluation.metrics.get("confusion"):
            title = f"{name}, {len(evaluation.predictions):,} items"
            tables.append(confusion_table(title, evaluation.metrics["confusion"], LABELS))
    if not tables:
        return section("Confusion", paragraph("No evaluation in this run holds a confusion matrix."))
    note = paragraph("Items, and their share of the items with that label.", "note")
    return section("Confusion", f'<div class="figures">{"".join(tables)}</div>', note)


def _errors_section(files: RunFiles, texts: Mapping[str, str]) -> str:
    title = "Most confident errors of the tuned model"
    if isinstance(files.tuned, str):
        return section(title, paragraph(files.tuned))
    lines = files.tuned.predictions.values()
    wrong = [line for line in lines if line["prediction"] != line["label"] and line.get("scores")]
    wrong.sort(key=lambda line: (-line["scores"][line["prediction"]], line["id"]))
    if not wrong:
        return section(title, paragraph("None: every scored item is right, or no scores were kept."))
    entries = []
    for line in wrong[:NUM_ERRORS]:
        text = texts.get(line["id"])
        shown = "(text not at hand)" if text is None else text[:MOST_CHARACTERS]
        if text is not None and len(text) > MOST_CHARACTERS:
            shown += " …"
        probability = math.exp(line["scores"][line["prediction"]])
        facts = f"{LABELS[line['prediction']]} with probability {probability:.4f}, labelled {LABELS[line['label']]}"
        entries.append(
            f'<li><span class="small">{escape(facts)} · {escape(str(line["id"]))}</span><p>{escape(shown)}</p></li>'
        )
    count = f"{len(wrong):,} items are wrong; the {len(entries)} of the highest probability:"
    return section(title, paragraph(count), f'<ol class="errors">{"".join(entries)}</ol>')
