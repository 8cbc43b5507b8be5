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
from zerotune.report.tables import intervals_note, main_scores, scores_block, timings_table
from zerotune.run.process import say
from zerotune.run.run_files import SWEEP_RECORD, check_run_files, read_run_record, read_sweep
from zerotune.settings.names import TASK_NAMES

_MOST_COLUMNS = 6  # evaluations that are a table's columns; if there are more, they are rows


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one task, each tested against the first.

    Attributes:
        names: of the evaluations, all different.
        headline: the score that the paired tests compare, the share of right items.
        pairs, adjusted: for each evaluation but the first, its test and the Holm-adjusted p-value.
        f1_pairs, f1_adjusted: the same for F1; None where items have none.
        spreads: over training seeds, as `evaluations.seed_spreads`.
    """

    names: list[str]
    read: list[Evaluation]
    headline: str
    pairs: list[PairedAccuracy]
    adjusted: list[float]
    f1_pairs: list[PairedMeans | None]
    f1_adjusted: list[float | None]
    spreads: list[dict]

    @property
    def task(self) -> str:
        """The task of all of them."""
        return str(self.read[0].metrics.get("task"))


def evaluation_folders(folder: Path) -> list[Path]:
    """Return the evaluation folders that a given folder means.

    An evaluation means itself; a run, or its final/, means the run's eval/final; a folder of prompt seeds or of runs
    means those of the folders in it.
    """
    if (folder / "predictions.jsonl").exists() or (folder / "metrics.json").exists():
        return [folder]
    run = folder.parent if folder.name == "final" and (folder.parent / "run.json").exists() else folder
    if (run / "eval" / "final").is_dir():
        return [run / "eval" / "final"]
    inside = sorted(folder.iterdir(), key=_by_number) if folder.is_dir() and folder.name != "eval" else []
    if (folder / SWEEP_RECORD).exists():  # other evaluations may be beside the runs
        runs = read_sweep(folder)["runs"]
        inside = [each for each in inside if each.name in runs]
    kinds = ("predictions.jsonl", "eval/final/metrics.json", "summary.json")
    done = [each for each in inside if any((each / kind).exists() for kind in kinds)]
    for each in inside:
        if done and each not in done and (each / "run.json").exists():
            say(f"{each} has no final evaluation yet and is left out")
    return [one for each in done for one in evaluation_folders(each)] or [folder]


def _readable_folders(folder: Path) -> list[Path]:
    """Return the same as `evaluation_folders`. Raises Refused for a path that cannot be looked at."""
    try:
        return evaluation_folders(folder)
    except OSError as error:
        raise Refused(
            f"{str(folder)[:100]} cannot be read ({error.strerror}): name evaluations, runs or folders of them"
        ) from None


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
    folders = [one for folder in folders for one in _readable_folders(Path(folder))]
    read, headline = _read_comparable(folders)
    pairs = [evaluations.paired_accuracy(read[0], other) for other in read[1:]]
    f1_pairs = [evaluations.paired_f1(read[0], other) for other in read[1:]]
    of_f1 = iter(holm_adjusted([f1.p_value for f1 in f1_pairs if f1 is not None]))
    return Comparison(
        names=evaluation_names(folders),
        read=read,
        headline=headline,
        pairs=pairs,
        adjusted=holm_adjusted([pair.p_value for pair in pairs]),
        f1_pairs=f1_pairs,
        f1_adjusted=[None if f1 is None else next(of_f1) for f1 in f1_pairs],
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
    for name, f1, holm in zip(comparison.names[1:], comparison.f1_pairs, comparison.f1_adjusted, strict=True):
        if f1 is not None:
            change = f"F1 {100 * f1.difference:+.2f} {_interval(f1.difference_ci95, '+')}, p = {f1.p_value:.2g}"
            lines.append(f"{name}: {change}{f' (Holm: {holm:.2g})' if adjusted else ''}")
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
    """Return the name of the runs of a spread over seeds, without their seeds: learning_rate-2e-5.

    Runs whose names are only seeds are named after the folder that they are in, or "all runs"."""
    by_folder = {str(one.folder): name for name, one in zip(comparison.names, comparison.read, strict=True)}
    names = {folder: re.sub(r"[_/-]?seed-?\d+$", "", by_folder[folder]) for folder in spread["folders"]}
    if len(names) < len(by_folder):
        names = {folder: name or _folder_around(Path(folder)) for folder, name in names.items()}
    return ", ".join(dict.fromkeys(filter(None, names.values()))) or "all runs"


def _folder_around(evaluation: Path) -> str:
    """Return the name of the folder that an evaluation's run is in: seeds for seeds/seed-0/eval/final."""
    folder = evaluation.resolve()
    return (folder.parents[1] if folder.parent.name == "eval" else folder).parent.name


