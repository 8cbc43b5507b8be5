"""Write the results of an evaluation, beside metrics.json; nothing here imports torch."""

from collections.abc import Sequence
from pathlib import Path

from zerotune.files import write_json_lines, write_text
from zerotune.metrics.label_sets import PredictedLabelSets, label_set_metrics
from zerotune.metrics.labels import PredictedLabels, label_metrics
from zerotune.run.process import say
from zerotune.tasks.splits import Example


def write_label_results(
    folder: Path, examples: list[Example], predicted: PredictedLabels, label_names: Sequence[str]
) -> dict:
    """Write predictions.jsonl and, for unlabelled rows, submission.tsv in the form of GLUE's server.

    Returns:
        The part of metrics.json that was measured, as `label_metrics`.
    """
    ids, labels = [example.id for example in examples], [example.label for example in examples]
    write_predictions(folder, {"id": ids, "label": labels, "prediction": predicted.predictions} | predicted.details)
    if labels[0] is None:
        _write_submission(folder, examples, predicted.predictions)
    return label_metrics(labels, predicted, label_names)


def write_label_set_results(
    folder: Path, examples: list[Example], predicted: PredictedLabelSets, label_names: Sequence[str]
) -> dict:
    """Write predictions.jsonl of texts with any number of labels.

    Returns:
        The part of metrics.json that was measured, as `label_set_metrics`.
    """
    ids, labels = [example.id for example in examples], [example.label for example in examples]
    columns = {"id": ids, "label": labels, "prediction": predicted.predictions, "scores": predicted.scores}
    write_predictions(folder, columns)
    return label_set_metrics(labels, predicted.predictions, label_names)


def write_predictions(folder: Path, columns: dict[str, list]) -> None:
    """Write predictions.jsonl, a line per item, from columns with a value per item."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_json_lines(folder / "predictions.jsonl", rows)


def _write_submission(folder: Path, examples: list[Example], predictions: list[int | None]) -> None:
    if None in predictions:
        say("submission.tsv is not written: it needs a label for every row, and some answers name none")
        return
    # the file's own index, else the row's number in the file, also where only some rows are predicted
    rows = (example.index or example.id.rpartition("-")[2] for example in examples)
    lines = [f"{row}\t{prediction}\n" for row, prediction in zip(rows, predictions, strict=True)]
    write_text(folder / "submission.tsv", "index\tprediction\n" + "".join(lines))
