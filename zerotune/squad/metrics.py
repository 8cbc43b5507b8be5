"""SQuAD v2's scores as the official scorer (evaluate-v2.0.py, Rajpurkar et al. 2018) defines them, 0-100.

A prediction and a gold answer are compared in lower case, without ASCII punctuation, without the words a, an and the,
and with single spaces. `exact` says whether they are equal then; `f1` is that of their bags of words. Of several gold
answers the best one counts. Gold answers of which nothing is left do not count; a question without any has the gold
answer "". A question has an answer (HasAns) where its file gives one, whatever is left of it.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zerotune.metrics.statistics import bootstrap_mean_interval, wilson_interval
from zerotune.squad.questions import Question

METRIC_NAMES = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
# Without an answer to overlap with, F1 is 0 or 1 too: these count questions.
PROPORTIONS = ("exact", "HasAns_exact", "NoAns_exact", "NoAns_f1")

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerScores:
    """Scores of single questions, [questions] each: exact and f1 in 0-1 (float64), has_answer (bool)."""

    exact: np.ndarray
    f1: np.ndarray
    has_answer: np.ndarray


def normalise_answer(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def gold_texts(question: Question) -> list[str]:
    """The distinct gold answers that count, in the order of the file; [""] where there is none."""
    texts = dict.fromkeys(answer.text for answer in question.answers)
    return [text for text in texts if normalise_answer(text)] or [""]


def word_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """F1 of two bags of normalised words; where one of them is empty, whether both are."""
    if not gold or not predicted:
        return float(gold == predicted)
    num_same = sum((Counter(gold) & Counter(predicted)).values())
    if not num_same:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def score_answers(questions: Sequence[Question], predictions: Mapping[str, str]) -> AnswerScores:
    """Scores of each question's prediction ("" for no answer), by question id. A prediction must be there for each."""
    words: dict[str, list[str]] = {}

    def words_of(text: str) -> list[str]:
        found = words.get(text)
        if found is None:
            found = words[text] = normalise_answer(text).split()
        return found

    exact, f1 = np.zeros(len(questions)), np.zeros(len(questions))
    for row, question in enumerate(questions):
        predicted = words_of(predictions[question.id])
        golds = [gold for gold in map(words_of, {answer.text for answer in question.answers}) if gold] or [[]]
        if predicted in golds:
            exact[row] = f1[row] = 1.0
        elif predicted:
            f1[row] = max(word_f1(gold, predicted) for gold in golds)
    return AnswerScores(exact, f1, np.array([bool(question.answers) for question in questions]))


def official_scores(scores: AnswerScores) -> dict[str, float | int]:
    """The official scorer's object: exact, f1, total, and HasAns_*, NoAns_* where there are such questions."""
    found: dict[str, float | int] = {}
    for prefix, chosen in _groups(scores).items():
        total = int(chosen.sum())
        if total:
            # added up one by one, as there: numpy's pairwise sum ends in other digits
            for name, values in (("exact", scores.exact), ("f1", scores.f1)):
                found[prefix + name] = 100.0 * sum(values[chosen].tolist()) / total
            found[f"{prefix}total"] = total
    return found


def _groups(scores: AnswerScores) -> dict[str, np.ndarray]:
    """The questions that a prefix of a score's name means, as [questions] booleans."""
    everything = np.ones_like(scores.has_answer)
    return {"": everything, "HasAns_": scores.has_answer, "NoAns_": ~scores.has_answer}


def score_intervals(scores: AnswerScores, seed: int = 0) -> dict[str, list[float]]:
    """NAME_ci95 of each of METRIC_NAMES that there is: [low, high] on 0-100.

    Wilson for PROPORTIONS, else a percentile bootstrap over questions."""
    intervals = {}
    for prefix, chosen in _groups(scores).items():
        if not chosen.any():
            continue
        for name, values in (("exact", scores.exact[chosen]), ("f1", scores.f1[chosen])):
            if prefix + name in PROPORTIONS:
                interval = wilson_interval(int(values.sum()), len(values))
            else:
                interval = bootstrap_mean_interval(values, seed)
            intervals[f"{prefix}{name}_ci95"] = [100 * bound for bound in interval]
    return intervals


