"""Compare several evaluations of one task: report.html for a person, comparison.json for a program."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_json, write_text
from zerotune.metrics.paired import (
    Evaluation,
    Paired,
    as_proportions,
    evaluation_settings,
    is_in_percent,
    paired_comparison,
    paired_f1,
    read_evaluation,
    score_names,
    seed_spreads,
)
from zerotune.metrics.statistics import PairedMeans, holm_adjusted
from zerotune.report import figures
from zerotune.report.curves import curves_of_runs, read_history
from zerotune.report.html import (
    TASK_NAMES,
    interval_text,
    metric_title,
    p_value_text,
    page,
    paragraph,
    percent,
    plain,
    points,
    score_cell,
    section,
    table,
)
from zerotune.report.tables import timings_table


def write_comparison(evaluations: list[Path], output_dir: Path) -> Path:
    """Compare evaluation folders of one task, each with the first; write output_dir/comparison.json and report.html.

    Returns:
        The path of report.html.
    Raises:
        Refused: with nothing written, for fewer than two folders, one folder twice, a folder without labelled
            predictions or metrics, different tasks, folders without common ids, an id with different labels, and an
            output_dir that holds something else or cannot be written.
    """
    folders = [Path(folder) for folder in evaluations]
    if len(folders) < 2:
        raise Refused(f"a comparison needs two evaluation folders or more, got {len(folders)}: name the others too")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise Refused("each evaluation folder is compared once, one is named twice: name it once")
    read = [read_evaluation(folder) for folder in folders]
    tasks = sorted({str(one.metrics.get("task")) for one in read})
    if len(tasks) > 1:
        found = " and ".join(tasks)
        raise Refused(f"a comparison is of one task, the folders hold {found}: compare each task by itself")
    headline = "exact" if is_in_percent(read[0].metrics) else "accuracy"
    for one in read:
        if headline not in score_names(one.metrics) or not isinstance(one.metrics[headline], int | float):
            found = f"{one.folder}/metrics.json does not"
            raise Refused(f"an evaluation of {tasks[0]} has {headline} with its interval, {found}: evaluate again")
    _check_output_dir(output_dir)
    pairs = [paired_comparison(read[0], other) for other in read[1:]]
    f1_pairs = [paired_f1(read[0], other) for other in read[1:]]
    adjusted = holm_adjusted([pair.p_value for pair in pairs])
    spreads = seed_spreads(read)
    record = {
        "task": tasks[0],
        "evaluations": [{"folder": str(one.folder), "metrics": one.metrics} for one in read],
        "paired": [
            {"first": str(folders[0]), "second": str(folder), **asdict(pair), "p_value_holm": holm}
            | ({} if f1 is None else {"f1": asdict(f1)})
            for folder, pair, holm, f1 in zip(folders[1:], pairs, adjusted, f1_pairs, strict=True)
        ],
        "seeds": spreads,
    }
    names = short_names(folders)
    title = f"{TASK_NAMES.get(tasks[0], tasks[0])}: {len(read)} evaluations compared"
    sections = [
        f'<p class="overline">zerotune · comparison</p>\n<h1>{escape(title)}</h1>',
        _compared_scores(names, read, headline),
        _paired_tests(names, headline, pairs, adjusted, f1_pairs),
        _training_section(folders),
        _seed_section(read, spreads),
        _settings_section(names, read),
    ]
    report = output_dir / "report.html"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "comparison.json", record)
        write_text(report, page(title, sections))
    except OSError as error:
        raise Refused(f"--output-dir {output_dir} cannot be written ({error.strerror}): name another folder") from None
    return report


def _check_output_dir(folder: Path) -> None:
    """Refuse a folder that holds something other than an earlier comparison."""
    earlier = folder / "comparison.json"
    if earlier.exists() and "evaluations" in read_json(earlier):
        return
    if any((folder / name).exists() for name in ("run.json", "report.html", "comparison.json")):
        raise Refused(f"--output-dir {folder} holds a run or another report: name a folder of its own")


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the part of each path that differs: a and b for runs/a/eval/final and runs/b/eval/final."""
    parts = [list(folder.resolve().parts) for folder in folders]
    # One part always stays: a folder and its own subfolder still get names.
    for end in (0, -1):
        while min(len(one) for one in parts) > 1 and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]


