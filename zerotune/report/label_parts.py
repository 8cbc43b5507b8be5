"""Show evaluations of texts with one label or any number of labels: by label, by length, calibration, examples."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NotRequired

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from zerotune.errors import counted, quoted
from zerotune.metrics.evaluations import Evaluation, is_right
from zerotune.metrics.label_sets import label_set_metrics
from zerotune.metrics.labels import classification_metrics
from zerotune.records import Count
from zerotune.report import html, words
from zerotune.report.item_parts import (
    Decisions,
    calibration_section,
    examples_section,
    length_section,
    surest,
    text_of,
)
from zerotune.report.run_report import ReportParts


def label_parts(label_names: Sequence[str]) -> ReportParts:
    """Return the report's parts about labelled texts."""

    def rescore(lines: list[dict]) -> dict:
        return classification_metrics(
            [line["label"] for line in lines], [line["prediction"] for line in lines], label_names
        )

    def sections(evaluations: Mapping[str, Evaluation]) -> list[str]:
        return [
            _confusion_section(evaluations, label_names),
            length_section(evaluations, "accuracy"),
            calibration_section(evaluations),
            _examples(list(evaluations.values())[-1], label_names) if evaluations else "",
        ]

    label = Annotated[int, Ge(0), Lt(len(label_names))]
    scores = Annotated[list[float], Len(len(label_names), len(label_names))]
    form = {"id": str, "label": label | None, "prediction": label | None, "scores": NotRequired[scores]}
    form |= {"text": NotRequired[str], "num_words": NotRequired[Count]}
    return ReportParts(
        items="items",
        headline=("accuracy",),
        columns=("accuracy", "f1" if len(label_names) == 2 else "f1_macro"),
        prediction=TypedDict("LabelPrediction", form),
        rescore=rescore,
        sections=sections,
        answers=words.answers_of_labels,
    )


def _confusion_section(evaluations: Mapping[str, Evaluation], label_names: Sequence[str]) -> str:
    tables = [
        html.confusion_table(f"{name}, {one.metrics['count']:,} items", one.metrics["confusion"], label_names)
        for name, one in evaluations.items()
        if len(one.metrics.get("confusion", ())) == len(label_names)
    ]
    if not tables:
        return html.section("Confusion", html.paragraph("No evaluation here holds a confusion matrix."))
    note = html.paragraph("Items, and their share of the items with that label.", "note")
    return html.section("Confusion", f'<div class="figures">{"".join(tables)}</div>', note)


def _examples(evaluation: Evaluation, label_names: Sequence[str]) -> str:
    label_names = [html.isolated(name) for name in label_names]

    def probability(line: dict) -> float:
        return math.exp(line["scores"][line["prediction"]]) if line.get("scores") else 0.0

    def example(line: dict) -> tuple[str, str]:
        answer = "no label read" if line["prediction"] is None else label_names[line["prediction"]]
        sure = f" with probability {probability(line):.4f}" if line.get("scores") else ""
        labelled = "" if is_right(line) else f", labelled {label_names[line['label']]}"
        return f"{answer}{sure}{labelled} · {line['id']}", text_of(line)

    lines = evaluation.predictions.values()
    wrong = surest([line for line in lines if not is_right(line)], probability)
    right = surest([line for line in lines if is_right(line)], probability)
    by_probability = any(line.get("scores") for line in lines)
    order = "the highest probability first" if by_probability else "by id"
    count = f"Wrong: {len(wrong):,} of {counted(len(lines), 'item')}. Shown: {{shown}}, {order}."
    how = "Those that the model is most and least sure of:" if by_probability else "The first and the last by id:"
    return examples_section(count if wrong else "None: every item is right.", how, wrong, right, example)


# --- any number of labels ---


def label_set_parts(label_names: Sequence[str]) -> ReportParts:
    """Return the report's parts about texts that have none, one or several labels."""

    def rescore(lines: list[dict]) -> dict:
        return label_set_metrics([line["label"] for line in lines], [line["prediction"] for line in lines], label_names)

    def sections(evaluations: Mapping[str, Evaluation]) -> list[str]:
        return [
            _label_section(evaluations, label_names),
            length_section(evaluations, "exact match"),
            calibration_section(evaluations, _decisions, "decisions about a label"),
            _label_set_examples(list(evaluations.values())[-1], label_names) if evaluations else "",
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


def _label_set_examples(evaluation: Evaluation, label_names: Sequence[str]) -> str:
    def named(numbers: Sequence[int]) -> str:
        return ", ".join(html.isolated(quoted(label_names[number])) for number in numbers) or "no label"

    def example(line: dict) -> tuple[str, str]:
        if is_right(line):
            return f"{named(line['label'])} · {line['id']}", text_of(line)
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
    count = f"Wrong: {len(wrong):,} of {counted(len(lines), 'item')}. Shown: {{shown}}, surest wrong decision first."
    how = "Those with the most and the fewest labels:"
    return examples_section(count if wrong else "None: every item is right.", how, wrong, right, example)


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
