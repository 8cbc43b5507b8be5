"""Show a finished run: report.html, one self-contained page made only from the run folder's files, and a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_text
from zerotune.metrics import evaluations
from zerotune.metrics.evaluations import Evaluation, PairedAccuracy
from zerotune.metrics.statistics import PairedMeans
from zerotune.report import figures, html, words
from zerotune.report.card import complete_card
from zerotune.report.curves import History, curves_of_run, epochs_table, read_history
from zerotune.report.tables import data_section, parameters_section, run_section, scores_block, timings_table
from zerotune.run.process import is_main_process, say
from zerotune.run.run_files import ParametersRecord, RunRecord, SplitRecord
from zerotune.settings.names import TASK_NAMES, folder_name


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder. A sentence with the reason replaces a missing evaluation or test.

    Attributes:
        best_step: of the checkpoint that final/ is made from; None without final/.
        base, tuned: the evaluations before and after training.
        accuracy, f1: paired tests on the items that both scored; f1 is None without a test, or if items have no F1.
    """

    path: Path
    run: dict
    parameters: dict
    split: dict
    history: History
    best_step: int | None
    base: Evaluation | str
    tuned: Evaluation | str
    accuracy: PairedAccuracy | str
    f1: PairedMeans | None

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The evaluations that are there: "base", "tuned"."""
        both = {"base": self.base, "tuned": self.tuned}
        return {name: one for name, one in both.items() if isinstance(one, Evaluation)}


@dataclass(frozen=True)
class ReportParts:
    """The report's parts about a run's task.

    Attributes:
        items: the name of the scored items: "items", "questions".
        headline: scores on the cards of the tuned model; the first is on the base model's card and in the figure too.
        columns: scores in the table that a run prints, the first one with its interval.
        prediction: the form of a line of predictions.jsonl.
        rescore: lines of predictions.jsonl -> their scores, as in metrics.json.
        sections: evaluations by name, the main one last -> the task's own sections, as HTML.
        answers: a model's name and its metrics.json -> sentences about striking patterns in its answers.
        remark: metrics.json of the tuned model -> a sentence to add to its scores.
        footnote: metrics.json of the tuned model -> how its scores are counted.
        more_rows: further entries of metrics.json: name -> (title, its value as text).
    """

    items: str
    headline: tuple[str, ...]
    columns: tuple[str, ...]
    prediction: type
    rescore: Callable[[list[dict]], dict]
    sections: Callable[[Mapping[str, Evaluation]], list[str]]
    answers: Callable[[str, dict], list[str]] = lambda name, metrics: []
    remark: Callable[[dict], str] = lambda metrics: ""
    footnote: Callable[[dict], str] = lambda metrics: ""
    more_rows: Mapping[str, tuple[str, Callable[[float], str]]] = field(default_factory=dict)


def write_report(run_dir: Path, parts: ReportParts) -> Path:
    """Write run_dir/report.html from the run folder's files and return its path; complete the card of final/ too.

    If a file is missing, a sentence says so.
    """
    files = read_run_files(Path(run_dir), parts.prediction)
    sections = [
        _heading(files),
        f'<div class="cards">{"".join(_cards(files, parts))}</div>',
        html.section("Before and after", *_before_and_after(files, parts)),
        _training_section(files),
        *parts.sections(files.evaluations),
        data_section(files.split),
        parameters_section(files.parameters),
        run_section(files.path, files.run),
    ]
    report = files.path / "report.html"
    write_text(report, html.page(f"{files.path.resolve().name} – zerotune", sections))
    complete_card(files, _paired_sentences(files, parts.items))
    return report


def _training_section(files: RunFiles) -> str:
    if not (files.history.steps or files.history.evaluations):
        return html.section("Training", html.paragraph("metrics.jsonl holds no logged step."))
    timings = timings_table([""], [files.run], [files.history]) if files.run.get("timings") else ""
    return html.section(
        "Training",
        curves_of_run(files.history),
        epochs_table(files.history, files.best_step),
        f"<h3>Speed and memory</h3>{timings}" if timings else "",
    )


def print_run_table(run_dir: Path, parts: ReportParts) -> None:
    """Print a run's scores before and after training, and their difference on the items that both scored."""
    if not is_main_process():
        return
    files, (first, *others) = read_run_files(Path(run_dir), parts.prediction), parts.columns
    rows = files.evaluations
    scale, digits = (100, 2) if any(evaluations.is_in_percent(one.metrics) for one in rows.values()) else (1, 4)

    def interval(bounds, sign: str = "") -> str:
        return "[" + ", ".join(f"{bound:{sign}.{digits}f}" for bound in bounds) + "]"

    say(f"{'':<28}{first:>10}{'95 % interval':>20}{''.join(f'{name:>12}' for name in others)}{parts.items:>11}")
    for name, evaluation in rows.items():
        metrics = evaluation.metrics
        called = name if name == "tuned" else f"base, {_setting(evaluation, 'before training')}"
        scores = [f"{metrics[other]:.{digits}f}" if other in metrics else "–" for other in others]
        low_high, more = interval(metrics[f"{first}_ci95"]), "".join(f"{score:>12}" for score in scores)
        say(f"{called:<28}{metrics[first]:>10.{digits}f}{low_high:>20}{more}{metrics['count']:>11,}")
    if isinstance(files.accuracy, PairedAccuracy):
        test, f1 = files.accuracy, files.f1
        low_high = interval([scale * bound for bound in test.difference_ci95], "+")
        change = f"{first} {scale * test.difference:+.{digits}f} {low_high}, McNemar p = {test.p_value:.2g}"
        more = f"; f1 {scale * f1.difference:+.{digits}f}, p = {f1.p_value:.2g}" if f1 else ""
        say(f"on the {test.num_common:,} common {parts.items}: {change}{more}")
    if isinstance(files.tuned, Evaluation) and (remark := parts.remark(files.tuned.metrics)):
        say(remark)


