"""Compare several evaluations of one task: a table, report.html for a person, comparison.json for a program."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.files import read_json, write_json, write_text
from zerotune.metrics import evaluations
from zerotune.metrics.evaluations import Evaluation, PairedAccuracy
from zerotune.metrics.statistics import PairedMeans, holm_adjusted
from zerotune.report import figures, html, words
from zerotune.report.curves import curves_of_runs, read_history
from zerotune.report.tables import scores_block, timings_table
from zerotune.run.run_files import check_run_files, read_run_record
from zerotune.settings.names import TASK_NAMES


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one task, each tested against the first.

    Attributes:
        names: of the evaluations, different from each other.
        headline: the score that the paired tests compare, the share of right items.
        pairs, adjusted, f1_pairs: of each evaluation but the first: the test, its p-value after Holm, and that of F1.
        spreads: over training seeds, as `evaluations.seed_spreads`.
    """

    names: list[str]
    read: list[Evaluation]
    headline: str
    pairs: list[PairedAccuracy]
    adjusted: list[float]
    f1_pairs: list[PairedMeans | None]
    spreads: list[dict]

    @property
    def task(self) -> str:
        """The task of all of them."""
        return str(self.read[0].metrics.get("task"))


def evaluation_folders(folder: Path) -> list[Path]:
    """Return the evaluations that a folder stands for.

    They are itself; of a run, or its final/, the evaluation of final/; of a folder of prompt seeds or of runs, those of
    the folders in it.
    """
    if (folder / "predictions.jsonl").exists() or (folder / "metrics.json").exists():
        return [folder]
    run = folder.parent if folder.name == "final" and (folder.parent / "run.json").exists() else folder
    if (run / "eval" / "final").is_dir():
        return [run / "eval" / "final"]
    inside = sorted(folder.iterdir(), key=_by_number) if folder.is_dir() and folder.name != "eval" else []
    kinds = ("predictions.jsonl", "eval/final")
    return [
        one for each in inside if any((each / kind).exists() for kind in kinds) for one in evaluation_folders(each)
    ] or [folder]


def _by_number(path: Path) -> tuple[str, int]:
    stem = path.name.rstrip("0123456789")
    return stem, int(path.name[len(stem) :] or 0)


def read_comparison(folders: Sequence[Path]) -> Comparison:
    """Read evaluations of one task and test each against the first.

    Args:
        folders: of evaluations, runs, prompt seeds.
    Raises:
        Refused: for fewer than two evaluations, one folder twice, a folder without labelled predictions or metrics,
            different tasks, folders without common ids, and an id with different labels.
    """
    folders = [one for folder in folders for one in evaluation_folders(Path(folder))]
    read, headline = _read_comparable(folders)
    pairs = [evaluations.paired_accuracy(read[0], other) for other in read[1:]]
    return Comparison(
        names=evaluation_names(folders),
        read=read,
        headline=headline,
        pairs=pairs,
        adjusted=holm_adjusted([pair.p_value for pair in pairs]),
        f1_pairs=[evaluations.paired_f1(read[0], other) for other in read[1:]],
        spreads=evaluations.seed_spreads(read),
    )


def comparison_table(comparison: Comparison) -> str:
    """Return a table for the terminal: the headline score of each evaluation, and its difference to the first."""
    score, adjusted = comparison.headline, len(comparison.pairs) > 1
    width = max(len("against the first"), *map(len, comparison.names))
    header = (
        f"{'':<{width}}{score:>13}{'95 % interval':>18}{'items':>9}{'difference':>13}{'95 % interval':>18}{'p':>10}"
    )
    lines = [header + (f"{'p (Holm)':>10}" if adjusted else "")]
    tests = [None, *zip(comparison.pairs, comparison.adjusted, strict=True)]
    for name, one, test in zip(comparison.names, comparison.read, tests, strict=True):
        metrics = evaluations.as_proportions(one.metrics)
        line = f"{name:<{width}}{100 * metrics[score]:>11.2f} %{_interval(metrics[f'{score}_ci95']):>18}"
        line += f"{metrics['count']:>9,}"
        if test is not None:
            pair, holm = test
            line += f"{100 * pair.difference:>+13.2f}{_interval(pair.difference_ci95, '+'):>18}{pair.p_value:>10.2g}"
            line += f"{holm:>10.2g}" if adjusted else ""
        lines.append(line)
    for spread in comparison.spreads:
        found = spread[score]
        mean, deviation = 100 * found["mean"], 100 * found["sd"]
        seeds = f"over {len(spread['seeds'])} training seeds"
        lines.append(f"{_setting_name(comparison, spread)}, {seeds}: {score} {mean:.2f} ± {deviation:.2f} %")
    for summary in _prompt_summaries(comparison):
        mean, deviation = summary["mean"], summary["sd"]
        lines.append(
            f"{summary['name']}, over {summary['num']} prompts: {score} {100 * mean:.2f} ± {100 * deviation:.2f} %"
        )
    return "\n".join(lines)