def _interval(bounds: Sequence[float], sign: str = "") -> str:
    return "[" + ", ".join(f"{100 * bound:{sign}.2f}" for bound in bounds) + "]"


@dataclass(frozen=True)
class _Entry:
    """One evaluation, or all those of a folder of prompt seeds."""

    name: str
    evaluations: list[int]

    @property
    def is_group(self) -> bool:
        return len(self.evaluations) > 1


def _entries(comparison: Comparison) -> list[_Entry]:
    """Return the evaluations in their order, those of a folder of prompt seeds as one entry."""
    folders: dict[Path, list[int]] = {}
    for number, one in enumerate(comparison.read):
        parent = one.folder.parent
        is_prompt = (parent / "summary.json").is_file() and not (parent / SWEEP_RECORD).is_file()
        folders.setdefault(parent if is_prompt else one.folder, []).append(number)
    return [
        _Entry(comparison.names[own[0]] if len(own) == 1 else _name_of_group(comparison.names[own[0]], folder), own)
        for folder, own in folders.items()
    ]


def _name_of_group(name: str, folder: Path) -> str:
    """Return the name of a folder of prompt seeds, given that of an evaluation in it; its own where that has none."""
    return name.rpartition("/")[0] or folder.resolve().name


def _prompt_summaries(comparison: Comparison) -> list[dict]:
    """Return name, number, mean, standard deviation and range of the headline score of each folder of prompt seeds."""
    groups = ((each.name, _values(comparison, each)) for each in _entries(comparison) if each.is_group)
    return [{"name": name, "num": len(values), **_summary(values)} for name, values in groups]


def _values(comparison: Comparison, entry: _Entry) -> list[float]:
    """Return the headline score of each evaluation of an entry."""
    every = (comparison.read[number].metrics for number in entry.evaluations)
    return [evaluations.as_proportions(metrics)[comparison.headline] for metrics in every]


def _summary(values: list[float]) -> dict[str, float]:
    """Return mean, standard deviation (n - 1), low and high."""
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)),
        "low": min(values),
        "high": max(values),
    }


