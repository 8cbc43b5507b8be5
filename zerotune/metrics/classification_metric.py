"""Two-label classification as a metric of the `evaluate` library over scikit-learn. Never loads code from a hub."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, precision_recall_fscore_support


class ClassificationMetric(evaluate.Metric):
    """`ClassificationMetric().compute(predictions=…, references=…)`: (items,) integers 0 and 1, 1 the positive class.
    A prediction of another number is a miss of its label and of no predicted class.

    Gives accuracy, precision, recall, f1 (of the positive class), precision_macro, recall_macro, f1_macro (means over
    both labels, also where one never occurs), accuracy_negative and accuracy_positive (over the items of that label),
    as floats in 0-1; a ratio over 0 is 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, precision, recall and F1 of two-label classification.",
            citation="",
            inputs_description="predictions, references: 0 (negative) or 1 (positive) per item",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        options = {"labels": [0, 1], "zero_division": 0.0}
        precision, recall, f1, _ = precision_recall_fscore_support(references, predictions, average=None, **options)
        macro = precision_recall_fscore_support(references, predictions, average="macro", **options)
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "precision": float(precision[1]),
            "recall": float(recall[1]),
            "f1": float(f1[1]),
            "precision_macro": float(macro[0]),
            "recall_macro": float(macro[1]),
            "f1_macro": float(macro[2]),
            "accuracy_negative": float(recall[0]),
            "accuracy_positive": float(recall[1]),
        }
