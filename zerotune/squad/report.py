"""Write the results of evaluations on SQuAD v2, and show them: a run's page and table, the table of one evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from zerotune.evaluation.result_files import shortened, write_predictions
from zerotune.files import read_json, write_json
from zerotune.metrics.evaluations import (
    EVALUATE_AGAIN,
    Evaluation,
    Prediction,
    Score,
    ScoreInterval,
    Share,
    score_names,
)
from zerotune.metrics.text_overlap import OVERLAP_TITLES
from zerotune.records import Count
from zerotune.report import html, words
from zerotune.report.item_parts import examples_section, surest
from zerotune.report.run_report import ReportParts
from zerotune.run.process import say
from zerotune.squad.metrics import (
    ANSWER_ALL,
    PredictedAnswers,
    QuestionScores,
    breakdown,
    question_metrics,
    squad_metrics,
)
from zerotune.squad.questions import Question

MOST_CHARACTERS = 900
HOW_OVERLAP_COUNTS = (
    "BLEU, ROUGE and METEOR count the questions that have an answer, with every distinct gold answer: BLEU takes them "
    "as references, ROUGE and METEOR the best of them; an abstention shares nothing. ROUGE-2 of one-word answers is 0, "
    "METEOR of a right one is 50, and BLEU rests on runs of four words, of which short answers have few. ROUGE reads "
    "only Latin letters and digits."
)
NO_WORDNET = "METEOR is left out: it needs WordNet (Debian's package wordnet-base, or nltk.download('wordnet'))."


class QuestionPrediction(Prediction):
    """A line of predictions.jsonl: distinct gold answers, the answer, and its scores where there are gold answers."""

    label: list[str] | None
    prediction: str
    exact: Share
    f1: Share


class GroupScores(TypedDict):
    """breakdown.json's entry for a group of questions."""

    total: Count
    exact: Score
    f1: Score
    exact_ci95: ScoreInterval
    HasAns_f1: NotRequired[Score]
    NoAns_f1: NotRequired[Score]


def question_parts(questions: Mapping[str, Question]) -> ReportParts:
    """Return the report's parts about a run on SQuAD v2.

    Args:
        questions: question id -> question, for the examples.
    """

    def rescore(lines: list[dict]) -> dict:
        exact, f1 = (np.array([line[name] for line in lines]) for name in ("exact", "f1"))
        return squad_metrics(QuestionScores(exact, f1, np.array([bool(line["label"]) for line in lines])))

    def sections(evaluations: Mapping[str, Evaluation]) -> list[str]:
        if not evaluations:
            return []
        main = list(evaluations.values())[-1]
        return [_breakdown_section(main), _examples(main, questions)]

    return ReportParts(
        items="questions",
        headline=("f1", "exact"),
        columns=("exact", "f1", "HasAns_f1", "NoAns_f1"),
        prediction=QuestionPrediction,
        rescore=rescore,
        sections=sections,
        answers=_answers,
        remark=_abstentions,
        footnote=_overlap_note,
        more_rows={
            "abstention_share": ("left unanswered", html.percent),
            "mean_answer_words": ("mean words of an answer", "{:.1f}".format),
            "eos_rate": ("answers that the model ended", html.percent),
        },
    )


def score_line(metrics: dict) -> str:
    """Return exact and F1 with their 95 % intervals in a line; without gold answers, the number of predictions."""
    if "exact" not in metrics:
        return f"{metrics['count']:,} predictions (the questions have no gold answers)"
    exact, f1 = (
        "{} {:.2f} [{:.2f}, {:.2f}]".format(name, metrics[name], *metrics[f"{name}_ci95"]) for name in ("exact", "f1")
    )
    return f"{exact}, {f1} on {metrics['count']:,} questions"


def print_scores(metrics: dict) -> None:
    """Print all scores of one evaluation."""
    if "exact" not in metrics:
        say(score_line(metrics))
        return
    say(f"{'':<14}{'score':>9}{'95 % interval':>20}{'questions':>12}")
    for name in score_names(metrics):
        group = "HasAns_" if name in OVERLAP_TITLES else name[: name.rfind("_") + 1]
        interval = "[{:.2f}, {:.2f}]".format(*metrics[f"{name}_ci95"])
        say(f"{name:<14}{metrics[name]:>9.4f}{interval:>20}{metrics[f'{group}total']:>12,}")
    if note := _overlap_note(metrics):
        say(note)
    say(_abstentions(metrics))


