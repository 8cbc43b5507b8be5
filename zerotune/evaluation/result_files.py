"""What an evaluation writes of a model's answers, beside metrics.json; nothing here imports torch."""

from pathlib import Path

from zerotune.files import write_json, write_json_lines, write_text
from zerotune.metrics.label_results import LabelAnswers, label_results
from zerotune.run.process import say
from zerotune.squad.questions import Question
from zerotune.squad.results import Answers, breakdown, question_results
from zerotune.tasks.splits import Example


def write_label_results(folder: Path, examples: list[Example], answers: LabelAnswers) -> dict:
    """Score labels and write predictions.jsonl; for unlabelled rows also submission.tsv in the form of GLUE's server.

    Returns:
        What `label_results` finds.
    """
    rows = [
        {"id": example.id, "label": example.label, "prediction": prediction}
        for example, prediction in zip(examples, answers.predictions, strict=True)
    ]
    _write_predictions(folder, rows, answers.details)
    if examples[0].label is None:
        _write_submission(folder, [example.id for example in examples], answers.predictions)
    return label_results([example.label for example in examples], answers)


def _write_submission(folder: Path, ids: list[str], predictions: list[int | None]) -> None:
    if None in predictions:
        say("submission.tsv is not written: it needs a label for every row, and some answers hold none")
        return
    rows = (identifier.rpartition("-")[2] for identifier in ids)  # of the file, also where some of them are predicted
    lines = [f"{row}\t{prediction}\n" for row, prediction in zip(rows, predictions, strict=True)]
    write_text(folder / "submission.tsv", "index\tprediction\n" + "".join(lines))


def write_question_results(folder: Path, questions: list[Question], answers: Answers, seed: int = 0) -> dict:
    """Score answers and write predictions.jsonl, predictions.json (the official form) and, where there are gold
    answers, breakdown.json.

    Returns:
        What `question_results` finds.
    """
    metrics, scores = question_results(questions, answers, seed)
    details = answers.details
    if scores is not None:
        details = {"exact": scores.exact.tolist(), "f1": scores.f1.tolist()} | details
        write_json(folder / "breakdown.json", breakdown(questions, scores))
    rows = [
        {"id": question.id, "label": _golds(question), "prediction": text}
        for question, text in zip(questions, answers.texts, strict=True)
    ]
    _write_predictions(folder, rows, details)
    write_json(folder / "predictions.json", answers.by_id(questions))
    return metrics


def _golds(question: Question) -> list[str] | None:
    return None if question.answers is None else list(dict.fromkeys(answer.text for answer in question.answers))


def _write_predictions(folder: Path, rows: list[dict], details: dict[str, list]) -> None:
    more = ({name: values[number] for name, values in details.items()} for number in range(len(rows)))
    write_json_lines(folder / "predictions.jsonl", [row | own for row, own in zip(rows, more, strict=True)])