def read_run_files(run_dir: Path, prediction: type) -> RunFiles:
    """Read the files of a run folder that exist.

    Args:
        prediction: the form of a line of predictions.jsonl.
    Raises:
        Refused: a file is damaged.
    """
    run, parameters, split = (
        read_json(path, form) if (path := run_dir / name).is_file() else {}
        for name, form in (("run.json", RunRecord), ("parameters.json", ParametersRecord), ("split.json", SplitRecord))
    )
    base = _read_scores(run_dir, "base", prediction, "This run has no base evaluation.")
    tuned = _read_scores(run_dir, "final", prediction, "This run has no final evaluation yet.")
    accuracy, f1 = base if isinstance(base, str) else tuned, None
    if isinstance(base, Evaluation) and isinstance(tuned, Evaluation):
        try:
            accuracy, f1 = evaluations.paired_accuracy(base, tuned), evaluations.paired_f1(base, tuned)
        except Refused as refusal:
            accuracy = f"No paired test: {refusal}."
    task = run_dir / "final" / "task.json"
    best_step = read_json(task).get("best_step") if task.is_file() else None
    return RunFiles(run_dir, run, parameters, split, read_history(run_dir), best_step, base, tuned, accuracy, f1)


def _read_scores(run_dir: Path, name: str, prediction: type, absent: str) -> Evaluation | str:
    folder = run_dir / "eval" / name
    if not folder.is_dir():
        return absent
    try:
        return evaluations.read_evaluation(folder, prediction)
    except Refused as refusal:
        return f"No scores in eval/{name}: {refusal}."


def _setting(evaluation: Evaluation, default: str) -> str:
    """Return the source of the predictions: a head, a prompt."""
    return str(evaluation.metrics.get("setting", default))


def _heading(files: RunFiles) -> str:
    """Return the top of the page: task, model, method and folder."""
    flags, folder = files.run.get("flags") or {}, files.path.resolve().name
    tuned = files.tuned.metrics if isinstance(files.tuned, Evaluation) else {}
    model, method = (flags.get(key) or tuned.get(key) for key in ("model", "method"))
    task = files.split.get("task") or tuned.get("task")
    title = ", ".join(part for part in (_model_name(model), f"{method} fine-tuning" if method else None) if part)
    data = (files.split.get("sources") or {}).get("train") or {}
    if title and data.get("path"):
        title += f" on {Path(data['path']).name}"
    overline = TASK_NAMES.get(task, task) or ""
    return html.heading(title or folder, overline) + (html.paragraph(folder, "note") if title else "")


def _model_name(model: str | None) -> str | None:
    """Return a hub id unchanged, the last part of a path, and for a run's final/ the run's name."""
    if model is None or not (model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).is_dir()):
        return model
    return folder_name(model)


