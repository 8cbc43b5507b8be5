"""Read finished evaluations back: paired tests on the items that two of them share, and the spread over training seeds.

Nothing here depends on the task. A score is an entry of metrics.json that has an interval beside it, NAME_ci95; an item
is a line of predictions.jsonl.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
from annotated_types import Ge, Le, Len
from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.files import nearest_entry, read_json, read_json_lines
from zerotune.metrics.labels import UNCALIBRATED_SCORES
from zerotune.metrics.statistics import (
    PairedMeans,
    mcnemar_p_value,
    paired_counts,
    paired_difference_interval,
    paired_means,
)
from zerotune.records import Count, check_record

# Tasks whose metrics.json has scores on 0-100, as their official tools print them.
TASKS_IN_PERCENT = ("squad",)
# The score that is the share of right items: for labelled texts, texts with any number of labels, and questions.
HEADLINES = ("accuracy", "exact_match", "exact")
# Measured entries of metrics.json besides the scores; all others are settings.
_MEASURED = (
    "confusion", "loss", "seed", "unparsable_share", "tokens_per_device", "threshold", "abstention_share", "eos_rate",
)  # fmt: skip
_MEASURED_PREFIXES = ("count", "num_", "best_", "mean_answer", "uncalibrated_")
_MEASURED_ENDS = ("_ci95", "_s", "total")
_UNCALIBRATED = tuple(f"uncalibrated_{name}" for name in UNCALIBRATED_SCORES)
# A sum of floats may be a little more than 100.
Score = Annotated[float, Ge(0), Le(100.001)]
Share = Annotated[float, Ge(0), Le(1)]
ScoreInterval = Annotated[list[Score], Len(2, 2)]
Correlation = Annotated[float, Ge(-1), Le(1)]
EVALUATE_AGAIN = "delete the file and evaluate again"


class MetricsRecord(TypedDict):
    """metrics.json, without its scores and most settings."""

    count: Count
    setting: str
    task: NotRequired[str]
    seed: NotRequired[int | None]
    training_sha256: NotRequired[str | None]
    data_sha256: NotRequired[str | None]
    confusion: NotRequired[list[list[Count]]]
    num_unparsable: NotRequired[Count]
    num_abstained: NotRequired[Count]
    total: NotRequired[Count]
    NoAns_total: NotRequired[Count]
    threshold: NotRequired[float | None]
    best_exact: NotRequired[Score]
    best_f1: NotRequired[Score]
    abstention_share: NotRequired[float]
    mean_answer_words: NotRequired[float | None]
    eos_rate: NotRequired[float | None]


class Prediction(TypedDict):
    """A line of predictions.jsonl: label and prediction are label numbers, lists of them, or gold answers and a text.

    The label of an unlabelled item is None."""

    id: str
    label: int | list[int] | list[str] | None
    prediction: int | list[int] | str | None
    scores: NotRequired[list[float]]
    exact: NotRequired[Share]
    f1: NotRequired[Share]
    null_odds: NotRequired[float | None]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation folder: its metrics.json, and its labelled predictions by id in the order of the file."""

    folder: Path
    metrics: dict
    predictions: dict[str, dict]


@dataclass(frozen=True)
class PairedAccuracy:
    """Two evaluations on the items that both scored; differences are second minus first, in 0-1.

    Accuracy is the share of right items: for questions that of exact answers, for label sets that of exact matches."""

    num_common: int
    accuracy_first: float
    accuracy_second: float
    difference: float
    difference_ci95: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float


def read_metrics(path: Path) -> dict:
    """Return the content of metrics.json. Raises Refused if it is damaged."""
    metrics = read_json(path, MetricsRecord, EVALUATE_AGAIN)
    intervals = {name: value for name, value in metrics.items() if name.endswith("_ci95")}
    named = [name.removesuffix("_ci95") for name in intervals] + [*HEADLINES, *_UNCALIBRATED]
    scores = {name: metrics[name] for name in named if name in metrics}
    correlations = scores.pop("matthews", 0.0), *(intervals.pop("matthews_ci95", None) or ())
    check_record(list(correlations), list[Correlation], f"{path}, matthews", EVALUATE_AGAIN)
    check_record(scores, dict[str, Score], path, EVALUATE_AGAIN)
    check_record(intervals, dict[str, ScoreInterval | None], path, EVALUATE_AGAIN)
    of_headline = {f"{name}_ci95": metrics.get(f"{name}_ci95") for name in HEADLINES if name in metrics}
    check_record(of_headline, dict[str, ScoreInterval], path, EVALUATE_AGAIN)
    most = 100.001 if is_in_percent(metrics) else 1
    for name, value in scores.items():
        if value > most:
            raise Refused(f"{path} is damaged ({name} is {value}, wanted 0 to {most:.0f}): {EVALUATE_AGAIN}")
    for name, bounds in intervals.items():
        if bounds and not bounds[0] <= bounds[1] <= most:
            raise Refused(f"{path} is damaged ({name} is {bounds}, wanted a low and a high bound): {EVALUATE_AGAIN}")
    return metrics


