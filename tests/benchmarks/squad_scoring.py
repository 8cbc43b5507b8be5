"""Time the scoring of every question of SQuAD v2's dev set, against a plain loop over questions in the same run.

    python tests/benchmarks/squad_scoring.py --test-file dev-v2.0.json

Predictions are drawn by seed: a gold answer, nothing, or words of the paragraph. Both sides must give the same digits.
"""

import argparse
import random
import re
import string
import time
from collections import Counter
from pathlib import Path

from zerotune.metrics.text_overlap import overlap_scores
from zerotune.squad.files import read_questions
from zerotune.squad.metrics import gold_texts, official_scores, score_answers, squad_metrics
from zerotune.squad.questions import Question

ROUNDS = 5


def drawn_predictions(questions: list[Question], seed: int = 0) -> dict[str, str]:
    rng, predictions = random.Random(seed), {}
    for question in questions:
        words = question.paragraph.context.split()
        start = rng.randrange(len(words))
        some = " ".join(words[start : start + rng.randint(1, 8)])
        gold = rng.choice(question.answers).text if question.answers else ""
        predictions[question.id] = rng.choice([gold, gold, f"{some} {gold}".strip(), some, ""])
    return predictions


def plain_words(text: str) -> list[str]:
    punctuation = set(string.punctuation)
    kept = "".join(sign for sign in text.lower() if sign not in punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def plain_f1(gold: list[str], predicted: list[str]) -> float:
    if not gold or not predicted:
        return float(gold == predicted)
    same = sum((Counter(gold) & Counter(predicted)).values())
    return 2 * (same / len(predicted)) * (same / len(gold)) / (same / len(predicted) + same / len(gold)) if same else 0


def plain_scores(questions: list[Question], predictions: dict[str, str]) -> tuple[float, float]:
    """Compute exact and f1 in a loop that normalises every gold answer and prediction each time it needs them."""
    exact, f1 = [], []
    for question in questions:
        golds = [answer.text for answer in question.answers if plain_words(answer.text)] or [""]
        text = predictions[question.id]
        exact.append(max(float(plain_words(gold) == plain_words(text)) for gold in golds))
        f1.append(max(plain_f1(plain_words(gold), plain_words(text)) for gold in golds))
    return 100.0 * sum(exact) / len(exact), 100.0 * sum(f1) / len(f1)


def seconds(work) -> tuple[float, object]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def main(args: argparse.Namespace) -> None:
    questions, _ = read_questions(args.test_file)
    predictions = drawn_predictions(questions)
    print(f"{len(questions):,} questions, {sum(len(each.answers) for each in questions):,} gold answers")
    for number in range(ROUNDS):
        ours, scores = seconds(lambda: score_answers(questions, predictions))
        with_intervals, _ = seconds(lambda scores=scores: squad_metrics(scores))
        plain, (exact, f1) = seconds(lambda: plain_scores(questions, predictions))
        official = official_scores(scores)
        assert (official["exact"], official["f1"]) == (exact, f1), (official, exact, f1)
        print(
            f"round {number}: scores {ours:.3f} s, intervals {with_intervals:.3f} s more; a plain loop {plain:.3f} s: "
            f"{plain / ours:.1f} × as long as the scores, {plain / (ours + with_intervals):.1f} × with intervals"
        )
    answerable = [each for each in questions if each.answers]
    texts, golds = [predictions[each.id] for each in answerable], [gold_texts(each) for each in answerable]
    overlap, _ = seconds(lambda: overlap_scores(texts, golds))
    print(f"BLEU, ROUGE and METEOR with intervals: {overlap:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test-file", type=Path, required=True, help="json in SQuAD's format with answers; also .gz")
    main(parser.parse_args())