def _setting_name(comparison: Comparison, spread: dict) -> str:
    """Return what the runs of a spread over seeds are called without their seeds: learning_rate-2e-5."""
    by_folder = {str(one.folder): name for name, one in zip(comparison.names, comparison.read, strict=True)}
    names = [re.sub(r"[_/-]?seed-?\d+$", "", by_folder[folder]) for folder in spread["folders"]]
    return ", ".join(dict.fromkeys(filter(None, names))) or "all runs"


def _interval(bounds: Sequence[float], sign: str = "") -> str:
    return "[" + ", ".join(f"{100 * bound:{sign}.2f}" for bound in bounds) + "]"


def _prompt_summaries(comparison: Comparison) -> list[dict]:
    """Return name, number, mean and standard deviation of the headline score of each folder of prompt seeds."""
    groups: dict[Path, list[float]] = {}
    for one in comparison.read:
        if (one.folder.parent / "summary.json").is_file():
            score = evaluations.as_proportions(one.metrics)[comparison.headline]
            groups.setdefault(one.folder.parent, []).append(score)
    return [
        {
            "name": folder.resolve().name,
            "num": len(values),
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)),
            "low": min(values),
            "high": max(values),
        }
        for folder, values in groups.items()
        if len(values) > 1
    ]


def write_comparison(comparison: Comparison, output_dir: Path) -> Path:
    """Write output_dir/comparison.json and report.html.

    Returns:
        The path of report.html.
    Raises:
        Refused: with nothing written, for an output_dir that holds something else or cannot be written.
    """
    read, names, headline, task = comparison.read, comparison.names, comparison.headline, comparison.task
    folders, spreads = [one.folder for one in read], comparison.spreads
    _check_output_dir(output_dir)
    record = {
        "task": task,
        "evaluations": [{"folder": str(one.folder), "metrics": one.metrics} for one in read],
        "paired": [
            {"first": str(folders[0]), "second": str(folder), **asdict(pair), "p_value_holm": holm}
            | ({} if f1 is None else {"f1": asdict(f1)})
            for folder, pair, holm, f1 in zip(
                folders[1:], comparison.pairs, comparison.adjusted, comparison.f1_pairs, strict=True
            )
        ],
        "seeds": spreads,
    }
    columns = [
        (name, evaluations.as_proportions(one.metrics), figures.TUNED) for name, one in zip(names, read, strict=True)
    ]
    title = f"{TASK_NAMES.get(task, task)}: {len(read)} evaluations compared"
    sections = [
        html.heading(title, "comparison"),
        html.section(
            "Scores", html.bullets(_sentences(comparison)), scores_block(columns, "items", headline, "by evaluation")
        ),
        _paired_tests(names, headline, comparison.pairs, comparison.adjusted, comparison.f1_pairs),
        _training_section(folders),
        _prompt_section(comparison),
        _seed_section(comparison),
        _settings_section(names, read),
    ]
    report = output_dir / "report.html"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "comparison.json", record)
        write_text(report, html.page(title, sections))
    except OSError as error:
        raise Refused(f"--output-dir {output_dir} cannot be written ({error.strerror}): name another folder") from None
    return report


