"""Show evaluations of labelled texts: confusion, lengths, calibration, errors beside right answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NotRequired

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from zerotune.metrics.evaluations import Evaluation, is_right
from zerotune.metrics.labels import classification_metrics
from zerotune.records import Count
from zerotune.report import html, words
from zerotune.report.item_parts import (
    NUM_EXAMPLES,
    both_ends,
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
    shown = wrong[:NUM_EXAMPLES]
    count = f"{len(wrong):,} of {len(lines):,} items are wrong. These {len(shown)} have the highest probability:"
    how = "Those of which the model is most and least sure:"
    if not wrong:
        count = "None: every item is right."
    return examples_section(count, map(example, shown), [example(line) for line in both_ends(right)], how)
