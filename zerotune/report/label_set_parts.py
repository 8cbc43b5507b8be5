"""Show evaluations of texts with any number of labels: a table of the labels, errors beside right answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NotRequired

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from zerotune.errors import quoted
from zerotune.metrics.evaluations import Evaluation, is_right
from zerotune.metrics.label_sets import label_set_metrics
from zerotune.records import Count
from zerotune.report import html
from zerotune.report.item_parts import (
    NUM_EXAMPLES,
    Decisions,
    both_ends,
    calibration_section,
    examples_section,
    length_section,
    surest,
    text_of,
)
from zerotune.report.run_report import ReportParts


def label_set_parts(label_names: Sequence[str]) -> ReportParts:
    """Return the report's parts about texts that have none, one or several labels."""

    def rescore(lines: list[dict]) -> dict:
        return label_set_metrics([line["label"] for line in lines], [line["prediction"] for line in lines], label_names)

    def sections(evaluations: Mapping[str, Evaluation]) -> list[str]:
        return [
            _label_section(evaluations, label_names),
            length_section(evaluations, "exact match"),
            calibration_section(evaluations, _decisions, "decisions about a label"),
            _examples(list(evaluations.values())[-1], label_names) if evaluations else "",
        ]

    labels = list[Annotated[int, Ge(0), Lt(len(label_names))]]
    scores = Annotated[list[float], Len(len(label_names), len(label_names))]
    form = {"id": str, "label": labels | None, "prediction": labels, "scores": NotRequired[scores]}
    form |= {"text": NotRequired[str], "num_words": NotRequired[Count]}
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


def _label_section(evaluations: Mapping[str, Evaluation], label_names: Sequence[str]) -> str:
    parts = []
    for name, one in evaluations.items():
        rows = [_label_row(one, number, label) for number, label in enumerate(label_names)]
        without = [not line["label"] for line in one.predictions.values()]
        given = [not line["prediction"] for line in one.predictions.values()]
        both = sum(map(all, zip(without, given, strict=True)))
        rows.append(["(no label)", f"{sum(without):,}", f"{sum(given):,}", f"{both:,}", "", "", ""])
        headers = [f"{name}, {one.metrics['count']:,} items", "have it", "are given it", "both"]
        parts.append(html.table([*headers, "precision", "recall", "F1"], rows))
    if not parts:
        return html.section("Labels", html.paragraph("No evaluation here has scores."))
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


def _examples(evaluation: Evaluation, label_names: Sequence[str]) -> str:
    def named(numbers: Sequence[int]) -> str:
        return ", ".join(html.isolated(quoted(label_names[number])) for number in numbers) or "no label"

    def error(line: dict) -> tuple[str, str]:
        decision = ""
        if line.get("scores"):
            probability, number = _worst_decision(line)
            is_given = number in line["prediction"]
            label = html.isolated(label_names[number])
            decision = f"{'' if is_given else 'not '}{label} with probability {probability:.4f} · "
        found = f"given {named(line['prediction'])}, labelled {named(line['label'])} · {line['id']}"
        return decision + found, text_of(line)

    lines = evaluation.predictions.values()
    wrong = surest(
        [line for line in lines if not is_right(line)],
        lambda line: _worst_decision(line)[0] if line.get("scores") else 0.0,
    )
    right = sorted((line for line in lines if is_right(line)), key=lambda line: (-len(line["label"]), line["id"]))
    shown = wrong[:NUM_EXAMPLES]
    count = f"{len(wrong):,} items are wrong. These {len(shown)} have the wrong decision of highest probability:"
    if not wrong:
        count = "None: every item is right."
    examples = [(f"{named(line['label'])} · {line['id']}", text_of(line)) for line in both_ends(right)]
    return examples_section(count, map(error, shown), examples, "Those with the most and the fewest labels:")


def _decisions(line: dict) -> Decisions | None:
    """Return the decision about each label, given or not: its probability, and whether it is right."""
    if not line.get("scores"):
        return None
    given, has = set(line["prediction"]), set(line["label"])
    probabilities = enumerate(map(math.exp, line["scores"]))
    return [
        (each if number in given else 1 - each, (number in given) == (number in has)) for number, each in probabilities
    ]


def _worst_decision(line: dict) -> tuple[float, int]:
    """Return the highest probability of a wrong decision about an item, and the label that it is about."""
    probability, number = max((each, -number) for number, (each, right) in enumerate(_decisions(line)) if not right)
    return probability, -number
