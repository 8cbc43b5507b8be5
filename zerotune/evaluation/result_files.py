"""Write the results of an evaluation, beside metrics.json; nothing here imports torch."""

from collections.abc import Sequence
from pathlib import Path

from zerotune.files import write_json_lines, write_text
from zerotune.metrics.label_sets import PredictedLabelSets, label_set_metrics
from zerotune.metrics.labels import PredictedLabels, label_metrics
from zerotune.run.process import say
from zerotune.tasks.splits import Example

# Characters of a text in predictions.jsonl; IMDB's reviews have 1,300 on average.
MOST_CHARACTERS = 1000


def write_label_results(
    folder: Path, examples: list[Example], predicted: PredictedLabels, label_names: Sequence[str]
) -> dict:
    """Write predictions.jsonl and, for unlabelled rows, submission.tsv in the format of GLUE's server.

    Returns:
        The part of metrics.json that was measured, as `label_metrics` returns it.
    """
    labels, found = [example.label for example in examples], predicted.predictions
    named = {
        "label_name": [None if label is None else label_names[label] for label in labels],
        "prediction_name": [None if label is None else label_names[label] for label in found],
    }
    write_predictions(folder, {**_texts(examples), "label": labels, "prediction": found} | named | predicted.details)
    if labels[0] is None:
        _write_submission(folder, examples, predicted.predictions, label_names)
    return label_metrics(labels, predicted, label_names)


def write_label_set_results(
    folder: Path, examples: list[Example], predicted: PredictedLabelSets, label_names: Sequence[str]
) -> dict:
    """Write predictions.jsonl of texts with any number of labels.

    Returns:
        The part of metrics.json that was measured, as `label_set_metrics` returns it.
    """
    labels, found = [example.label for example in examples], predicted.predictions
    named = {
        "label_names": [None if held is None else [label_names[label] for label in held] for held in labels],
        "prediction_names": [[label_names[label] for label in given] for given in found],
    }
    columns = {**_texts(examples), "label": labels, "prediction": found, **named, "scores": predicted.scores}
    write_predictions(folder, columns)
    return label_set_metrics(labels, predicted.predictions, label_names)


def write_predictions(folder: Path, columns: dict[str, list]) -> None:
    """Write predictions.jsonl, a line per item, from columns with a value per item."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_json_lines(folder / "predictions.jsonl", rows)


def _texts(examples: list[Example]) -> dict[str, list]:
    """Return the columns that describe the items; num_words counts the whole text, even if it is cut."""
    return {
        "id": [example.id for example in examples],
        "text": [shortened(example.text, MOST_CHARACTERS) for example in examples],
        "num_words": [len(example.text.split()) for example in examples],
    }


def shortened(text: str, most_characters: int) -> str:
    """Return a text, cut and marked with " …" if it is longer."""
    return text if len(text) <= most_characters else f"{text[:most_characters]} …"


def _write_submission(
    folder: Path, examples: list[Example], predictions: list[int | None], label_names: Sequence[str]
) -> None:
    if None in predictions:
        say("submission.tsv is not written: it needs a label for every row, and some answers name none")
        return
    # the file's own index, else the row's number in the file, even if only some rows are predicted
    rows = (example.index or example.id.rpartition("-")[2] for example in examples)
    # GLUE's server wants numbers, but the names of MNLI's, QNLI's and RTE's labels
    shown = label_names if "entailment" in label_names else range(len(label_names))
    lines = [f"{row}\t{shown[prediction]}\n" for row, prediction in zip(rows, predictions, strict=True)]
    write_text(folder / "submission.tsv", "index\tprediction\n" + "".join(lines))
