"""Compare several evaluations of one task: report.html for a person, comparison.json for a program."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_json, write_text
from zerotune.metrics import evaluations
from zerotune.metrics.evaluations import Evaluation, PairedAccuracy
from zerotune.metrics.statistics import PairedMeans, holm_adjusted
from zerotune.report import figures, html
from zerotune.report.curves import curves_of_runs, read_history
from zerotune.report.tables import scores_block, timings_table
from zerotune.run.run_files import check_run_files, read_run_record


def write_comparison(folders: Sequence[Path], output_dir: Path) -> Path:
    """Compare evaluation folders of one task, each with the first; write output_dir/comparison.json and report.html.

    Returns:
        The path of report.html.
    Raises:
        Refused: with nothing written, for fewer than two folders, one folder twice, a folder without labelled
            predictions or metrics, different tasks, folders without common ids, an id with different labels, and an
            output_dir that holds something else or cannot be written.
    """
    folders = [Path(folder) for folder in folders]
    read, headline = _read_comparable(folders)
    task = str(read[0].metrics.get("task"))
    _check_output_dir(output_dir)
    pairs = [evaluations.paired_accuracy(read[0], other) for other in read[1:]]
    f1_pairs = [evaluations.paired_f1(read[0], other) for other in read[1:]]
    adjusted = holm_adjusted([pair.p_value for pair in pairs])
    spreads = evaluations.seed_spreads(read)
    record = {
        "task": task,
        "evaluations": [{"folder": str(one.folder), "metrics": one.metrics} for one in read],
        "paired": [
            {"first": str(folders[0]), "second": str(folder), **asdict(pair), "p_value_holm": holm}
            | ({} if f1 is None else {"f1": asdict(f1)})
            for folder, pair, holm, f1 in zip(folders[1:], pairs, adjusted, f1_pairs, strict=True)
        ],
        "seeds": spreads,
    }
    names = short_names(folders)
    columns = [
        (name, evaluations.as_proportions(one.metrics), figures.TUNED) for name, one in zip(names, read, strict=True)
    ]
    title = f"{html.TASK_NAMES.get(task, task)}: {len(read)} evaluations compared"
    sections = [
        html.heading(title, "comparison"),
        html.section("Scores", scores_block(columns, "items", headline, "by evaluation")),
        _paired_tests(names, headline, pairs, adjusted, f1_pairs),
        _training_section(folders),
        _seed_section(read, spreads),
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


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the part of each path that differs: a and b for runs/a/eval/final and runs/b/eval/final."""
    parts = [list(folder.resolve().parts) for folder in folders]
    # One part always stays: a folder and its own subfolder still get names.
    for end in (0, -1):
        while min(len(one) for one in parts) > 1 and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]


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
    names, histories = short_names(runs), [read_history(run) for run in runs]
    timings = timings_table(names, [read_run_record(run / "run.json") for run in runs], histories)
    return html.section("Training", timings, curves_of_runs(names, histories))


def _seed_section(read: list[Evaluation], spreads: list[dict]) -> str:
    if not spreads:
        return html.section("Across seeds", html.paragraph(f"No mean over seeds: {_why_no_spread(read)}."))
    parts = []
    for spread in spreads:
        rows = []
        for name in spread["metrics"]:
            mean, deviation, low, high = (100 * spread[name][part] for part in ("mean", "sd", "low", "high"))
            values = [f"{100 * value:.2f}" for value in spread[name]["values"]]
            found = (f"{mean:.2f} ± {deviation:.2f} %", f"{low:.2f} – {high:.2f} %")
            rows.append([html.metric_title(name), *found, *values])
        seeds = [f"seed {seed}" for seed in spread["seeds"]]
        model = [html.plain(spread["settings"][key]) for key in ("model", "method") if key in spread["settings"]]
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