def write_comparison(comparison: Comparison, output_dir: Path) -> Path:
    """Write output_dir/comparison.json and report.html.

    Returns:
        The path of report.html.
    Raises:
        Refused: with nothing written, for an output_dir that holds something else or cannot be written.
    """
    read, names, task = comparison.read, comparison.names, comparison.task
    folders, spreads = [one.folder for one in read], comparison.spreads
    _check_output_dir(output_dir)
    record = {
        "task": task,
        "evaluations": [{"folder": str(one.folder), "metrics": one.metrics} for one in read],
        "paired": [
            {"first": str(folders[0]), "second": str(folder), **asdict(pair), "p_value_holm": holm}
            | ({} if f1 is None else {"f1": asdict(f1) | {"p_value_holm": f1_holm}})
            for folder, pair, holm, f1, f1_holm in zip(
                *(folders[1:], comparison.pairs, comparison.adjusted, comparison.f1_pairs, comparison.f1_adjusted),
                strict=True,
            )
        ],
        "seeds": spreads,
    }
    title = f"{TASK_NAMES.get(task, task)}: {len(read)} evaluations compared"
    sections = [
        html.heading(title, "comparison"),
        html.section("Scores", html.bullets(_sentences(comparison)), *_scores(comparison)),
        _paired_tests(comparison),
        _training_section(folders),
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
    """Return whether each evaluation is shown to differ from the first, and how far the prompts of a folder spread."""
    said = []
    for entry in _entries(comparison):
        if entry.is_group:
            found = _summary(_values(comparison, entry))
            mean, low, high = (html.percent(found[part]) for part in ("mean", "low", "high"))
            num = len(entry.evaluations)
            said.append(f"{entry.name}: {mean} on average over {num} prompts, which give {low} to {high}.")
        elif number := entry.evaluations[0]:
            pair, f1 = comparison.pairs[number - 1], comparison.f1_pairs[number - 1]
            names, score = (comparison.names[number], comparison.names[0]), html.metric_title(comparison.headline)
            said.append(_verdict(*names, score, pair, comparison.adjusted[number - 1]))
            if f1 is not None:
                said.append(_verdict(*names, "F1", f1, comparison.f1_adjusted[number - 1]))
    return said


def _verdict(name: str, first: str, score: str, pair: PairedAccuracy | PairedMeans, p_value: float) -> str:
    """Return whether an evaluation is shown to differ from the first in a score."""
    if p_value >= words.CHANCE:
        return f"{name} is not shown to differ from {first} in {score} ({html.p_value_text(p_value)})."
    points, word = html.change(pair)[0].lstrip("+" + html.MINUS), "above" if pair.difference > 0 else "below"
    return f"{name} is {points} {word} {first} in {score}, more than chance explains ({html.p_value_text(p_value)})."


def _scores(comparison: Comparison) -> list[str]:
    """Return a figure and a table of the scores: a column for each evaluation, or a row if there are many."""
    every = [evaluations.as_proportions(one.metrics) for one in comparison.read]
    if len(every) <= _MOST_COLUMNS:
        columns = [(name, metrics, figures.TUNED) for name, metrics in zip(comparison.names, every, strict=True)]
        return [scores_block(columns, "items", comparison.headline, "by evaluation"), _prompt_table(comparison)]
    entries, headline = _entries(comparison), comparison.headline
    dots, drawn = {}, []
    for row, each in enumerate(entries):
        values, interval = [100 * value for value in _values(comparison, each)], None
        if each.is_group:
            dots[row] = values
        else:
            interval = [100 * bound for bound in every[each.evaluations[0]][f"{headline}_ci95"]]
        drawn.append((each.name, float(np.mean(values)), interval, figures.TUNED))
    title = html.metric_title(headline)
    label = f"{title}, % (pale: each prompt)" if dots else f"{title}, % (95 % interval)"
    figure = figures.intervals(f"{title.capitalize()} by evaluation", label, drawn, dots)
    scores = [name for name in main_scores(every[0]) if any(name in metrics for metrics in every)]
    rows = [
        [name, f"{metrics['count']:,}", *(html.score_cell(metrics, score) for score in scores)]
        for name, metrics in zip(comparison.names, every, strict=True)
    ]
    headers = ["", "items", *map(html.metric_title, scores)]
    table = [html.table(headers, rows), intervals_note("items")]
    if dots:
        table = [html.details(f"All {len(rows)} evaluations", *table)]
    return [f'<div class="wide">{figure}</div>', _prompt_table(comparison), *table]


def _prompt_table(comparison: Comparison) -> str:
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
    return html.table(headers, rows)


def _read_comparable(folders: list[Path]) -> tuple[list[Evaluation], str]:
    """Return the evaluations, and the score that a paired test compares: the share of right items."""
    if len(folders) < 2:
        raise Refused(f"a comparison needs two evaluation folders or more, got {len(folders)}: name the others too")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise Refused("each evaluation folder is compared once, but one is named twice: name it once")
    read = [evaluations.read_evaluation(folder) for folder in folders]
    tasks = sorted({str(one.metrics.get("task")) for one in read})
    if len(tasks) > 1:
        found = " and ".join(tasks)
        raise Refused(
            f"evaluations of different tasks cannot be compared, and these are of {found}: compare each task separately"
        )
    headline = evaluations.headline(read[0].metrics)
    for one in read:
        if evaluations.headline(one.metrics) != headline:
            raise Refused(
                f"the evaluations score differently: {read[0].folder} by {headline} and {one.folder} by "
                f"{evaluations.headline(one.metrics)} (accuracy: one label per text, exact_match: any number): compare "
                "each kind separately"
            )
        if headline not in evaluations.score_names(one.metrics) or not isinstance(one.metrics[headline], int | float):
            found = f"{one.folder}/metrics.json does not"
            raise Refused(f"an evaluation of {tasks[0]} has {headline} with its interval, but {found}: evaluate again")
    return read, headline


def _check_output_dir(folder: Path) -> None:
    """Refuse a folder that holds something other than an earlier comparison."""
    earlier = folder / "comparison.json"
    if earlier.exists() and "evaluations" in read_json(earlier):
        return
    if any((folder / name).exists() for name in ("run.json", "report.html", "comparison.json")):
        raise Refused(f"--output-dir {folder} holds a run or another report: name a folder of its own")


def evaluation_names(folders: Sequence[Path]) -> list[str]:
    """Return a different name for each evaluation: a for runs/a/eval/final, a/base for runs/a/eval/base.

    A name is that of the run or folder; one like seed-0 is preceded by its parent's, and more of the path is added
    until all names differ.
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


def _paired_tests(comparison: Comparison) -> str:
    """Return the tests against the first evaluation; those of a folder's prompts are collapsed."""
    in_groups = {number for each in _entries(comparison) if each.is_group for number in each.evaluations}
    numbers = range(1, len(comparison.read))
    single, grouped = [n for n in numbers if n not in in_groups], [n for n in numbers if n in in_groups]
    parts = _tests(comparison, single) if single else []
    if grouped:
        title = f"Tests of {len(grouped)} prompt{'s' * (len(grouped) > 1)}"
        parts.append(html.details(title, *_tests(comparison, grouped)))
    return html.section("Paired tests", *parts)


def _tests(comparison: Comparison, numbers: list[int]) -> list[str]:
    """Return tables and notes of the tests of these evaluations."""
    score, first, num_tests = comparison.headline, comparison.names[0], len(comparison.pairs)
    headers = [f"against {first}", "common items", score, f"{score} of {first}", "difference", "only this one right"]
    headers += [f"only {first} right", "McNemar"] + (["Holm-adjusted"] if num_tests > 1 else [])
    rows = []
    for number in numbers:
        pair, holm = comparison.pairs[number - 1], comparison.adjusted[number - 1]
        row = [comparison.names[number], f"{pair.num_common:,}"]
        row += [html.percent(pair.accuracy_second), html.percent(pair.accuracy_first), html.change(pair)]
        row += [f"{pair.only_second:,}", f"{pair.only_first:,}", html.p_value_text(pair.p_value)]
        rows.append(row + ([html.p_value_text(holm)] if num_tests > 1 else []))
    note = "Exact two-sided McNemar test on the items that both evaluations scored; Newcombe's paired 95 % intervals."
    if num_tests > 1:
        note += f" Holm's correction for {num_tests} tests."
    parts = [html.table(headers, rows), html.paragraph(note, "note")]
    f1_rows = [
        (
            *(comparison.names[number], html.percent(f1.second), html.percent(f1.first)),
            *(html.change(f1), html.p_value_text(f1.p_value)),
            *([html.p_value_text(comparison.f1_adjusted[number - 1])] if num_tests > 1 else []),
        )
        for number in numbers
        if (f1 := comparison.f1_pairs[number - 1]) is not None
    ]
    if f1_rows:
        headers = [f"against {first}", "F1", f"F1 of {first}", "difference", "randomisation test"]
        headers += ["Holm-adjusted"] if num_tests > 1 else []
        note = "F1 on the same questions: bootstrap interval, two-sided test by random signs of the differences."
        parts += [html.table(headers, f1_rows), html.paragraph(note, "note")]
    return parts


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
    differing = [name for name in names if len({(name in one, json.dumps(one.get(name))) for one in settings}) > 1]
    if differing:
        return f"the evaluations differ in {', '.join(differing)}"
    seeds = [one.metrics.get("seed") for one in read]
    if None in seeds:
        return "the seeds are not known"
    return f"seed {next(seed for number, seed in enumerate(seeds) if seed in seeds[:number])} appears twice"


def _settings_section(names: list[str], read: list[Evaluation]) -> str:
    """Return the settings, a column for each evaluation; if there are many, a row for each, with those that differ."""
    settings = [evaluations.evaluation_settings(one.metrics) for one in read]
    settings = [
        {"folder": str(one.folder), **own, "seed": one.metrics.get("seed")}
        for one, own in zip(read, settings, strict=True)
    ]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    if len(names) <= _MOST_COLUMNS:
        rows = [[key.replace("_", " "), *(html.plain(one.get(key)) for one in settings)] for key in keys]
        return html.section("Settings", html.table(["", *names], rows, num_text_columns=len(names) + 1))
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]
    rows = [[name, *(html.plain(one.get(key)) for key in differing)] for name, one in zip(names, settings, strict=True)]
    headers = ["", *(key.replace("_", " ") for key in differing)]
    same = [[key.replace("_", " "), html.plain(settings[0].get(key))] for key in keys if key not in differing]
    return html.section(
        "Settings",
        html.table(headers, rows, num_text_columns=len(headers)),
        html.details("The same in all", html.table([], same, num_text_columns=2)),
    )
