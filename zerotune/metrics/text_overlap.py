"""BLEU, ROUGE and METEOR of answers, by their own tools: how much wording is shared with the gold answers, 0-100.

They are counted over the questions that have an answer, with all distinct gold answers: BLEU (sacrebleu, corpus level)
takes them as references of one question, ROUGE (rouge-score, F-measure without stemming) and METEOR (nltk, WordNet 3.0)
take the best of them and are means over questions. An abstention is an empty text, which shares nothing. Questions
without an answer do not enter: there is no wording to compare, and NoAns_exact scores them.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from zerotune.metrics.statistics import bootstrap_interval, bootstrap_mean_interval
from zerotune.metrics.wordnet import read_wordnet
from zerotune.squad.metrics import gold_texts
from zerotune.squad.questions import Question

METRIC_NAMES = ("bleu", "rouge1", "rouge2", "rougeL", "meteor")
COUNTED = (
    "BLEU, ROUGE and METEOR count the questions that have an answer, with every distinct gold answer: as references "
    "of BLEU, the best of them for ROUGE and METEOR; an abstention shares nothing. ROUGE-2 of one-word answers is 0, "
    "and BLEU rests on runs of four words, of which short answers have few."
)
NO_WORDNET = "METEOR is left out: it needs WordNet (Debian's package wordnet-base, or nltk.download('wordnet'))"
_ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
_WORDS_AND_SIGNS = re.compile(r"\w+|[^\w\s]")


def text_overlap(
    questions: Sequence[Question], predictions: Mapping[str, str], seed: int = 0
) -> dict[str, float | list[float]]:
    """Each of METRIC_NAMES and its `_ci95`, a percentile bootstrap over questions; {} without answerable questions.

    Without WordNet there is no "meteor"."""
    answerable = [question for question in questions if question.answers]
    if not answerable:
        return {}
    predicted = [predictions[question.id] for question in answerable]
    golds = [gold_texts(question) for question in answerable]
    found = _bleu(predicted, golds, seed)
    for name, values in (_rouge(predicted, golds) | _meteor(predicted, golds)).items():
        found[name] = 100 * float(values.mean())
        found[f"{name}_ci95"] = [100 * bound for bound in bootstrap_mean_interval(values, seed)]
    return found


def _bleu(predicted: list[str], golds: list[list[str]], seed: int) -> dict[str, float | list[float]]:
    """sacrebleu's corpus BLEU (13a tokens, exponential smoothing) from its statistics of each question."""
    from sacrebleu.metrics import BLEU

    bleu, rows = BLEU(effective_order=True), []
    for text, references in zip(predicted, golds, strict=True):
        score = bleu.sentence_score(text, references)
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])

    def corpus_score(sums: np.ndarray) -> float:
        counts, totals, (num_written, num_wanted) = sums[:4].tolist(), sums[4:8].tolist(), sums[8:].tolist()
        return BLEU.compute_bleu(counts, totals, num_written, num_wanted, smooth_method="exp").score

    def corpus_scores(resampled: np.ndarray) -> np.ndarray:
        return np.array([corpus_score(sums) for sums in resampled @ kinds])

    kinds, counts = np.unique(np.array(rows, dtype=np.int64), axis=0, return_counts=True)
    interval = bootstrap_interval(counts, corpus_scores, seed)
    return {"bleu": corpus_score(counts @ kinds), "bleu_ci95": list(interval)}


def _rouge(predicted: list[str], golds: list[list[str]]) -> dict[str, np.ndarray]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer, values = RougeScorer(list(_ROUGE_NAMES)), {name: np.zeros(len(predicted)) for name in _ROUGE_NAMES}
    for row, (text, references) in enumerate(zip(predicted, golds, strict=True)):
        for name, score in scorer.score_multi(references, text).items() if text else ():
            values[name][row] = score.fmeasure
    return values


def _meteor(predicted: list[str], golds: list[list[str]]) -> dict[str, np.ndarray]:
    """{"meteor": [questions]}, {} without WordNet."""
    wordnet = read_wordnet()
    if wordnet is None:
        return {}
    from nltk.translate.meteor_score import meteor_score

    def words(text: str) -> list[str]:
        return _WORDS_AND_SIGNS.findall(text)

    values = [
        meteor_score([words(gold) for gold in references], words(text), wordnet=wordnet) if text else 0.0
        for text, references in zip(predicted, golds, strict=True)
    ]
    return {"meteor": np.array(values)}
