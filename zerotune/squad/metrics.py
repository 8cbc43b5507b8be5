"""Score answers to SQuAD v2's questions: the official scorer's numbers with intervals, thresholds, and a breakdown.

The scores are those of evaluate-v2.0.py (Rajpurkar et al. 2018), on 0-100. Answers are compared in lower case, without
ASCII punctuation, without the words a, an and the, and with single spaces. `exact` is whether a prediction then equals
a gold answer, `f1` compares the two as bags of words; the best of several gold answers counts. Gold answers that become
empty are ignored, and a question without any others has the gold answer "". A question has an answer (HasAns) if its
file gives one, even one that becomes "".
"""

import re
import string
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np

from zerotune.metrics.statistics import Interval, bootstrap_mean_interval, wilson_interval
from zerotune.metrics.text_overlap import overlap_scores
from zerotune.squad.questions import Question

# Proportions of questions. NoAns_f1 is one too: without an answer to overlap with, F1 is 0 or 1.
PROPORTIONS = ("exact", "HasAns_exact", "NoAns_exact", "NoAns_f1")
QUESTION_WORDS = ("how many", "how", "what", "when", "where", "which", "who", "why", "other")
_CONTEXT_BOUNDS = (75, 100, 125, 150, 200)
CONTEXT_LENGTHS = (
    "0–74 words", "75–99 words", "100–124 words", "125–149 words", "150–199 words", "200 words or more",
)  # fmt: skip

# A threshold above all null scores: no question is left unanswered.
ANSWER_ALL = 1e30
_SAME_WORD = {"whose": "who", "whom": "who", "what's": "what", "who's": "who"}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class PredictedAnswers:
    """A model's answers to some questions, in their order.

    Attributes:
        texts: the answers, "" for no answer.
        before_threshold: a span head's answers if it never abstained.
        null_odds: a span head's odds, [questions], greater if it is surer that there is no answer.
        details: further columns of predictions.jsonl, by name.
        measured: further entries of metrics.json, by name.
    """

    texts: list[str]
    before_threshold: list[str] | None = None
    null_odds: np.ndarray | None = None
    details: dict[str, list] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def by_id(self, questions: Sequence[Question]) -> dict[str, str]:
        """Return the answers in the official format, {question id: answer}."""
        return {question.id: text for question, text in zip(questions, self.texts, strict=True)}


@dataclass(frozen=True)
class QuestionScores:
    """The scores of single questions, [questions] each: exact and f1 in 0-1 (float64), has_answer (bool)."""

    exact: np.ndarray
    f1: np.ndarray
    has_answer: np.ndarray

    def of(self, chosen: np.ndarray) -> "QuestionScores":
        """Return the scores of the questions for which `chosen`, bool [questions], is true."""
        return QuestionScores(self.exact[chosen], self.f1[chosen], self.has_answer[chosen])

    def by_prefix(self) -> dict[str, "QuestionScores"]:
        """Return the scores for each prefix of a metric's name, without prefixes that apply to no question."""
        groups = {"": self, "HasAns_": self.of(self.has_answer), "NoAns_": self.of(~self.has_answer)}
        return {prefix: part for prefix, part in groups.items() if len(part.exact)}


def question_metrics(
    questions: Sequence[Question], predicted: PredictedAnswers, seed: int = 0
) -> tuple[dict, QuestionScores | None]:
    """Return the measured part of metrics.json, and the scores of each question.

    Questions without gold answers have only counts, and None for their scores. BLEU, ROUGE and METEOR cover the
    questions that have an answer, with their distinct gold answers.

    Args:
        seed: of the bootstraps.
    """
    predictions, scores = predicted.by_id(questions), None
    metrics: dict = {"count": len(questions)}
    if questions[0].answers is not None:
        scores = score_answers(questions, predictions)
        answerable = [question for question in questions if question.answers]
        texts = [predictions[question.id] for question in answerable]
        metrics |= squad_metrics(scores, seed) | overlap_scores(texts, [gold_texts(each) for each in answerable], seed)
        if predicted.before_threshold is not None:
            always = dict(zip(predictions, predicted.before_threshold, strict=True))
            metrics |= oracle_scores(score_answers(questions, always), questions, always, predicted.null_odds)
    lengths = [len(text.split()) for text in predicted.texts if text]
    metrics |= predicted.measured | {
        "num_abstained": len(questions) - len(lengths),
        "abstention_share": 1 - len(lengths) / len(questions),
        "mean_answer_words": sum(lengths) / len(lengths) if lengths else None,
    }
    return metrics, scores


