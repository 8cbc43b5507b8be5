"""Measure how much a score depends on the prompt: the same items with other shots, shot orders and wordings."""

import statistics
from pathlib import Path

from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.evaluation.options import TextEvaluation
from zerotune.files import write_json
from zerotune.metrics.evaluations import EVALUATE_AGAIN, read_metrics
from zerotune.models.pretrained import answers_by_prompt
from zerotune.records import check_record
from zerotune.run.process import is_main_process, say
from zerotune.settings.groups import EvalSettings
from zerotune.tasks.prompts import draw_shots
from zerotune.tasks.split_file import reporting_sha256
from zerotune.tasks.splits import Example

SUMMARISED = ("accuracy", "precision", "recall", "f1", "f1_macro")


class PromptMetrics(TypedDict):
    """The entries, besides scores, that summary.json takes from the metrics.json of each prompt."""

    seed: int
    prompt: str
    label_words: list[str]
    shot_ids: list[str]


def plan_evaluations(
    settings: EvalSettings, task, labelled: list[Example], split_record: dict
) -> dict[Path, TextEvaluation]:
    """Return the evaluations of an eval script by folder: one, or with --prompt-seeds one per prompt.

    Args:
        labelled: examples to draw shots from; [] without --shots.
        split_record: content of the test items' split.json.
    Raises:
        Refused: there are too few examples of a label.
    """
    folder, num_seeds, num_shots = settings.run.output_dir, settings.prompt.seeds, settings.prompt.shots
    folders = [folder] if num_seeds is None else [folder / f"seed-{number}" for number in range(num_seeds)]
    evaluations = {}
    for number, place in enumerate(folders):  # number 0 is the prompt without --prompt-seeds
        seed = settings.seed + number
        evaluations[place] = TextEvaluation(
            model=settings.model,
            text=settings.text,
            prompt=settings.prompt,
            tokens_per_device=settings.tokens_per_device,
            seed=seed,
            shots=draw_shots(labelled, num_shots, task.labels, seed) if num_shots else (),
            wording=number % len(task.wordings),
            data_sha256=reporting_sha256(split_record),
        )
    return evaluations


def check_prompt_seeds(settings: EvalSettings, task, config) -> None:
    """Refuse --prompt-seeds if the prompts would not all differ, or the model takes none."""
    num_seeds = settings.prompt.seeds
    if num_seeds is None:
        return
    if not answers_by_prompt(config):
        raise Refused(
            f"{settings.model.name} answers with a classifier head, which has no use for --prompt-seeds: leave it out"
        )
    if not settings.prompt.shots and num_seeds > len(task.wordings):
        raise Refused(
            f"--prompt-seeds {num_seeds} without --shots: only the wording can vary, and {task.name} has "
            f"{len(task.wordings)} of them: ask for at most that many, or give --shots"
        )


def summarise_seeds(folder: Path, num_seeds: int) -> None:
    """Write and print the summary of a folder's seed-0 …: mean, sample standard deviation and range of the scores."""
    if not is_main_process():
        return
    seeds = [_read_prompt_metrics(folder / f"seed-{number}" / "metrics.json") for number in range(num_seeds)]
    names = [name for prefix in ("", "uncalibrated_") for name in (prefix + each for each in SUMMARISED)]
    summary = {name: spread([one[name] for one in seeds]) for name in names if all(name in one for one in seeds)}
    described = [
        {"seed": one["seed"], "prompt": one["prompt"], "label_words": one["label_words"], "shot_ids": one["shot_ids"]}
        | {name: one[name] for name in summary}
        for one in seeds
    ]
    write_json(folder / "summary.json", {"num_seeds": num_seeds, **summary, "seeds": described})
    if not summary:
        return
    say(f"{'':<24}{'mean':>9}{'sd':>9}{'lowest':>9}{'highest':>9}   over {num_seeds} prompts")
    for name, values in summary.items():
        numbers = (values["mean"], values["sd"], *values["range"])
        shown = "".join(f"{'–' if value is None else format(value, '.4f'):>9}" for value in numbers)
        say(f"{name.replace('_', ' '):<24}{shown}")


def _read_prompt_metrics(path: Path) -> dict:
    return check_record(read_metrics(path), PromptMetrics, path, EVALUATE_AGAIN)


def spread(values: list[float]) -> dict:
    """Return {"mean", "sd": sample standard deviation, None for one value, "range": [lowest, highest]}."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "range": [min(values), max(values)]}