def _sentences(comparison: Comparison) -> list[str]:
    """Return of each evaluation but the first whether it is shown to differ from the first."""
    first, *others = comparison.names
    said = []
    for name, pair, p_value in zip(others, comparison.pairs, comparison.adjusted, strict=True):
        points = html.change(pair)[0].lstrip("+" + html.MINUS)
        if p_value < words.CHANCE:
            word = "above" if pair.difference > 0 else "below"
            said.append(f"{name} is {points} {word} {first}, more than chance explains ({html.p_value_text(p_value)}).")
        else:
            said.append(f"{name} is not shown to differ from {first} ({html.p_value_text(p_value)}).")
    return said


def _prompt_section(comparison: Comparison) -> str:
    summaries = _prompt_summaries(comparison)
    if not summaries:
        return ""
    rows = [
        [
            one["name"],
            str(one["num"]),
            f"{100 * one['mean']:.2f} ± {100 * one['sd']:.2f} %",
            f"{100 * one['low']:.2f} – {100 * one['high']:.2f} %",
        ]
        for one in summaries
    ]
    headers = ["", "prompts", f"{html.metric_title(comparison.headline)}, mean ± standard deviation", "range"]
    return html.section("Across prompts", html.table(headers, rows))


def _read_comparable(folders: list[Path]) -> tuple[list[Evaluation], str]:
    """Return the evaluations, and the score that a paired test compares: the share of right items."""
    if len(folders) < 2:
        raise Refused(f"a comparison needs two evaluation folders or more, got {len(folders)}: name the others too")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise Refused("each evaluation folder is compared once, one is named twice: name it once")
    read = [evaluations.read_evaluation(folder) for folder in folders]
    tasks = sorted({str(one.metrics.get("task")) for one in read})
    if len(tasks) > 1:
        found = " and ".join(tasks)
        raise Refused(f"a comparison is of one task, the folders hold {found}: compare each task by itself")
    headline = evaluations.headline(read[0].metrics)
    for one in read:
        if headline not in evaluations.score_names(one.metrics) or not isinstance(one.metrics[headline], int | float):
            found = f"{one.folder}/metrics.json does not"
            raise Refused(f"an evaluation of {tasks[0]} has {headline} with its interval, {found}: evaluate again")
    return read, headline


def _check_output_dir(folder: Path) -> None:
    """Refuse a folder that holds something other than an earlier comparison."""
    earlier = folder / "comparison.json"
    if earlier.exists() and "evaluations" in read_json(earlier):
        return
    if any((folder / name).exists() for name in ("run.json", "report.html", "comparison.json")):
        raise Refused(f"--output-dir {folder} holds a run or another report: name a folder of its own")


def evaluation_names(folders: Sequence[Path]) -> list[str]:
    """Return different names of evaluations: runs/a for runs/a/eval/final, runs/a/base for its eval/base.

    They have the run's name, or of a folder like seed-0 the one around it too, and as much more of the path as it takes
    to tell them apart.
    """
    parts = []
    for folder in folders:
        *around, last = folder.resolve().parts
        named = [last]
        if around[-1:] == ["eval"] and len(around) > 1:
            named = [around[-2]] if last == "final" else [around[-2], last]
            around = around[:-2]
        elif re.fullmatch(r"(seed-?)?\d+|final|base", last) and around:
            named, around = [around[-1], last], around[:-1]
        parts.append((around, named))
    names = []
    for size in range(max(len(around) for around, _ in parts) + 1):
        names = ["/".join([*around[max(0, len(around) - size) :], *named]) for around, named in parts]
        if len(set(names)) == len(names):
            break
    return names


