"""What is made of a model's labels for texts: the metrics of its answers, with and without calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerotune.metrics.labels import UNPARSABLE, classification_metrics

# Beside a calibrated score, the same items without calibration.
PLAIN_METRICS = ("accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class LabelAnswers:
    """A model's labels for some items, in their order.

    Attributes:
        predictions: numbers of labels, None where a written answer holds none.
        details: what else predictions.jsonl tells of each item, by name.
        uncalibrated: what the predictions were without calibration; None where nothing is calibrated.
        written: whether the labels were read from what the model wrote.
    """

    predictions: list[int | None]
    details: dict[str, list]
    uncalibrated: list[int] | None = None
    written: bool = False


def label_results(labels: Sequence[int | None], answers: LabelAnswers) -> dict:
    """The metrics of answers; counts alone where the labels are None, as all of them are then."""
    metrics = {}
    if answers.uncalibrated is not None:
        plain = _metrics(labels, answers.uncalibrated)
        kept = [name for name in plain if name.removesuffix("_ci95") in PLAIN_METRICS]
        metrics |= {f"uncalibrated_{name}": plain[name] for name in kept}
    metrics |= _metrics(labels, answers.predictions)
    if answers.written:
        num_unparsable = answers.predictions.count(None)
        metrics |= {"num_unparsable": num_unparsable, "unparsable_share": num_unparsable / len(answers.predictions)}
    return metrics


def _metrics(labels: Sequence[int | None], predictions: Sequence[int | None]) -> dict:
    if labels[0] is None:
        return {"count": len(labels)}
    return classification_metrics(np.array(labels), [UNPARSABLE if one is None else one for one in predictions])
