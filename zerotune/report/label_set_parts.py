"""Show a run on texts with any number of labels: a table of the labels, and the most confident errors."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NotRequired

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from zerotune.metrics.evaluations import Evaluation
from zerotune.metrics.label_sets import label_set_metrics
from zerotune.report import html
from zerotune.report.label_parts import MOST_CHARACTERS, NUM_ERRORS
from zerotune.report.run_report import ReportParts, RunFiles


def label_set_parts(label_names: Sequence[str], texts: Mapping[str, str] | None = None) -> ReportParts:
    """Return the report's parts about texts that have none, one or several labels.

    Args:
        texts: item id -> text, for the errors; a text that is missing is left out.
    """

    def rescore(lines: list[dict]) -> dict:
        return label_set_metrics([line["label"] for line in lines], [line["prediction"] for line in lines], label_names)

    def sections(files: RunFiles) -> list[str]:
        return [_label_section(files, label_names), _most_confident_errors(files.tuned, label_names, texts or {})]

    labels = list[Annotated[int, Ge(0), Lt(len(label_names))]]
    scores = Annotated[list[float], Len(len(label_names), len(label_names))]
    form = {"id": str, "label": labels | None, "prediction": labels, "scores": NotRequired[scores]}
    return ReportParts(
        items="items",
        headline=("exact_match", "f1_micro"),
        columns=("exact_match", "f1_micro", "f1_macro"),
        prediction=TypedDict("LabelSetPrediction", form),
        rescore=rescore,
        sections=sections,
        footnote=lambda metrics: (
            "An exact match has all of the item's labels and no other. Micro scores count each "
            "pair of an item and a label."
        ),
    )


def _label_section(files: RunFiles, label_names: Sequence[str]) -> str:
    parts = []
    for name, one in (("Base", files.base), ("Tuned", files.tuned)):
        if not isinstance(one, Evaluation):
            continue
        rows = [_label_row(one, number, label) for number, label in enumerate(label_names)]
        without = [not line["label"] for line in one.predictions.values()]
        given = [not line["prediction"] for line in one.predictions.values()]
        both = sum(map(all, zip(without, given, strict=True)))
        rows.append(["(no label)", f"{sum(without):,}", f"{sum(given):,}", f"{both:,}", "", "", ""])
        headers = [f"{name}, {one.metrics['count']:,} items", "have it", "are given it", "both"]
        parts.append(html.table([*headers, "precision", "recall", "F1"], rows))
    if not parts:
        return html.section("Labels", html.paragraph("No evaluation in this run has scores."))
    note = "Items that have a label, that the model gives it, and both. F1 with its bootstrap interval over items."
    return html.section("Labels", *parts, html.paragraph(note, "note"))


def _label_row(evaluation: Evaluation, number: int, label: str) -> list:
    lines = evaluation.predictions.values()
    has = sum(number in line["label"] for line in lines)
    gets = sum(number in line["prediction"] for line in lines)
    both = sum(number in line["label"] and number in line["prediction"] for line in lines)
    shares = [html.percent(both / each) if each else "–" for each in (gets, has)]
    f1 = html.score_cell(evaluation.metrics, f"f1_label_{label}")
    return [label, f"{has:,}", f"{gets:,}", f"{both:,}", *shares, f1]


def _most_confident_errors(tuned: Evaluation | str, label_names: Sequence[str], texts: Mapping[str, str]) -> str:
    title = "Most confident errors of the tuned model"
    if isinstance(tuned, str):
        return html.section(title, html.paragraph(tuned))
    wrong = [
        (*_worst_decision(line), line)
        for line in tuned.predictions.values()
        if line["prediction"] != line["label"] and line.get("scores")
    ]
    if not wrong:
        return html.section(title, html.paragraph("None: every scored item is right, or no scores were kept."))
    wrong.sort(key=lambda each: (-each[0], each[2]["id"]))
    errors = []
    for probability, number, line in wrong[:NUM_ERRORS]:
        is_given = number in line["prediction"]
        decision = f"{'' if is_given else 'not '}{label_names[number]} with probability {probability:.4f}"
        given, labelled = (
            ", ".join(label_names[each] for each in line[key]) or "no label" for key in ("prediction", "label")
        )
        facts = f"{decision} · given {given}, labelled {labelled} · {line['id']}"
        errors.append((facts, html.shortened(texts.get(line["id"], "(the text is not available)"), MOST_CHARACTERS)))
    count = f"{len(wrong):,} items are wrong; these {len(errors)} have the wrong decision of highest probability:"
    return html.section(title, html.paragraph(count), html.error_list(errors))


def _worst_decision(line: dict) -> tuple[float, int]:
    """Return the highest probability of a wrong decision about an item, and the label that it is about."""
    given = set(line["prediction"])
    probabilities = {number: math.exp(line["scores"][number]) for number in given ^ set(line["label"])}
    decisions = {number: each if number in given else 1 - each for number, each in probabilities.items()}
    worst = max(decisions, key=decisions.get)
    return decisions[worst], worst
