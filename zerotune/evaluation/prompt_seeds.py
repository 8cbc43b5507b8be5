"""What a prompt's accidents do to a score: the same items with other shots, in another order, in other words."""

import statistics
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_json
from zerotune.run.process import say

SUMMARISED = ("accuracy", "precision", "recall", "f1")


def check_count(args, task, by_prompt: bool) -> None:
    """Raises Refused for --prompt-seeds that nothing would vary with."""
    if not by_prompt:
        raise Refused(f"{args.model} answers with a classifier head, which has no use for --prompt-seeds: leave it out")
    if not args.shots and args.prompt_seeds > len(task.WORDINGS):
        raise Refused(
            f"--prompt-seeds {args.prompt_seeds} without --shots: only the wording can vary, and {task.TASK} has "
            f"{len(task.WORDINGS)} of them: ask for at most so many, or give --shots"
        )


def write_summary(folder: Path, num_seeds: int) -> None:
    """Write summary.json of a folder's seed-0 … and print it: mean, sample standard deviation and range of scores."""
    seeds = [read_json(folder / f"seed-{number}" / "metrics.json") for number in range(num_seeds)]
    names = [name for prefix in ("", "uncalibrated_") for name in (prefix + each for each in SUMMARISED)]
    summary = {name: spread([one[name] for one in seeds]) for name in names if name in seeds[0]}
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


def spread(values: list[float]) -> dict:
    """{"mean", "sd": sample standard deviation, None for one value, "range": [lowest, highest]}."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "range": [min(values), max(values)]}
