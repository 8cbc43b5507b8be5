"""What is made of answers to SQuAD's questions: all scores, and who was asked what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from zerotune.metrics import text_overlap
from zerotune.metrics.statistics import wilson_interval
from zerotune.run.process import say
from zerotune.squad import metrics as squad_metrics
from zerotune.squad.metrics import AnswerScores, official_scores, oracle_scores, score_answers
from zerotune.squad.questions import Question

METRIC_NAMES = (*squad_metrics.METRIC_NAMES, *text_overlap.METRIC_NAMES)
QUESTION_WORDS = ("how many", "how", "what", "when", "where", "which", "who", "why", "other")
_SAME_WORD = {"whose": "who", "whom": "who", "what's": "what", "who's": "who"}
CONTEXT_WORDS = (75, 100, 125, 150, 200)


@dataclass(frozen=True)
class Answers:
    """Answers to some questions, in their order.

    Attributes:
        texts: what is answered, "" for no answer.
        before_threshold: of a span head, what would be answered if it always answered; null_odds says how sure it is
            that there is no answer.
        details: what else predictions.jsonl tells of each question, by name.
        measured: what else metrics.json tells of all answers, by name.
    """

    texts: list[str]
    before_threshold: list[str] | None = None
    null_odds: np.ndarray | None = None
    details: dict[str, list] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def by_id(self, questions: Sequence[Question]) -> dict[str, str]:
        """The official form: {question id: answer}."""
        return {question.id: text for question, text in zip(questions, self.texts, strict=True)}


def question_results(
    questions: Sequence[Question], answers: Answers, seed: int = 0
) -> tuple[dict, AnswerScores | None]:
    """Counts and, where the questions have gold answers, all scores: 0-100 with `_ci95`, the oracle's best_* apart.

    Args:
        seed: of the intervals' bootstraps.
    Returns:
        (what metrics.json tells, the score of each question or None without gold answers).
    """
    predictions, scores = answers.by_id(questions), None
    metrics: dict = {"count": len(questions)}
    if questions[0].answers is not None:
        scores = score_answers(questions, predictions)
        metrics |= squad_metrics.squad_metrics(scores, seed) | text_overlap.text_overlap(questions, predictions, seed)
        if answers.before_threshold is not None:
            always = dict(zip(predictions, answers.before_threshold, strict=True))
            metrics |= oracle_scores(score_answers(questions, always), questions, always, answers.null_odds)
    written = [len(text.split()) for text in answers.texts if text]
    metrics |= answers.measured | {
        "num_abstained": len(questions) - len(written),
        "abstention_share": 1 - len(written) / len(questions),
        "mean_answer_words": sum(written) / len(written) if written else None,
    }
    return metrics, scores


# --- who was asked what ---


def question_word(text: str) -> str:
    """The first of QUESTION_WORDS in a question, "other" without one."""
    words = [_SAME_WORD.get(word, word) for word in text.lower().replace("?", " ").replace(",", " ").split()]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "how":
            return "how many" if following in ("many", "much") else "how"
        if word in QUESTION_WORDS:
            return word
    return "other"


def context_length(context: str) -> str:
    """Which of the stretches between CONTEXT_WORDS a context's number of words lies in."""
    num_words, low = len(context.split()), 0
    for high in CONTEXT_WORDS:
        if num_words < high:
            return f"{low}–{high - 1} words"
        low = high
    return f"{low} words or more"


def breakdown(questions: Sequence[Question], scores: AnswerScores) -> dict[str, dict[str, dict]]:
    """{"question_word" or "context_length": {group: official scores of its questions, exact_ci95 by Wilson}}."""
    lengths = {each.paragraph: context_length(each.paragraph.context) for each in questions}
    limits = [f"{low}–{high - 1} words" for low, high in zip((0, *CONTEXT_WORDS), CONTEXT_WORDS, strict=False)]
    limits.append(f"{CONTEXT_WORDS[-1]} words or more")
    return {
        "question_word": _by_group(questions, scores, lambda each: question_word(each.text), QUESTION_WORDS),
        "context_length": _by_group(questions, scores, lambda each: lengths[each.paragraph], limits),
    }


def _by_group(
    questions: Sequence[Question], scores: AnswerScores, group: Callable[[Question], str], order: Sequence[str]
) -> dict[str, dict]:
    of_question, found = np.array([group(each) for each in questions]), {}
    for name in order:
        chosen = of_question == name
        if chosen.any():
            part = AnswerScores(scores.exact[chosen], scores.f1[chosen], scores.has_answer[chosen])
            interval = wilson_interval(int(part.exact.sum()), len(part.exact))
            found[name] = official_scores(part) | {"exact_ci95": [100 * bound for bound in interval]}
    return found


# --- for the terminal ---


def score_line(metrics: dict) -> str:
    """Exact and F1 with their 95 % intervals, for printing; what was done where there were no gold answers."""
    if "exact" not in metrics:
        return f"{metrics['count']:,} predictions (the questions have no gold answers)"
    shown = [f"{name} {metrics[name]:.2f} [{low:.2f}, {high:.2f}]" for name, (low, high) in _intervals(metrics)]
    return f"{', '.join(shown[:2])} on {metrics['count']:,} questions"


def print_scores(metrics: dict) -> None:
    """The table of one evaluation."""
    if "exact" not in metrics:
        say(score_line(metrics))
        return
    say(f"{'':<14}{'score':>9}{'95 % interval':>20}{'questions':>12}")
    for name, (low, high) in _intervals(metrics):
        prefix = name.partition("_")[0] + "_" if name.startswith(("HasAns", "NoAns")) else ""
        total = metrics["HasAns_total" if name in text_overlap.METRIC_NAMES else f"{prefix}total"]
        say(f"{name:<14}{metrics[name]:>9.4f}{f'[{low:.2f}, {high:.2f}]':>20}{total:>12,}")
    if "bleu" in metrics:
        say(text_overlap.COUNTED)
        if "meteor" not in metrics:
            say(text_overlap.NO_WORDNET)
    if "best_f1" in metrics:
        best = [f"{name} {metrics[name]:.2f}" for name in ("best_exact", "best_f1")]
        say(f"oracle, its threshold chosen by these gold answers, no result: {', '.join(best)}")
    share = 100 * metrics.get("NoAns_total", 0) / metrics["total"]
    say(f"{metrics['num_abstained']:,} abstentions; no answer to any question would score {share:.2f} in exact and f1")


def _intervals(metrics: dict) -> list[tuple[str, list[float]]]:
    return [(name, metrics[f"{name}_ci95"]) for name in METRIC_NAMES if name in metrics]
