"""Show an evaluation's single items: right answers by length, calibration, errors beside right answers."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from zerotune.errors import counted
from zerotune.evaluation.result_files import shortened
from zerotune.metrics.calibration import NUM_BINS, expected_calibration_error, reliability_bins
from zerotune.metrics.evaluations import Evaluation, is_right
from zerotune.metrics.statistics import wilson_interval
from zerotune.report import figures, html

NUM_EXAMPLES, MOST_CHARACTERS = 10, 700
NUM_LENGTHS = 4
WELL_CALIBRATED, MUCH_TOO_UNSURE = 0.02, 0.2
MUCH_UNDER = (
    " Probabilities this far below the share of right answers mean that the logits are still small: usually few steps, "
    "a low learning rate or --label-smoothing."
)
DRAWN_ITEM = re.compile(r"· train-\d+$")  # the id of a test item that was drawn from the training rows
NO_TEXT = "(the text is not available)"


def length_section(evaluations: Mapping[str, Evaluation], score: str) -> str:
    """Return the share of right items by quarters of the items' lengths, "" without lengths.

    Args:
        evaluations: by name; the quarters are those of the last one's items.
        score: name of the share.
    """
    lines = {name: list(one.predictions.values()) for name, one in evaluations.items()}
    every = list(lines.values())[-1] if lines else []
    if not every or any("num_words" not in line for found in lines.values() for line in found):
        return ""
    cuts = np.quantile([line["num_words"] for line in every], np.arange(1, NUM_LENGTHS) / NUM_LENGTHS)
    bounds = [*sorted({int(cut) for cut in cuts}), max(line["num_words"] for line in every)]
    bounds, low, rows, intervals = sorted(set(bounds)), 0, [], []
    shortest = min(line["num_words"] for line in every)
    for high in bounds:
        cells = []
        for found in lines.values():
            right = [is_right(line) for line in found if low <= line["num_words"] <= high]
            interval = wilson_interval(sum(right), len(right))
            shown = html.percent(sum(right) / len(right)) if right else "–"
            cells.append((shown, f"{html.interval_text(interval)} of {len(right):,}" if right else "no items"))
        intervals.append(interval)
        words = f"{low:,} to {high:,} words" if low else f"up to {counted(high, 'word')}"
        if high in (low, shortest):
            words = counted(high, "word")
        rows.append([words, *cells])
        low = high + 1
    first, last = intervals[0], intervals[-1]
    said = f"No difference between short and long texts is shown: {score} may be the same on both."
    if first and last and (first[0] > last[1] or first[1] < last[0]):
        said = (
            f"{score.capitalize()} is {'lower' if first[0] > last[1] else 'higher'} on long texts than on short ones."
        )
    parts = "A quarter of the items each" if len(rows) == NUM_LENGTHS else "Parts of the items"
    note = f"{parts}, by words of the whole text; {score} with its Wilson interval."
    table = html.table(["length", *lines], rows)
    return html.section("By length", html.paragraph(said) if len(rows) > 1 else "", table, html.paragraph(note, "note"))


# the decisions about an item: the probability of each, and whether it is right
Decisions = Sequence[tuple[float, bool]]


def answer(line: dict) -> Decisions | None:
    """Return the probability of an item's predicted label, and whether it is right; None without scores."""
    if not line.get("scores") or line["prediction"] is None:
        return None
    return [(math.exp(line["scores"][line["prediction"]]), is_right(line))]


def calibration_section(
    evaluations: Mapping[str, Evaluation],
    decisions: Callable[[dict], Decisions | None] = answer,
    plural: str = "answers",
) -> str:
    """Return the reliability diagram and the calibration errors of models that give their decisions a probability.

    Args:
        evaluations: by name; one with any item that lacks probabilities is left out.
        decisions: a line of predictions.jsonl -> the decisions about its item, None without probabilities.
        plural: the name of the decisions, in the plural.
    """
    named, sentences = [], []
    colours = (figures.BASE, figures.TUNED)[-len(evaluations) :]
    for (name, one), colour in zip(evaluations.items(), colours, strict=False):
        decided = [decisions(line) for line in one.predictions.values()]
        if not decided or None in decided:
            continue
        sure, right = zip(*itertools.chain.from_iterable(decided), strict=True)
        bins = reliability_bins(sure, right)
        mean, share, error = float(np.mean(sure)), float(np.mean(right)), expected_calibration_error(bins)
        named.append((name, bins, colour))
        judged = "over-confident" if mean > share else "under-confident"
        if error < WELL_CALIBRATED:
            judged = "about as sure as it is right"
        elif abs(mean - share) < error / 2:
            judged = f"too sure of some {plural} and not sure enough of others"
        sentences.append(
            f"{name}: {judged}. Its {plural} have a mean probability of {html.percent(mean)}, and "
            f"{html.percent(share)} are right; ECE {html.percent(error)}."
            + (MUCH_UNDER if share - mean > MUCH_TOO_UNSURE else "")
        )
    if not named:
        return ""
    note = (
        f"The expected calibration error (Guo et al. 2017, arXiv:1706.04599) is the mean distance of accuracy from "
        f"probability over {NUM_BINS} bins of equal width, weighted by how many {plural} they hold. Points below the "
        "diagonal are too sure. Bars are Wilson intervals."
    )
    figure = f'<div class="wide">{figures.reliability("Reliability diagram", named)}</div>'
    return html.section("Calibration", html.bullets(sentences), figure, html.paragraph(note, "note"))


def examples_section(
    count: str, how: str, wrong: Sequence[dict], right: Sequence[dict], example: Callable[[dict], tuple[str, ...]]
) -> str:
    """Return errors beside right answers: the first of the wrong ones, the first and the last of the right ones.

    Args:
        count: a sentence that says how many items are wrong, and which {shown} are shown.
        how: a sentence that says which right answers are shown.
        wrong, right: lines of predictions.jsonl, in order.
        example: a line -> one of the texts of `html.example_list`.
    """
    errors, right = [example(line) for line in wrong[:NUM_EXAMPLES]], [example(line) for line in both_ends(right)]
    count = count.format(shown=len(errors))
    if any(DRAWN_ITEM.search(head) for head, *_ in (*errors, *right)):
        count += " An id such as train-12 names the row that an item was drawn from; it was not trained on."
    left = f"<h3>Errors</h3>{html.paragraph(count)}{html.example_list(errors)}"
    other = f"<h3>Right answers</h3>{html.paragraph(how)}{html.example_list(right)}"
    return html.section("Errors and right answers", html.beside(left, other if right else ""))


def surest(lines: Sequence[dict], probability) -> list[dict]:
    """Return lines by falling probability, equal ones by id."""
    return sorted(lines, key=lambda line: (-probability(line), line["id"]))


def both_ends(lines: Sequence) -> Sequence:
    """Return the first and the last of a sorted list, NUM_EXAMPLES together."""
    num = NUM_EXAMPLES
    return lines if len(lines) <= num else lines[: num - num // 2] + lines[-(num // 2) :]


def text_of(line: dict) -> str:
    return shortened(line.get("text") or NO_TEXT, MOST_CHARACTERS)