def read_evaluation(folder: Path, form=Prediction) -> Evaluation:
    """Read an evaluation folder.

    Args:
        form: the form of a line of predictions.jsonl.
    Raises:
        Refused: it lacks labelled predictions or metrics, one of its two files is damaged, or they do not match.
    """
    if not folder.is_dir():
        raise Refused(f"no such folder: {folder}{nearest_entry(folder, Path.is_dir)}; name a run or an evaluation")
    for name in ("predictions.jsonl", "metrics.json"):
        if not (folder / name).is_file():
            raise Refused(f"{folder} holds no {name}, so it is no evaluation: name a folder that an eval script wrote")
    metrics = read_metrics(folder / "metrics.json")
    lines = read_json_lines(folder / "predictions.jsonl", form, EVALUATE_AGAIN)
    labelled = [line for line in lines if line["label"] is not None]
    if not labelled:
        raise Refused(f"a score needs labelled predictions, but {folder} has none: evaluate on a labelled file")
    predictions = {line["id"]: line for line in labelled}
    if len(predictions) != len(labelled):
        raise Refused(f"ids occur twice in {folder} ({len(labelled) - len(predictions)} times): evaluate again")
    if metrics["count"] != len(labelled):
        found = f"metrics.json counts {metrics['count']} items, predictions.jsonl has {len(labelled):,}"
        raise Refused(f"the two files in {folder} do not match ({found}): evaluate again")
    evaluation = Evaluation(folder, metrics, predictions)
    _check_headline(evaluation)
    return evaluation


def _check_headline(evaluation: Evaluation) -> None:
    """Refuse a headline score that differs from the predictions' share of right items."""
    metrics = as_proportions(evaluation.metrics)
    found = float(np.mean([is_right(line) for line in evaluation.predictions.values()]))
    for name in HEADLINES:
        if name in score_names(metrics) and abs(metrics[name] - found) > 1e-6:
            raise Refused(
                f"the two files in {evaluation.folder} do not match (metrics.json has {name} {metrics[name]:.4f}, "
                f"predictions.jsonl gives {found:.4f}): evaluate again"
            )


def common_ids(first: Evaluation, second: Evaluation) -> list[str]:
    """Return the ids that both evaluations scored, in the first one's order.

    Raises:
        Refused: there are none, or the two are of different data or give an id different labels or questions.
    """
    folders = f"{first.folder} and {second.folder}"
    sources = [side.metrics.get("data_sha256") for side in (first, second)]
    have_questions = all("question" in line for side in (first, second) for line in side.predictions.values())
    # ids of questions come from the data, and so may be those of another copy; other ids count a file's rows
    if None not in sources and len(set(sources)) > 1 and not have_questions:
        raise Refused(f"a paired test needs the same items, but {folders} are of different data: evaluate on one file")
    common = [identifier for identifier in first.predictions if identifier in second.predictions]
    if not common:
        raise Refused(f"a paired test needs common items, but {folders} share no id: evaluate both on the same file")
    verbs = {"label": "label"} | ({"question": "ask"} if have_questions else {})
    for identifier in common:
        lines = first.predictions[identifier], second.predictions[identifier]
        for key, verb in verbs.items():
            values = [_in_words(line) if key == "label" else line[key] for line in lines]
            if values[0] != values[1]:
                found = f"{verb} {identifier} as {values[0]!r} and {values[1]!r}"
                raise Refused(f"one id means one item, but {folders} {found}: evaluate both on the same file")
    return common