# --- the official scorer ---


def normalise_answer(text: str) -> str:
    """Return the form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def gold_texts(question: Question) -> list[str]:
    """Return the distinct gold answers that count, in the order of the file; [""] if there are none."""
    texts = dict.fromkeys(answer.text for answer in question.answers)
    return [text for text in texts if normalise_answer(text)] or [""]


def word_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the F1 of two bags of normalised words; if one is empty, 1 if both are, else 0."""
    if not gold or not predicted:
        return float(gold == predicted)
    num_same = sum((Counter(gold) & Counter(predicted)).values())
    if not num_same:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def score_answers(questions: Sequence[Question], predictions: Mapping[str, str]) -> QuestionScores:
    """Score each question's prediction ("" for no answer), by question id. Every question needs one."""
    words_of = cache(lambda text: normalise_answer(text).split())
    exact, f1 = np.zeros(len(questions)), np.zeros(len(questions))
    for row, question in enumerate(questions):
        predicted = words_of(predictions[question.id])
        golds = [gold for gold in map(words_of, {answer.text for answer in question.answers}) if gold] or [[]]
        if predicted in golds:
            exact[row] = f1[row] = 1.0
        elif predicted:
            f1[row] = max(word_f1(gold, predicted) for gold in golds)
    return QuestionScores(exact, f1, np.array([bool(question.answers) for question in questions]))


def official_scores(scores: QuestionScores) -> dict[str, float | int]:
    """Return the official scorer's object: exact, f1, total, and HasAns_* and NoAns_* if there are such questions."""
    found: dict[str, float | int] = {}
    for prefix, part in scores.by_prefix().items():
        total = len(part.exact)
        # added one by one, as the official scorer does: numpy's pairwise sum differs in the last digits
        found[f"{prefix}exact"] = 100.0 * sum(part.exact.tolist()) / total
        found[f"{prefix}f1"] = 100.0 * sum(part.f1.tolist()) / total
        found[f"{prefix}total"] = total
    return found


def score_intervals(scores: QuestionScores, seed: int = 0) -> dict[str, list[float]]:
    """Return NAME_ci95, [low, high] on 0-100, of each official score: Wilson for PROPORTIONS, else a bootstrap."""
    intervals = {}
    for prefix, part in scores.by_prefix().items():
        for name, values in (("exact", part.exact), ("f1", part.f1)):
            is_proportion = prefix + name in PROPORTIONS
            interval = _wilson(values) if is_proportion else bootstrap_mean_interval(values, seed)
            intervals[f"{prefix}{name}_ci95"] = [100 * bound for bound in interval]
    return intervals


def _wilson(values: np.ndarray) -> Interval:
    """Return the Wilson interval of the share of ones in `values`, [questions] of 0 and 1."""
    return wilson_interval(int(values.sum()), len(values))


def squad_metrics(scores: QuestionScores, seed: int = 0) -> dict[str, float | int | list]:
    """Return the official scores, each with its `_ci95`, and the totals."""
    return official_scores(scores) | score_intervals(scores, seed)


# --- thresholds ---


def best_threshold(
    values: np.ndarray, has_answer: np.ndarray, predicts: np.ndarray, null_scores: np.ndarray
) -> tuple[float, float]:
    """Return the best score on 0-100, and its threshold: a question with a greater null score is answered with "".

    As in the official scorer's search, questions are answered from the lowest null score upward: each one adds the
    score of its answer, or takes away 1 if it has no answer and one is predicted. The threshold is the null score of
    the last question that is answered; 0.0 if answering none is best, although this abstains only for null scores above
    0.

    Args:
        values: exact or f1 of the answers before any threshold, [questions], 0-1.
        has_answer, predicts: whether a question has an answer, and whether one is predicted for it, [questions].
        null_scores: greater where an answer is less likely, [questions].
    """
    reached = _reached(values, has_answer, predicts, null_scores, np.ones(len(values)))
    best = int(np.argmax(reached))
    threshold = float(np.sort(null_scores)[best - 1]) if best else 0.0
    return 100.0 * float(reached[best]) / len(values), threshold


