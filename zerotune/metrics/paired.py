"""Finished evaluations read back: what a folder scored, paired tests on common items, spread across training seeds."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.files import read_json_lines
from zerotune.metrics.labels import METRIC_NAMES, UNPARSABLE, confusion_intervals, confusion_matrix, confusion_scores
from zerotune.metrics.statistics import PairedMeans, mcnemar, paired_difference_interval, paired_means
from zerotune.squad import questions as squad
from zerotune.squad import results as squad_results

_MEASURED_PREFIXES = ("count", "num_", "best_", "mean_answer", "uncalibrated_")
_MEASURED_ENDS = ("_ci95", "_s", "total")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder: its metrics.json, and its labelled predictions by id in file order."""

    folder: Path
    metrics: dict
    predictions: dict[str, dict]


@dataclass(frozen=True)
class Paired:
    """Two evaluations on the items that both have; differences are second minus first, in 0-1. Of questions, accuracy
    is the share of exact answers."""

    num_common: int
    accuracy_first: float
    accuracy_second: float
    difference: float
    difference_ci95: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float


def read_evaluation(folder: Path) -> Evaluation:
    """Raises Refused for a folder without labelled predictions or metrics, or whose two files do not match."""
    for name in ("predictions.jsonl", "metrics.json"):
        if not (folder / name).is_file():
            raise Refused(f"an evaluation folder holds {name}, {folder} does not: give one an eval script wrote")
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines = read_json_lines(folder / "predictions.jsonl")
    except ValueError as error:
        raise Refused(f"{folder} holds broken JSON ({error}): evaluate again") from error
    if not isinstance(metrics, dict) or not all(_is_prediction(line) for line in lines):
        raise Refused(f"{folder} holds a metrics.json or predictions.jsonl of another kind: evaluate again")
    labelled = [line for line in lines if line["label"] is not None]
    if not labelled:
        raise Refused(f"a score needs labelled predictions, {folder} has none: evaluate on a labelled file")
    predictions = {line["id"]: line for line in labelled}
    if len(predictions) != len(labelled):
        raise Refused(f"an id counts once, {folder} has {len(labelled) - len(predictions)} twice: evaluate again")
    if metrics.get("count", len(labelled)) != len(labelled):
        found = f"metrics.json counts {metrics['count']} items, predictions.jsonl has {len(labelled):,}"
        raise Refused(f"the files of one evaluation belong together, in {folder} {found}: evaluate again")
    return Evaluation(folder, metrics, predictions)


def _is_prediction(line) -> bool:
    return isinstance(line, dict) and {"id", "label", "prediction"} <= line.keys()


def common_ids(first: Evaluation, second: Evaluation) -> list[str]:
    """The ids that both evaluations scored, in the first one's order. Raises Refused for none or unequal labels."""
    sources = [side.metrics.get("data_sha256") for side in (first, second)]
    if None not in sources and len(set(sources)) > 1:
        raise Refused(
            f"a paired test needs the same items, {first.folder} and {second.folder} are of different data: evaluate "
            "both on the same file"
        )
    common = [identifier for identifier in first.predictions if identifier in second.predictions]
    folders = f"{first.folder} and {second.folder}"
    if not common:
        raise Refused(f"a paired test needs common items, {folders} share no id: evaluate both on the same file")
    for identifier in common:
        labels = first.predictions[identifier]["label"], second.predictions[identifier]["label"]
        if labels[0] != labels[1]:
            found = f"label {identifier} as {labels[0]} and {labels[1]}"
            raise Refused(f"one id means one item, {folders} {found}: evaluate both on the same file")
    return common


def paired_comparison(first: Evaluation, second: Evaluation) -> Paired:
    """Raises Refused as `common_ids` does."""
    common = common_ids(first, second)
    correct_first, correct_second = (
        np.array([is_right(side.predictions[one]) for one in common]) for side in (first, second)
    )
    test = mcnemar(correct_first, correct_second)
    return Paired(
        num_common=len(common),
        accuracy_first=float(correct_first.mean()),
        accuracy_second=float(correct_second.mean()),
        difference=float(correct_second.mean() - correct_first.mean()),
        difference_ci95=paired_difference_interval(correct_first, correct_second),
        only_first=test.b,
        only_second=test.c,
        p_value=test.p_value,
    )