def _paired_tests(
    names: list[str], score: str, pairs: list[PairedAccuracy], adjusted: list[float], f1_pairs: list[PairedMeans | None]
) -> str:
    first, *others = names
    headers = [f"against {first}", "common items", score, f"{score} of {first}", "difference", "only this one right"]
    headers += [f"only {first} right", "McNemar"] + (["Holm-adjusted"] if len(pairs) > 1 else [])
    rows = []
    for name, pair, holm in zip(others, pairs, adjusted, strict=True):
        row = [name, f"{pair.num_common:,}", html.percent(pair.accuracy_second), html.percent(pair.accuracy_first)]
        row += [html.change(pair)]
        row += [f"{pair.only_second:,}", f"{pair.only_first:,}", html.p_value_text(pair.p_value)]
        rows.append(row + ([html.p_value_text(holm)] if len(pairs) > 1 else []))
    note = "Exact two-sided McNemar test on the items that both evaluations scored; Newcombe's paired 95 % intervals."
    if len(pairs) > 1:
        note += f" Holm's correction for {len(pairs)} tests."
    parts = [html.table(headers, rows), html.paragraph(note, "note")]
    f1_rows = [
        (
            *(name, html.percent(f1.second), html.percent(f1.first)),
            *(html.change(f1), html.p_value_text(f1.p_value)),
        )
        for name, f1 in zip(others, f1_pairs, strict=True)
        if f1 is not None
    ]
    if f1_rows:
        headers = [f"against {first}", "F1", f"F1 of {first}", "difference", "randomisation test"]
        note = "F1 on the same questions: bootstrap interval, two-sided test by random signs of the differences."
        parts += [html.table(headers, f1_rows), html.paragraph(note, "note")]
    return html.section("Paired tests", *parts)


def _training_section(folders: Sequence[Path]) -> str:
    """Return curves and timings of the runs to which the evaluations belong, "" if there are none."""
    runs = list(dict.fromkeys(folder.resolve().parent.parent for folder in folders))
    runs = [run for run in runs if (run / "metrics.jsonl").exists() and (run / "run.json").exists()]
    if not runs:
        return ""
    for run in runs:
        check_run_files(run)
    names, histories = evaluation_names(runs), [read_history(run) for run in runs]
    timings = timings_table(names, [read_run_record(run / "run.json") for run in runs], histories)
    return html.section("Training", timings, curves_of_runs(names, histories))


def _seed_section(comparison: Comparison) -> str:
    if not comparison.spreads:
        return html.section("Across seeds", html.paragraph(f"No mean over seeds: {_why_no_spread(comparison.read)}."))
    parts = []
    for spread in comparison.spreads:
        rows = []
        for name in spread["metrics"]:
            scale, digits, unit = (1, 4, "") if name in html.NO_SHARES else (100, 2, " %")
            values = [f"{scale * value:.{digits}f}" for value in spread[name]["values"]]
            mean, deviation, low, high = (
                f"{scale * spread[name][part]:.{digits}f}" for part in ("mean", "sd", "low", "high")
            )
            found = (f"{mean} ± {deviation}{unit}", f"{low} – {high}{unit}")
            rows.append([html.metric_title(name), *found, *values])
        seeds = [f"seed {seed}" for seed in spread["seeds"]]
        model = [html.plain(spread["settings"][key]) for key in ("model", "method") if key in spread["settings"]]
        model = [_setting_name(comparison, spread), *model]
        table = html.table(["", "mean ± standard deviation", "range", *seeds], rows)
        parts += [html.paragraph(" · ".join(model)), table]
    return html.section("Across seeds", *parts, html.paragraph("Standard deviation over seeds with n − 1.", "note"))


def _why_no_spread(read: list[Evaluation]) -> str:
    if not all(one.metrics.get("training_sha256") for one in read):
        return "a model that zerotune has not tuned has no training seed"
    if len({frozenset(one.predictions) for one in read}) > 1:
        return "the evaluations are of different items"
    settings = [evaluations.evaluation_settings(one.metrics) for one in read]
    names = sorted({name for one in settings for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    return f"the evaluations differ in {', '.join(differing)}" if differing else "the seeds do not differ"


def _settings_section(names: list[str], read: list[Evaluation]) -> str:
    settings = [evaluations.evaluation_settings(one.metrics) for one in read]
    settings = [
        {"folder": str(one.folder), **own, "seed": one.metrics.get("seed")}
        for one, own in zip(read, settings, strict=True)
    ]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    rows = [[key.replace("_", " "), *(html.plain(one.get(key)) for one in settings)] for key in keys]
    return html.section("Settings", html.table(["", *names], rows, num_text_columns=len(names) + 1))