def choose_threshold(
    values: np.ndarray, has_answer: np.ndarray, predicts: np.ndarray, null_scores: np.ndarray, kinds_weigh_same: bool
) -> tuple[float, float]:
    """Return the best score on 0-100, and the threshold that reaches it, for use on other questions.

    Args: as `best_threshold`, and
        kinds_weigh_same: whether questions with and without an answer count half each, their share in SQuAD v2's dev
            and test sets (Rajpurkar et al. 2018, table 2); in a slice of its train split a third or fewer have none.

    Questions with the same null score stay together. The threshold is halfway to the next null score, 1 below all of
    them if answering none is best, and the highest one if answering all is best. Of equal scores, the one that answers
    most questions wins. If every question has an answer, the threshold is ANSWER_ALL: abstaining can only lose.
    """
    ordered = np.sort(null_scores)
    weights = _balancing_weights(has_answer) if kinds_weigh_same else np.ones(len(values))
    reached = _reached(values, has_answer, predicts, null_scores, weights)
    can_end = np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])
    if has_answer.all():
        return 100.0 * float(reached[-1] / weights.sum()), ANSWER_ALL
    best = len(reached) - 1 - int(np.argmax(np.where(can_end, reached, -np.inf)[::-1]))  # the last of equal ones
    below = ordered[best - 1] if best else ordered[0] - 2.0
    above = ordered[best] if best < len(ordered) else ordered[-1]
    return 100.0 * float(reached[best] / weights.sum()), float((below + above) / 2)


def _reached(values, has_answer, predicts, null_scores, weights) -> np.ndarray:
    """Return the weighted sum of scores if the first 0, 1, … questions by null score are answered: [questions + 1].

    The arguments are those of `best_threshold`, and weights, [questions]."""
    order = np.argsort(null_scores, kind="stable")
    gains = (np.where(has_answer, values, np.where(predicts, -1.0, 0.0)) * weights)[order]
    return np.cumsum(np.concatenate([[float(weights[~has_answer].sum())], gains]))


def _balancing_weights(has_answer: np.ndarray) -> np.ndarray:
    """Return integer weights, [questions], that make both kinds count the same; all 1 if there is only one kind."""
    num_with = int(has_answer.sum())
    num_without = len(has_answer) - num_with
    return np.where(has_answer, num_without or 1, num_with or 1).astype(np.float64)


def oracle_scores(
    scores: QuestionScores, questions: Sequence[Question], predictions: Mapping[str, str], null_scores: np.ndarray
) -> dict[str, float]:
    """Return best_exact, best_exact_thresh, best_f1 and best_f1_thresh: the best that a threshold could have reached.

    These thresholds are chosen with the gold answers of the same questions: an oracle, never a result.

    Args:
        scores, predictions: of the answers before any threshold.
    """
    predicts = np.array([bool(predictions[question.id]) for question in questions])
    found = {}
    for name, values in (("exact", scores.exact), ("f1", scores.f1)):
        best, threshold = best_threshold(values, scores.has_answer, predicts, null_scores)
        found |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return found


# --- the breakdown by kinds of questions ---


def question_word(text: str) -> str:
    """Return the first of QUESTION_WORDS in a question, "other" if there is none."""
    words = [_SAME_WORD.get(word, word) for word in text.lower().replace("?", " ").replace(",", " ").split()]
    for word, following in pairwise([*words, ""]):
        if word == "how":
            return "how many" if following in ("many", "much") else "how"
        if word in QUESTION_WORDS:
            return word
    return "other"


def context_length(context: str) -> str:
    """Return which of CONTEXT_LENGTHS a context has."""
    return CONTEXT_LENGTHS[bisect_right(_CONTEXT_BOUNDS, len(context.split()))]


def breakdown(questions: Sequence[Question], scores: QuestionScores) -> dict[str, dict[str, dict]]:
    """Return {"question_word" or "context_length": {group: its official scores, and exact_ci95 (Wilson)}}."""
    kinds = {
        "question_word": (QUESTION_WORDS, [question_word(each.text) for each in questions]),
        "context_length": (CONTEXT_LENGTHS, [context_length(each.paragraph.context) for each in questions]),
    }
    found: dict[str, dict[str, dict]] = {}
    for kind, (order, groups) in kinds.items():
        parts = {group: scores.of(np.array([each == group for each in groups])) for group in order}
        found[kind] = {
            group: official_scores(part) | {"exact_ci95": [100 * bound for bound in _wilson(part.exact)]}
            for group, part in parts.items()
            if len(part.exact)
        }
    return found
