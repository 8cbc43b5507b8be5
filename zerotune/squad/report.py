"""report.html of a run on SQuAD v2, made from the run folder's files, and the table that the run prints."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from zerotune.files import read_json, write_text
from zerotune.metrics.paired import Evaluation, Paired, as_proportions, paired_comparison, paired_f1, read_evaluation
from zerotune.metrics.statistics import PairedMeans
from zerotune.metrics.text_overlap import COUNTED, NO_WORDNET
from zerotune.report import figures
from zerotune.report.html import (
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
from zerotune.report.run_report import RunFiles, curves_section, heading, paired_or_reason, read_run_files, setting
from zerotune.report.tables import data_section, parameters_section, run_section
from zerotune.run.process import is_main_process, say
from zerotune.squad.questions import Question
from zerotune.squad.results import METRIC_NAMES

NUM_ERRORS, MOST_CHARACTERS = 12, 900
# What is told beside the scores, and how it is written.
_BESIDE = {
    "abstention_share": ("left unanswered", percent),
    "mean_answer_words": ("mean words of an answer", "{:.1f}".format),
    "eos_rate": ("answers that the model ended", percent),
}
INTERVALS = "95 % intervals: Wilson for proportions, bootstrap over questions for the others."


def print_results(run_dir: Path) -> None:
    """The table of a run: before training where there was something to ask, after it, and leaving all unanswered."""
    if not is_main_process():
        return
    folders = {name: run_dir / "eval" / name for name in ("base", "final")}
    read = {name: read_evaluation(path) for name, path in folders.items() if (path / "metrics.json").exists()}
    tuned = read["final"].metrics
    say(f"{'':<28}{'exact':>8}{'95 % interval':>18}{'f1':>8}{'HasAns f1':>11}{'NoAns f1':>10}{'questions':>11}")
    for name, evaluation in read.items():
        metrics = evaluation.metrics
        interval = "[{:.2f}, {:.2f}]".format(*metrics["exact_ci95"])
        parts = "".join(f"{_shown(metrics, part):>{width}}" for part, width in (("HasAns_f1", 11), ("NoAns_f1", 10)))
        called = f"base, {metrics['setting']}" if name == "base" else "tuned"
        say(f"{called:<28}{metrics['exact']:>8.2f}{interval:>18}{metrics['f1']:>8.2f}{parts}{metrics['count']:>11,}")
    share = 100 * tuned.get("NoAns_total", 0) / tuned["total"]
    say(f"{'no answer to any':<28}{share:>8.2f}{'':>18}{share:>8.2f}{'0.00':>11}{'100.00':>10}{tuned['total']:>11,}")
    if "base" in read:
        pair, f1 = paired_comparison(read["base"], read["final"]), paired_f1(read["base"], read["final"])
        say(
            f"on the {pair.num_common:,} common questions: exact {100 * pair.difference:+.2f}, McNemar p = "
            f"{pair.p_value:.2g}; f1 {100 * f1.difference:+.2f}, p = {f1.p_value:.2g}"
        )
    say(_threshold_sentence(tuned))


def _shown(metrics: dict, name: str) -> str:
    return f"{metrics[name]:.2f}" if name in metrics else "–"


def _threshold_sentence(metrics: dict) -> str:
    sentence = f"{metrics['num_abstained']:,} of {metrics['total']:,} questions are left unanswered"
    if "best_f1" in metrics:
        sentence += (
            f" (threshold {metrics['threshold']:.3f}, chosen on the choosing split). A threshold chosen by these gold "
            f"answers, an oracle and no result, would reach exact {metrics['best_exact']:.2f}, F1 "
            f"{metrics['best_f1']:.2f}."
        )
    return sentence


def write_report(run_dir: Path, questions: Mapping[str, Question]) -> Path:
    """Write run_dir/report.html from the run folder's files; returns its path.

    questions: by id, for the worst errors."""
    run_dir = Path(run_dir)
    files = read_run_files(run_dir)
    sections = [
        _headline(run_dir, files),
        _scores_section(files),
        _breakdown_section(run_dir),
        curves_section(files.history),
        _errors_section(files, questions),
        data_section(files.split),
        parameters_section(files.parameters),
        run_section(files.run),
    ]
    report = run_dir / "report.html"
    write_text(report, page(f"{run_dir.resolve().name} – zerotune", sections))
    return report


def _headline(run_dir: Path, files: RunFiles) -> str:
    cards = []
    for kind, evaluation in (("tuned", files.tuned), ("base", files.base)):
        if isinstance(evaluation, str):
            cards.append(card(f"{kind} F1", "–", evaluation, kind))
            continue
        metrics = as_proportions(evaluation.metrics)
        for name in ("f1", "exact") if kind == "tuned" else ("f1",):
            note = f"{interval_text(metrics[f'{name}_ci95'])}, {len(evaluation.predictions):,} questions"
            cards.append(
                card(f"{kind} {metric_title(name)}, {setting(evaluation, kind)}", percent(metrics[name]), note, kind)
            )
    return "\n".join([*heading(run_dir, files), f'<div class="cards">{"".join(cards)}</div>'])


def _scores_section(files: RunFiles) -> str:
    columns = [
        (f"{name}: {setting(evaluation, name)}", as_proportions(evaluation.metrics), colour)
        for name, evaluation, colour in (("base", files.base, figures.BASE), ("tuned", files.tuned, figures.TUNED))
        if isinstance(evaluation, Evaluation)
    ]
    if not columns:
        return section("Before and after", paragraph(str(files.base)), paragraph(str(files.tuned)))
    rows = [["questions", *(f"{metrics['total']:,}" for _, metrics, _ in columns)]]
    for name in METRIC_NAMES:
        if any(name in metrics for _, metrics, _ in columns):
            rows.append([metric_title(name), *(score_cell(metrics, name) for _, metrics, _ in columns)])
    for name, (title, unit) in _BESIDE.items():
        found = [metrics.get(name) for _, metrics, _ in columns]
        if any(value is not None for value in found):
            rows.append([title, *("–" if value is None else unit(value) for value in found)])
    figure = figures.intervals(
        "F1 before and after",
        "F1, % (95 % interval)",
        [(name, 100 * m["f1"], [100 * bound for bound in m["f1_ci95"]], colour) for name, m, colour in columns],
    )
    notes = [paragraph(f"{COUNTED} {INTERVALS}", "note")]
    if isinstance(files.tuned, Evaluation):
        notes.insert(0, paragraph(_threshold_sentence(files.tuned.metrics)))
        if "meteor" not in files.tuned.metrics:
            notes.append(paragraph(NO_WORDNET, "note"))
    return section(
        "Before and after",
        paragraph(_paired_sentence(files)),
        f'<div class="wide">{figure}</div>',
        table(["", *(name for name, *_ in columns)], rows),
        *notes,
    )


def _paired_sentence(files: RunFiles) -> str:
    pair = paired_or_reason(files)
    if not isinstance(pair, Paired):
        return pair
    f1 = paired_f1(files.base, files.tuned)
    return (
        f"On the {pair.num_common:,} questions that both scored, exact went from {percent(pair.accuracy_first)} to "
        f"{percent(pair.accuracy_second)}: {points(pair.difference)} "
        f"{interval_text(pair.difference_ci95, signed=True)} (Newcombe's paired interval; exact McNemar test, "
        f"{p_value_text(pair.p_value)}). {_f1_sentence(f1)}"
    )


def _f1_sentence(f1: PairedMeans) -> str:
    return (
        f"F1 went from {percent(f1.first)} to {percent(f1.second)}: {points(f1.difference)} "
        f"{interval_text(f1.difference_ci95, signed=True)} (bootstrap; randomisation test, {p_value_text(f1.p_value)})."
    )


def _breakdown_section(run_dir: Path) -> str:
    path = run_dir / "eval" / "final" / "breakdown.json"
    if not path.exists():
        return ""
    parts = []
    for title, groups in read_json(path).items():
        rows = []
        for name, found in groups.items():
            exact = percent(found["exact"] / 100), interval_text([bound / 100 for bound in found["exact_ci95"]])
            others = [
                "–" if each not in found else percent(found[each] / 100) for each in ("f1", "HasAns_f1", "NoAns_f1")
            ]
            rows.append([name, f"{found['total']:,}", exact, *others])
        headers = [title.replace("_", " "), "questions", "exact", "F1", "HasAns F1", "NoAns F1"]
        parts.append(table(headers, rows))
    note = "The tuned model; a question counts under the first question word in it. Wilson intervals."
    return section("By question word and context length", *parts, paragraph(note, "note"))


def _errors_section(files: RunFiles, questions: Mapping[str, Question]) -> str:
    title = "Worst errors of the tuned model"
    if isinstance(files.tuned, str):
        return section(title, paragraph(files.tuned))
    wrong = [line for line in files.tuned.predictions.values() if line["f1"] == 0]
    if not wrong:
        return section(title, paragraph("None: every answer shares a word with a gold answer."))
    threshold = files.tuned.metrics.get("threshold")
    if threshold is None:
        order = "answers before abstentions"
        wrong.sort(key=lambda line: (not line["prediction"], line["id"]))
    else:
        order = "those farthest from the threshold, where the model is surest"
        wrong.sort(key=lambda line: (-abs(line["null_odds"] - threshold), line["id"]))
    entries = [_error(line, questions.get(line["id"])) for line in wrong[:NUM_ERRORS]]
    count = f"{len(wrong):,} answers share nothing with a gold answer; {len(entries)} of them, {order}:"
    return section(title, paragraph(count), f'<ol class="errors">{"".join(entries)}</ol>')


def _error(line: dict, question: Question | None) -> str:
    golds = " | ".join(line["label"]) or "no answer"
    answered = f"answered “{line['prediction']}”" if line["prediction"] else "left unanswered"
    facts = f"{answered}, gold: {golds} · {line['id']}"
    asked = "(question not at hand)" if question is None else question.text
    context = "" if question is None else question.paragraph.context
    shown = context[:MOST_CHARACTERS] + (" …" if len(context) > MOST_CHARACTERS else "")
    return (
        f'<li><span class="small">{escape(facts)}</span><p>{escape(asked)}</p><p class="small">{escape(shown)}</p></li>'
    )