def is_right(line: dict) -> bool:
    """Whether a line of predictions.jsonl is right: of a question, whether it is a gold answer exactly."""
    return line["exact"] == 1 if "exact" in line else line["prediction"] == line["label"]


def paired_f1(first: Evaluation, second: Evaluation) -> PairedMeans | None:
    """F1 (0-1) of answers to the questions that both evaluations have; None where items have no F1 of their own.

    Raises Refused as `common_ids` does."""
    common = common_ids(first, second)
    if "f1" not in first.predictions[common[0]] or "f1" not in second.predictions[common[0]]:
        return None
    return paired_means(*([side.predictions[one]["f1"] for one in common] for side in (first, second)))


def metric_names(metrics: dict) -> tuple[str, ...]:
    """The scores that an evaluation's metrics.json has, in the order of its task."""
    if metrics.get("task") == squad.TASK:
        return tuple(name for name in squad_results.METRIC_NAMES if name in metrics)
    return METRIC_NAMES


def as_proportions(metrics: dict) -> dict:
    """metrics.json with its scores and their intervals in 0-1: those of SQuAD are written as 0-100."""
    if metrics.get("task") != squad.TASK:
        return metrics
    scores = {name: metrics[name] / 100 for name in metric_names(metrics)}
    intervals = {f"{name}_ci95": [bound / 100 for bound in metrics[f"{name}_ci95"]] for name in scores}
    return metrics | scores | intervals


def restricted_metrics(evaluation: Evaluation, other: Evaluation) -> dict:
    """Each score and its `_ci95` over the items that `other` has too. Raises Refused as `common_ids` does."""
    lines = [evaluation.predictions[identifier] for identifier in common_ids(evaluation, other)]
    predictions = [UNPARSABLE if line["prediction"] is None else line["prediction"] for line in lines]
    confusion = confusion_matrix([line["label"] for line in lines], predictions)
    scores = {name: float(score) for name, score in confusion_scores(confusion).items()}
    return {**scores, **confusion_intervals(confusion)}


def settings_of(metrics: dict) -> dict:
    """What metrics.json says of how it was made, without what was measured and without the seed."""
    measured = {*METRIC_NAMES, "confusion", "loss", "seed", "unparsable_share", "tokens_per_device"}
    measured |= {
        *squad_results.METRIC_NAMES,
        "threshold",
        "abstention_share",
        "mean_answer_words",
        "mean_answer_tokens",
        "eos_rate",
    }

    def is_setting(name: str) -> bool:
        return name not in measured and not name.startswith(_MEASURED_PREFIXES) and not name.endswith(_MEASURED_ENDS)

    return {name: value for name, value in metrics.items() if is_setting(name)}


def seed_spreads(evaluations: Sequence[Evaluation]) -> list[dict]:
    """For each group of two or more evaluations of tuned models on the same items, that agree in all settings but have
    different training seeds: the spread.

    A spread: settings, folders, seeds, and per metric name mean, sd (n - 1), low, high (the range) and values.
    """
    groups: dict[str, list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        if evaluation.metrics.get("training_sha256"):
            key = [settings_of(evaluation.metrics), sorted(evaluation.predictions)]
            groups[json.dumps(key, sort_keys=True)].append(evaluation)
    spreads = []
    for members in groups.values():
        seeds = [member.metrics.get("seed") for member in members]
        if len(members) < 2 or None in seeds or len(set(seeds)) < len(seeds):
            continue
        spread = {
            "settings": settings_of(members[0].metrics),
            "folders": [str(member.folder) for member in members],
            "seeds": seeds,
        }
        names = [metric_names(member.metrics) for member in members]
        spread["metrics"] = [name for name in names[0] if all(name in others for others in names)]
        for name in spread["metrics"]:
            values = [as_proportions(member.metrics)[name] for member in members]
            mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
            spread[name] = {"mean": mean, "sd": deviation, "low": min(values), "high": max(values), "values": values}
        spreads.append(spread)
    return spreads