def _in_words(line: dict):
    """Return the label of an item in words, since two models may number the same labels differently."""
    if names := line.get("label_names"):
        return sorted(names)
    return line.get("label_name", line["label"])


def paired_accuracy(first: Evaluation, second: Evaluation) -> PairedAccuracy:
    """Test whether two models are right equally often. Raises Refused as `common_ids` does."""
    common = common_ids(first, second)
    right_first, right_second = (
        np.array([is_right(side.predictions[one]) for one in common]) for side in (first, second)
    )
    _, only_first, only_second, _ = paired_counts(right_first, right_second)
    return PairedAccuracy(
        num_common=len(common),
        accuracy_first=float(right_first.mean()),
        accuracy_second=float(right_second.mean()),
        difference=float(right_second.mean() - right_first.mean()),
        difference_ci95=paired_difference_interval(right_first, right_second),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_p_value(only_first, only_second),
    )


def is_right(line: dict) -> bool:
    """Return whether a line of predictions.jsonl has the right answer."""
    return line["exact"] == 1 if "exact" in line else line["prediction"] == line["label"]


def paired_f1(first: Evaluation, second: Evaluation) -> PairedMeans | None:
    """Compare the items' own F1 (0-1); None if items have none. Raises Refused as `common_ids` does."""
    common = common_ids(first, second)
    if not all("f1" in side.predictions[one] for side in (first, second) for one in common):
        return None
    return paired_means(*([side.predictions[one]["f1"] for one in common] for side in (first, second)))


def score_names(metrics: dict) -> list[str]:
    """Return the names of the scores in metrics.json, in the order of the file."""
    return [name for name in metrics if f"{name}_ci95" in metrics and not name.startswith("uncalibrated_")]


def headline(metrics: dict) -> str:
    """Return the name of the share of right items, which a paired test compares."""
    if is_in_percent(metrics):
        return "exact"
    return "exact_match" if "exact_match" in metrics else "accuracy"


def is_in_percent(metrics: dict) -> bool:
    """Return whether the scores in metrics.json are on 0-100; else they are in 0-1."""
    return metrics.get("task") in TASKS_IN_PERCENT


def as_proportions(metrics: dict) -> dict:
    """Return metrics.json with its scores and their intervals in 0-1."""
    if not is_in_percent(metrics):
        return metrics
    scores = {name: metrics[name] / 100 for name in score_names(metrics)}
    intervals = {f"{name}_ci95": metrics[f"{name}_ci95"] for name in scores}
    return metrics | scores | {name: each and [bound / 100 for bound in each] for name, each in intervals.items()}


def evaluation_settings(metrics: dict) -> dict:
    """Return the part of metrics.json that says how the evaluation was made, without the seed."""
    measured = {*_MEASURED, *score_names(metrics)}
    return {
        name: value
        for name, value in metrics.items()
        if name not in measured and not name.startswith(_MEASURED_PREFIXES) and not name.endswith(_MEASURED_ENDS)
    }


def seed_spreads(evaluations: Sequence[Evaluation]) -> list[dict]:
    """Return the spread of the scores over training seeds: one per group of tuned models that differ only in the seed.

    A group has equal settings, equal items and distinct seeds. A spread holds settings, folders, seeds, metrics (the
    names of scores), and for each score mean, sd (n - 1), low and high (the range), and values.
    """
    groups: dict[str, list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        if evaluation.metrics.get("training_sha256"):
            key = [evaluation_settings(evaluation.metrics), sorted(evaluation.predictions)]
            groups[json.dumps(key, sort_keys=True)].append(evaluation)
    spreads = []
    for members in groups.values():
        seeds = [member.metrics.get("seed") for member in members]
        if len(members) < 2 or None in seeds or len(set(seeds)) < len(seeds):
            continue
        scores = [as_proportions(member.metrics) for member in members]
        names = [name for name in score_names(scores[0]) if all(name in score_names(others) for others in scores)]
        spread = {
            "settings": evaluation_settings(members[0].metrics),
            "folders": [str(member.folder) for member in members],
            "seeds": seeds,
            "metrics": names,
        }
        for name in names:
            values = [one[name] for one in scores]
            mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
            spread[name] = {"mean": mean, "sd": deviation, "low": min(values), "high": max(values), "values": values}
        spreads.append(spread)
    return spreads
