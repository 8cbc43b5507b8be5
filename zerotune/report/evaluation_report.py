"""Show an evaluation, or the evaluations of several prompts: report.html of an eval script's folder."""

from collections import Counter
from pathlib import Path

from zerotune.errors import Refused, quoted
from zerotune.files import read_json, read_json_lines, write_text
from zerotune.metrics import evaluations
from zerotune.report import figures, html, words
from zerotune.report.item_parts import text_of
from zerotune.report.run_report import ReportParts
from zerotune.report.tables import data_section, run_section, scores_block
from zerotune.run.process import is_main_process, say
from zerotune.run.run_files import RunRecord, SplitRecord
from zerotune.settings.names import TASK_NAMES, short_name

NUM_UNLABELLED = 20


def write_evaluation_report(folder: Path, parts: ReportParts) -> Path | None:
    """Write folder/report.html from an evaluation's files, on rank 0, say where it is, and return its path.

    A folder with a summary.json gets a page about all prompts, and a page for each in seed-0/ …
    """
    if not is_main_process():
        return None
    body = _seeds_body(folder, parts) if (folder / "summary.json").is_file() else _body(folder, parts)
    report = folder / "report.html"
    write_text(report, html.page(f"{folder.resolve().name} – zerotune", body))
    say(f"report: {report}")
    return report


def _body(folder: Path, parts: ReportParts) -> list[str]:
    metrics = evaluations.read_metrics(folder / "metrics.json")
    top = _heading(metrics, f"{metrics['setting']} · {folder.resolve().name}")
    if evaluations.headline(metrics) not in metrics:
        return [top, _unlabelled_section(folder, metrics, parts.items), *_ends(folder)]
    try:
        one = evaluations.read_evaluation(folder, parts.prediction)
    except Refused as refusal:
        return [top, html.section("Scores", html.paragraph(f"No scores: {refusal}.")), *_ends(folder)]
    shown, name = evaluations.as_proportions(metrics), _name(metrics)
    cards = [
        html.card(
            html.metric_title(score),
            html.percent(shown[score]),
            html.interval_text(shown.get(f"{score}_ci95")),
            "tuned",
        )
        for score in dict.fromkeys((*parts.headline, *parts.columns))
        if shown.get(score) is not None
    ]
    remark, footnote = parts.remark(metrics), parts.footnote(metrics)
    column = (str(metrics["setting"]), shown, figures.TUNED)
    scores = [
        html.bullets(parts.answers(name, metrics)),
        html.paragraph(remark) if remark else "",
        scores_block([column], parts.items, parts.headline[0], "of this evaluation", parts.more_rows),
        html.paragraph(footnote, "note") if footnote else "",
    ]
    return [
        top,
        f'<div class="cards">{"".join(cards)}</div>',
        html.section("Scores", *scores),
        *parts.sections({name: one}),
        *_ends(folder),
    ]


def _heading(metrics: dict, note: str) -> str:
    task = metrics.get("task")
    return html.heading(_name(metrics), TASK_NAMES.get(task, task) or "") + html.paragraph(note, "note")


def _name(metrics: dict) -> str:
    return short_name(str(metrics.get("model") or "this model"))


def _ends(folder: Path) -> list[str]:
    """Return the sections about data and run; that about data only if the folder has split.json."""
    run, split = (
        read_json(path, form) if (path := folder / name).is_file() else {}
        for name, form in (("run.json", RunRecord), ("split.json", SplitRecord))
    )
    return [data_section(split) if split else "", run_section(folder, run)]


def _unlabelled_section(folder: Path, metrics: dict, items: str) -> str:
    """Return the section about items without labels: how often each answer is given, and the first items."""
    lines = read_json_lines(folder / "predictions.jsonl")

    def answer(line: dict) -> str:
        given = line.get("prediction_names", line.get("prediction_name", line["prediction"]))
        return (", ".join(given) if isinstance(given, list) else given) or "none"

    counts = Counter(map(answer, lines)).most_common(NUM_UNLABELLED)
    rows = [(name, f"{count:,}", html.percent(count / len(lines))) for name, count in counts]
    first = [
        (f"{html.isolated(answer(line))} · {line['id']}", line.get("question") or text_of(line))
        for line in lines[:NUM_UNLABELLED]
    ]
    return html.section(
        "Predictions",
        html.paragraph(f"{metrics['count']:,} {items} without labels: there are no scores."),
        html.table(["answer", items, "share"], rows),
        html.details(f"The first {len(first)}", html.example_list(first)),
    )


def _seeds_body(folder: Path, parts: ReportParts) -> list[str]:
    summary = read_json(folder / "summary.json")
    places = [folder / f"seed-{number}" for number in range(summary["num_seeds"])]
    for place in places:
        write_text(place / "report.html", html.page(f"{folder.resolve().name}, {place.name}", _body(place, parts)))
    every = [evaluations.read_metrics(place / "metrics.json") for place in places]
    names = [name for name in summary if name not in ("num_seeds", "seeds")]
    sections = [_heading(every[0], f"{len(places)} prompts · {folder.resolve().name}")]
    if names:
        sections += [_spread_section(summary, names, every, places)]
    rows = []
    for place, one in zip(places, summary["seeds"], strict=True):
        rows.append(
            [
                place.name,
                one["prompt"],
                ", ".join(map(quoted, one["label_words"])),
                ", ".join(one["shot_ids"]) or "none",
            ]
        )
    prompts = html.table(["", "prompt", "label words", "shots"], rows, num_text_columns=4)
    pages = html.file_links(folder, [f"{place.name}/report.html" for place in places])
    return [*sections, html.section("Prompts", prompts, f"<h3>Their pages</h3>{pages}"), *_ends(folder)]


def _spread_section(summary: dict, names: list[str], every: list[dict], places: list[Path]) -> str:
    first, found = names[0], summary[names[0]]
    dots = [
        (place.name, 100 * one[first], [100 * bound for bound in one[f"{first}_ci95"]], figures.TUNED)
        for place, one in zip(places, every, strict=True)
    ]
    figure = figures.intervals("Scores by prompt", f"{html.metric_title(first)}, % (95 % interval)", dots)
    rows = []
    for name in names:
        mean, deviation, (low, high) = (summary[name][part] for part in ("mean", "sd", "range"))
        spread = "–" if deviation is None else f"{100 * deviation:.1f}"
        values = [html.percent(one[name]) for one in every]
        rows.append([_seed_title(name), html.percent(mean), spread, f"{100 * low:.1f} – {100 * high:.1f}", *values])
    headers = ["", "mean", "standard deviation", "range", *(place.name for place in places)]
    said = words.seeds_sentence(first, found["mean"], found["sd"], *found["range"], len(places))
    note = "Standard deviation over prompts with n − 1, in points."
    return html.section(
        "Scores",
        html.paragraph(said),
        f'<div class="wide">{figure}</div>',
        html.table(headers, rows),
        html.paragraph(note, "note"),
    )


def _seed_title(name: str) -> str:
    plain = name.removeprefix("uncalibrated_")
    return html.metric_title(plain) + (", uncalibrated" if plain != name else "")