def _cards(files: RunFiles, parts: ReportParts) -> list[str]:
    wanted = [("tuned", files.tuned, name) for name in parts.headline] + [("base", files.base, parts.headline[0])]
    cards = []
    for kind, evaluation, name in wanted:
        label = f"{kind.capitalize()} {html.metric_title(name)}"
        if isinstance(evaluation, str):
            cards.append(html.card(label, "–", evaluation, kind))
        elif name not in evaluation.metrics:
            cards.append(html.card(label, "–", "not in metrics.json", kind))
        else:
            metrics = evaluations.as_proportions(evaluation.metrics)
            note = f"{html.interval_text(metrics.get(f'{name}_ci95'))}, {metrics['count']:,} {parts.items}"
            cards.append(html.card(f"{label}, {_setting(evaluation, kind)}", html.percent(metrics[name]), note, kind))
    if isinstance(files.accuracy, PairedAccuracy):
        test = files.f1 or files.accuracy
        change, interval = html.change(test)
        items = f"on the {files.accuracy.num_common:,} {parts.items} that both scored"
        cards.append(html.card("Difference", change, f"{interval}, {html.p_value_text(test.p_value)}, {items}"))
    return cards


def _before_and_after(files: RunFiles, parts: ReportParts) -> list[str]:
    """Return the paired tests in words, the scores, and the task's sentences about the tuned model."""
    columns = _score_columns(files, parts)
    if not columns:
        return [html.paragraph(files.base), html.paragraph(files.tuned)]
    tuned = files.tuned.metrics if isinstance(files.tuned, Evaluation) else None
    remark, footnote = (parts.remark(tuned), parts.footnote(tuned)) if tuned else ("", "")
    return [
        html.bullets(_sentences(files, parts)),
        html.paragraph(remark) if remark else "",
        scores_block(columns, parts.items, parts.headline[0], "before and after", parts.more_rows),
        html.paragraph(footnote, "note") if footnote else "",
        html.paragraph(_paired_sentences(files, parts.items), "note"),
    ]


def _sentences(files: RunFiles, parts: ReportParts) -> list[str]:
    """Return sentences about what the tables of the page show."""
    said = []
    for name, one in files.evaluations.items():
        said += parts.answers(f"the {name} model", one.metrics)
    if isinstance(files.accuracy, PairedAccuracy):
        score = html.metric_title(evaluations.headline(files.tuned.metrics))
        said.append(words.training_sentence(files.accuracy, score, parts.items))
    said += words.history_sentences(files.history, files.best_step, (files.run.get("flags") or {}).get("max_steps"))
    return said + [sentence for sentence in [words.movement_sentence(files.parameters.get("moved", {}))] if sentence]


def _score_columns(files: RunFiles, parts: ReportParts) -> list[tuple[str, dict, str]]:
    """Return name, metrics.json with scores in 0-1, and colour of both evaluations.

    If the tuned model scored more items than the base model, its scores on the common items are shown too."""
    columns = []
    if isinstance(files.base, Evaluation):
        columns.append((f"base: {_setting(files.base, 'before training')}", files.base.metrics, figures.BASE))
    if isinstance(files.tuned, Evaluation):
        tuned = files.tuned.metrics
        if isinstance(files.accuracy, PairedAccuracy) and files.accuracy.num_common < tuned["count"]:
            lines = [files.tuned.predictions[one] for one in evaluations.common_ids(files.tuned, files.base)]
            rescored = {"task": tuned.get("task"), "count": len(lines)} | parts.rescore(lines)
            columns.append((f"tuned, the same {parts.items}", rescored, figures.TUNED))
        columns.append((f"tuned: {_setting(files.tuned, 'after training')}", tuned, figures.TUNED))
    return [(name, evaluations.as_proportions(metrics), colour) for name, metrics, colour in columns]


def _paired_sentences(files: RunFiles, items: str) -> str:
    accuracy, f1 = files.accuracy, files.f1
    if isinstance(accuracy, str):
        return accuracy
    score = html.metric_title(evaluations.headline(files.tuned.metrics))
    change = " ".join(html.change(accuracy))
    sentences = (
        f"On the {accuracy.num_common:,} {items} that both scored, {score} went from "
        f"{html.percent(accuracy.accuracy_first)} to {html.percent(accuracy.accuracy_second)}: {change} (Newcombe's "
        f"paired 95 % interval). The tuned model alone is right on {accuracy.only_second:,} of them, the base alone on "
        f"{accuracy.only_first:,}; exact McNemar test, {html.p_value_text(accuracy.p_value)}."
    )
    if f1:
        sentences += (
            f" F1 went from {html.percent(f1.first)} to {html.percent(f1.second)}: {' '.join(html.change(f1))} "
            f"(bootstrap; randomisation test, {html.p_value_text(f1.p_value)})."
        )
    return sentences