def _compared_scores(names: list[str], read: list[Evaluation], headline: str) -> str:
    shown = [as_proportions(one.metrics) for one in read]
    columns = list(dict.fromkeys(score for metrics in shown for score in score_names(metrics)))
    rows = [
        [name, f"{len(one.predictions):,}", *(score_cell(metrics, score) for score in columns)]
        for name, one, metrics in zip(names, read, shown, strict=True)
    ]
    dots = [
        (name, 100 * metrics[headline], [100 * bound for bound in metrics[f"{headline}_ci95"]], figures.TUNED)
        for name, metrics in zip(names, shown, strict=True)
    ]
    label = f"{headline}, % (95 % Wilson interval)"
    figure = figures.intervals(f"{metric_title(headline).capitalize()} by evaluation", label, dots)
    note = "95 % intervals: Wilson for proportions, bootstrap over items for F1, macro means, BLEU, ROUGE and METEOR."
    return section(
        "Scores",
        f'<div class="wide">{figure}</div>',
        table(["evaluation", "items", *(metric_title(score) for score in columns)], rows),
        paragraph(note, "note"),
    )


def _paired_tests(
    names: list[str], score: str, pairs: list[Paired], adjusted: list[float], f1_pairs: list[PairedMeans | None]
) -> str:
    first, *others = names
    headers = [f"against {first}", "common items", score, f"{first} there", "difference"]
    headers += ["only this right", f"only {first} right", "McNemar"] + (["Holm-adjusted"] if len(pairs) > 1 else [])
    rows = []
    for name, pair, holm in zip(others, pairs, adjusted, strict=True):
        row = [name, f"{pair.num_common:,}", percent(pair.accuracy_second), percent(pair.accuracy_first)]
        row += [(points(pair.difference), interval_text(pair.difference_ci95, signed=True))]
        row += [f"{pair.only_second:,}", f"{pair.only_first:,}", p_value_text(pair.p_value)]
        rows.append(row + ([p_value_text(holm)] if len(pairs) > 1 else []))
    note = "Exact two-sided McNemar test on the items that both evaluations scored; Newcombe's paired 95 % intervals."
    if len(pairs) > 1:
        note += f" Holm's correction for {len(pairs)} tests."
    parts = [table(headers, rows), paragraph(note, "note")]
    f1_rows = [
        (
            *(name, percent(f1.second), percent(f1.first)),
            *((points(f1.difference), interval_text(f1.difference_ci95, signed=True)), p_value_text(f1.p_value)),
        )
        for name, f1 in zip(others, f1_pairs, strict=True)
        if f1 is not None
    ]
    if f1_rows:
        headers = [f"against {first}", "F1", f"{first} there", "difference", "randomisation test"]
        note = "F1 on the same questions: bootstrap interval, two-sided test by random signs of the differences."
        parts += [table(headers, f1_rows), paragraph(note, "note")]
    return section("Paired tests", *parts)


def _training_section(folders: Sequence[Path]) -> str:
    """Return curves and timings of the runs to which the evaluations belong, "" if there are none."""
    runs = list(dict.fromkeys(folder.resolve().parent.parent for folder in folders))
    runs = [run for run in runs if (run / "metrics.jsonl").exists() and (run / "run.json").exists()]
    if not runs:
        return ""
    names, histories = short_names(runs), [read_history(run) for run in runs]
    timings = timings_table(names, [read_json(run / "run.json") for run in runs], histories)
    return section("Training", timings, curves_of_runs(names, histories))


def _seed_section(read: list[Evaluation], spreads: list[dict]) -> str:
    if not spreads:
        return section("Across seeds", paragraph(f"No mean over seeds: {_why_no_spread(read)}."))
    parts = []
    for spread in spreads:
        rows = [
            [
                metric_title(name),
                f"{100 * spread[name]['mean']:.2f} ± {100 * spread[name]['sd']:.2f} %",
                f"{100 * spread[name]['low']:.2f} – {100 * spread[name]['high']:.2f} %",
                *(f"{100 * value:.2f}" for value in spread[name]["values"]),
            ]
            for name in spread["metrics"]
        ]
        seeds = [f"seed {seed}" for seed in spread["seeds"]]
        model = " · ".join(plain(spread["settings"][key]) for key in ("model", "method") if key in spread["settings"])
        parts += [paragraph(model), table(["", "mean ± standard deviation", "range", *seeds], rows)]
    return section("Across seeds", *parts, paragraph("Standard deviation over seeds with n − 1.", "note"))


def _why_no_spread(read: list[Evaluation]) -> str:
    if not all(one.metrics.get("training_sha256") for one in read):
        return "a model that zerotune has not tuned has no training seed"
    if len({frozenset(one.predictions) for one in read}) > 1:
        return "the evaluations are of different items"
    settings = [evaluation_settings(one.metrics) for one in read]
    names = sorted({name for one in settings for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    return f"the evaluations differ in {', '.join(differing)}" if differing else "the seeds do not differ"


def _settings_section(names: list[str], read: list[Evaluation]) -> str:
    settings = [
        {"folder": str(one.folder), **evaluation_settings(one.metrics), "seed": one.metrics.get("seed")} for one in read
    ]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    rows = [[key.replace("_", " "), *(plain(one.get(key)) for one in settings)] for key in keys]
    return section("Settings", table(["", *names], rows, num_text_columns=len(names) + 1))