def _overlap_note(metrics: dict) -> str:
    if "bleu" not in metrics:
        return ""
    return HOW_OVERLAP_COUNTS if "meteor" in metrics else f"{HOW_OVERLAP_COUNTS} {NO_WORDNET}"


def _abstentions(metrics: dict) -> str:
    """Say how many questions are left unanswered, at which threshold, and what other choices would score."""
    said = f"{metrics['num_abstained']:,} of {metrics['total']:,} questions are left unanswered"
    if metrics.get("threshold") is not None:
        chosen = ", chosen on the validation split" if metrics.get("training_sha256") else ""
        limit = "none" if metrics["threshold"] >= ANSWER_ALL else f"{metrics['threshold']:.3f}"
        said += f" (threshold {limit}{chosen})"
    share = 100 * metrics.get("NoAns_total", 0) / metrics["total"]
    said += f"; answering no question would score {share:.2f} in exact and F1."
    if "best_f1" in metrics:
        said += (
            " The best threshold for these same questions, an oracle and not a result, would reach exact "
            f"{metrics['best_exact']:.2f} and F1 {metrics['best_f1']:.2f}."
        )
    return said


def _answers(name: str, metrics: dict) -> list[str]:
    """Return a remark if a model leaves nearly all questions unanswered, or far fewer than have no answer."""
    left, without = metrics.get("num_abstained", 0) / metrics["total"], metrics.get("NoAns_total", 0) / metrics["total"]
    name = name[0].upper() + name[1:]
    if left >= words.NEARLY_ALL:
        return [f"{name} leaves nearly every question unanswered ({html.percent(left)})."]
    if without - left >= words.MUCH_MORE:
        return [
            f"{name} leaves {html.percent(left)} of the questions unanswered; {html.percent(without)} have no answer."
        ]
    return []


def _breakdown_section(evaluation: Evaluation) -> str:
    path = evaluation.folder / "breakdown.json"
    if not path.exists():
        return ""
    parts = []
    for title, groups in read_json(path, dict[str, dict[str, GroupScores]], EVALUATE_AGAIN).items():
        rows = []
        for name, found in groups.items():
            scores = [found.get(score) for score in ("exact", "f1", "HasAns_f1", "NoAns_f1")]
            exact, *others = ("–" if score is None else html.percent(score / 100) for score in scores)
            interval = html.interval_text([bound / 100 for bound in found["exact_ci95"]])
            rows.append([name, f"{found['total']:,}", (exact, interval), *others])
        headers = [title.replace("_", " "), "questions", "exact", "F1", "HasAns F1", "NoAns F1"]
        parts.append(html.table(headers, rows))
    note = "A question counts under the first question word in it. Wilson intervals."
    return html.section("By question word and context length", *parts, html.paragraph(note, "note"))


def _examples(evaluation: Evaluation, questions: Mapping[str, Question]) -> str:
    lines, threshold = evaluation.predictions.values(), evaluation.metrics.get("threshold")
    answers_all = threshold is not None and threshold >= ANSWER_ALL

    def sureness(line: dict) -> float:
        """Return the distance from the threshold; without one, 1 for an answer and 0 for an abstention."""
        if threshold is None:
            return float(bool(line["prediction"]))
        return -line["null_odds"] if answers_all else abs(line["null_odds"] - threshold)

    def example(line: dict) -> tuple[str, ...]:
        answered = f"answered “{html.isolated(line['prediction'])}”" if line["prediction"] else "left unanswered"
        golds = " | ".join(map(html.isolated, line["label"])) or "no answer"
        facts = f"{answered}, gold: {golds} · {line['id']}"
        question = questions.get(line["id"])
        if question is None:
            return facts, line.get("question") or "(the question is not available)"
        return facts, question.text, shortened(question.paragraph.context, MOST_CHARACTERS)

    wrong = surest([line for line in lines if line["f1"] == 0], sureness)
    right = surest([line for line in lines if line["exact"] == 1], sureness)
    order = "answers before abstentions"
    if threshold is not None:
        farthest = "with the lowest odds of no answer" if answers_all else "farthest from the threshold"
        order = f"those {farthest} first, where the model is most confident"
    count = f"Answers that share no word with a gold answer: {len(wrong):,}. Shown: {{shown}}, {order}."
    count = count if wrong else "None: every answer shares a word with a gold answer."
    how = "Exact answers, the first and the last in the same order:"
    return examples_section(count, how, wrong, right, example)


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
