"""Compute BLEU, ROUGE and METEOR with standard tools: how much wording a text shares with its references, 0-100.

With several references, BLEU (sacrebleu, at corpus level) counts them as references of one text; ROUGE (rouge-score,
F-measure without stemming) and METEOR (nltk, WordNet 3.0) take the best of them and are means over texts. An empty text
shares nothing.
"""

import re
from collections.abc import Sequence

import numpy as np

from zerotune.metrics.statistics import bootstrap_interval, bootstrap_mean_interval
from zerotune.metrics.wordnet import read_wordnet

_ROUGE_TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
# The scores' titles by name.
OVERLAP_TITLES = {"bleu": "BLEU", **_ROUGE_TITLES, "meteor": "METEOR"}
_WORDS_AND_SIGNS = re.compile(r"\w+|[^\w\s]")


def overlap_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0
) -> dict[str, float | list[float]]:
    """Return each score of OVERLAP_TITLES with its `_ci95`, a percentile bootstrap over texts; {} without texts.

    Without WordNet there is no "meteor".

    Args:
        texts: [texts]; references: [texts], one or more for each.
    """
    if not texts:
        return {}
    found = _bleu(texts, references, seed)
    for name, values in (_rouge(texts, references) | _meteor(texts, references)).items():
        found[name] = 100 * float(values.mean())
        found[f"{name}_ci95"] = [100 * bound for bound in bootstrap_mean_interval(values, seed)]
    return found


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> dict[str, float | list[float]]:
    """Compute sacrebleu's corpus BLEU (13a tokens, exponential smoothing) from its statistics of each text."""
    from sacrebleu.metrics import BLEU

    bleu, rows = BLEU(effective_order=True), []
    for text, golds in zip(texts, references, strict=True):
        score = bleu.sentence_score(text, golds)
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])

    def corpus_score(sums: np.ndarray) -> float:
        counts, totals, (length, reference_length) = sums[:4].tolist(), sums[4:8].tolist(), sums[8:].tolist()
        return BLEU.compute_bleu(counts, totals, length, reference_length, smooth_method="exp").score

    def corpus_scores(resampled: np.ndarray) -> np.ndarray:
        return np.array([corpus_score(sums) for sums in resampled @ kinds])

    kinds, counts = np.unique(np.array(rows, dtype=np.int64), axis=0, return_counts=True)
    interval = bootstrap_interval(counts, corpus_scores, seed)
    return {"bleu": corpus_score(counts @ kinds), "bleu_ci95": list(interval)}


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer, values = RougeScorer(list(_ROUGE_TITLES)), {name: np.zeros(len(texts)) for name in _ROUGE_TITLES}
    for row, (text, golds) in enumerate(zip(texts, references, strict=True)):
        for name, score in scorer.score_multi(golds, text).items() if text else ():
            values[name][row] = score.fmeasure
    return values


def _meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    wordnet = read_wordnet()
    if wordnet is None:
        return {}
    from nltk.translate.meteor_score import meteor_score

    words = _WORDS_AND_SIGNS.findall
    values = [
        meteor_score([words(gold) for gold in golds], words(text), wordnet=wordnet) if text else 0.0
        for text, golds in zip(texts, references, strict=True)
    ]
    return {"meteor": np.array(values)}