def squad_metrics(scores: AnswerScores, seed: int = 0) -> dict[str, float | int | list]:
    """What metrics.json says of the official scores: each with its `_ci95`, and the totals."""
    official, intervals = official_scores(scores), score_intervals(scores, seed)
    found: dict[str, float | int | list] = {}
    for name in METRIC_NAMES:
        if name in official:
            found[name], found[f"{name}_ci95"] = official[name], intervals[f"{name}_ci95"]
    return found | {name: value for name, value in official.items() if name.endswith("total")}


def best_threshold(
    values: np.ndarray, has_answer: np.ndarray, predicts: np.ndarray, null_scores: np.ndarray
) -> tuple[float, float]:
    """(best score on 0-100, threshold): a question whose null score is greater than it is answered by "".

    Questions are answered from the lowest null score upward, as in the official scorer's search: each one adds what its
    answer scores, or takes away 1 where it has none and one is predicted. The threshold is the last answered question's
    null score; 0.0 where answering none is best, which it then only is at null scores above 0.

    Args:
        values: exact or f1 of the answers as they are before any threshold, [questions], 0-1.
        has_answer, predicts: whether a question has an answer, and whether one is predicted for it, [questions].
        null_scores: greater where an answer is less likely, [questions].
    """
    reached = _reached(values, has_answer, predicts, null_scores, np.ones(len(values)))
    best = int(np.argmax(reached))
    threshold = float(np.sort(null_scores)[best - 1]) if best else 0.0
    return 100.0 * float(reached[best]) / len(values), threshold


def _reached(values, has_answer, predicts, null_scores, weights) -> np.ndarray:
    """Weighted sum of scores when the first 0, 1, … questions by null score are answered and the others are not:
    [questions + 1] of the arguments of `best_threshold` and of weights [questions]."""
    order = np.argsort(null_scores, kind="stable")
    gains = (np.where(has_answer, values, np.where(predicts, -1.0, 0.0)) * weights)[order]
    return np.cumsum(np.concatenate([[float(weights[~has_answer].sum())], gains]))


def _half_each(has_answer: np.ndarray) -> np.ndarray:
    """Whole weights, [questions], with which both kinds count the same; all 1 where there is one kind only."""
    num_with = int(has_answer.sum())
    num_without = len(has_answer) - num_with
    return np.where(has_answer, num_without or 1, num_with or 1).astype(np.float64)


def choose_threshold(
    values: np.ndarray, has_answer: np.ndarray, predicts: np.ndarray, null_scores: np.ndarray
) -> tuple[float, float]:
    """(best score on 0-100, threshold) as `best_threshold` takes its arguments, for use on other questions.

    The score is the mean of those of questions with and without an answer, which count half each, as they stand in
    SQuAD v2's dev and test sets (Rajpurkar et al. 2018, table 2): a slice of train has a third or fewer without.
    Questions of one null score stay together, and the threshold lies halfway to the next null score: below all of them
    by 1 where answering none is best, at the highest one where answering all is. Of equal scores the one that answers
    fewest counts."""
    ordered = np.sort(null_scores)
    weights = _half_each(has_answer)
    reached = _reached(values, has_answer, predicts, null_scores, weights)
    can_end = np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])
    best = int(np.argmax(np.where(can_end, reached, -np.inf)))
    below = ordered[best - 1] if best else ordered[0] - 2.0
    above = ordered[best] if best < len(ordered) else ordered[-1]
    return 100.0 * float(reached[best] / weights.sum()), float((below + above) / 2)


def oracle_scores(
    scores: AnswerScores, questions: Sequence[Question], predictions: Mapping[str, str], null_scores: np.ndarray
) -> dict[str, float]:
    """best_exact, best_exact_thresh, best_f1, best_f1_thresh: the best that a threshold could have reached.

    The threshold is chosen by the gold answers of these very questions. That is an oracle, never a result.

    Args:
        predictions: answers before any threshold, the ones that `scores` are of.
    """
    predicts = np.array([bool(predictions[question.id]) for question in questions])
    found = {}
    for name, values in (("exact", scores.exact), ("f1", scores.f1)):
        best, threshold = best_threshold(values, scores.has_answer, predicts, null_scores)
        found |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return found
