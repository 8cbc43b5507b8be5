"""Write the results of an evaluation on SQuAD v2, beside metrics.json; nothing here imports torch."""

from pathlib import Path

from zerotune.evaluation.result_files import write_predictions
from zerotune.files import write_json
from zerotune.squad.metrics import PredictedAnswers, breakdown, question_metrics
from zerotune.squad.questions import Question


def write_question_results(folder: Path, questions: list[Question], predicted: PredictedAnswers, seed: int = 0) -> dict:
    """Write predictions.jsonl, predictions.json (the official format) and, with gold answers, breakdown.json.

    Returns:
        The measured part of metrics.json, from `question_metrics`.
    """
    metrics, scores = question_metrics(questions, predicted, seed)
    columns = {
        "id": [question.id for question in questions],
        "question": [question.text for question in questions],
        "label": [_distinct_golds(question) for question in questions],
        "prediction": predicted.texts,
    }
    if scores is not None:
        columns |= {"exact": scores.exact.tolist(), "f1": scores.f1.tolist()}
        write_json(folder / "breakdown.json", breakdown(questions, scores))
    write_predictions(folder, columns | predicted.details)
    write_json(folder / "predictions.json", predicted.by_id(questions))
    return metrics


def _distinct_golds(question: Question) -> list[str] | None:
    return None if question.answers is None else list(dict.fromkeys(answer.text for answer in question.answers))
