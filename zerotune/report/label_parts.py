"""Show a run on labelled texts: confusion, and the errors of which the tuned model is most confident."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NotRequired

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from zerotune.metrics.evaluations import Evaluation
from zerotune.metrics.labels import classification_metrics
from zerotune.report import html
from zerotune.report.run_report import ReportParts, RunFiles

NUM_ERRORS, MOST_CHARACTERS = 12, 700


def label_parts(label_names: Sequence[str], texts: Mapping[str, str] | None = None) -> ReportParts:
    """Return the report's parts about labelled texts.

    Args:
        texts: item id -> text, for the errors; a text that is missing is left out.
    """

    def rescore(lines: list[dict]) -> dict:
        return classification_metrics(
            [line["label"] for line in lines], [line["prediction"] for line in lines], label_names
        )

    def sections(files: RunFiles) -> list[str]:
        return [_confusion_section(files, label_names), _most_confident_errors(files.tuned, label_names, texts or {})]

    label = Annotated[int, Ge(0), Lt(len(label_names))]
    scores = Annotated[list[float], Len(len(label_names), len(label_names))]
    form = {"id": str, "label": label | None, "prediction": label | None, "scores": NotRequired[scores]}
    return ReportParts(
        items="items",
        headline=("accuracy",),
        columns=("accuracy", "f1" if len(label_names) == 2 else "f1_macro"),
        prediction=TypedDict("LabelPrediction", form),
        rescore=rescore,
        sections=sections,
    )


def _confusion_section(files: RunFiles, label_names: Sequence[str]) -> str:
    tables = [
        html.confusion_table(f"{name}, {one.metrics['count']:,} items", one.metrics["confusion"], label_names)
        for name, one in (("Base", files.base), ("Tuned", files.tuned))
        if isinstance(one, Evaluation) and len(one.metrics.get("confusion", ())) == len(label_names)
    ]
    if not tables:
        return html.section("Confusion", html.paragraph("No evaluation in this run holds a confusion matrix."))
    note = html.paragraph("Items, and their share of the items with that label.", "note")
    return html.section("Confusion", f'<div class="figures">{"".join(tables)}</div>', note)


def _most_confident_errors(tuned: Evaluation | str, label_names: Sequence[str], texts: Mapping[str, str]) -> str:
    title = "Most confident errors of the tuned model"
    if isinstance(tuned, str):
        return html.section(title, html.paragraph(tuned))
    wrong = [line for line in tuned.predictions.values() if line["prediction"] != line["label"] and line.get("scores")]
    if not wrong:
        return html.section(title, html.paragraph("None: every scored item is right, or no scores were kept."))
    wrong.sort(key=lambda line: (-line["scores"][line["prediction"]], line["id"]))
    errors = []
    for line in wrong[:NUM_ERRORS]:
        predicted, label = label_names[line["prediction"]], label_names[line["label"]]
        probability = math.exp(line["scores"][line["prediction"]])
        facts = f"{predicted} with probability {probability:.4f}, labelled {label} · {line['id']}"
        errors.append((facts, html.shortened(texts.get(line["id"], "(the text is not available)"), MOST_CHARACTERS)))
    count = f"{len(wrong):,} items are wrong; these {len(errors)} have the highest probability:"
    return html.section(title, html.paragraph(count), html.error_list(errors))
