"""Summarise the scores of several runs: mean ± standard deviation over seeds, and the ranking of a sweep.

A sweep is ranked only by the validation split. Test scores are then reported only for the chosen setting, because the
best of several test scores would be too high.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from zerotune.errors import Refused, counted, listed
from zerotune.files import read_json, write_json, write_text
from zerotune.metrics.evaluations import headline, is_in_percent, read_metrics, score_names
from zerotune.report import html
from zerotune.report.curves import curves_of_runs, read_history
from zerotune.report.tables import timings_table
from zerotune.run.process import say
from zerotune.run.run_files import read_metrics_lines, read_run_record, read_split
from zerotune.settings.names import TASK_NAMES
from zerotune.settings.sweeps import Member, Runs, changes_loss
from zerotune.sweep.folder import all_runs_of_folder, is_finished

NOT_FINISHED = "is not finished"
# Inputs that all settings of a sweep share, and the swept flags that may change them. The split also depends on flags
# such as --limit-train; with the same data and validation rows only those can change it.
_SHARED_INPUTS = {
    "model_files": {"model", "revision"},
    "data": {"train_file"},
    "precision": {"precision", "deepspeed", "model"},
}


@dataclass(frozen=True)
class Scores:
    """The results of a finished run.

    Attributes:
        choose_by: the validation metric that chose its checkpoint.
        validation: the metrics of that checkpoint on the validation split.
        test: metrics.json of the final evaluation.
        validation_rows: hashes of the validation rows' ids and of the source that they come from.
        identity: what the run was trained on, by name: data, model files, precision.
    """

    choose_by: str
    best_step: int
    validation: Mapping[str, float]
    test: Mapping[str, object]
    validation_rows: tuple[str, str]
    identity: Mapping[str, object]


@dataclass(frozen=True)
class Setting:
    """The runs of one setting of a sweep, which differ in their seeds, and the scores of those that are finished."""

    values: Mapping[str, str]
    members: Sequence[Member]
    scores: Sequence[Scores]

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.values.items())

    @property
    def is_whole(self) -> bool:
        """Whether all of its runs are finished."""
        return len(self.scores) == len(self.members)

    def validation(self) -> dict:
        """Return the spread of the validation metric that settings are ranked by."""
        return spread([one.validation[one.choose_by] for one in self.scores])

    def tests(self) -> dict[str, dict]:
        """Return the spread of each test score that all finished runs have."""
        names = score_names(self.scores[0].test)
        columns = {name: [one.test.get(name) for one in self.scores] for name in names}
        return {name: spread(values) for name, values in columns.items() if None not in values}


def spread(values: Sequence[float]) -> dict:
    """Return n, mean, sd (of a sample, n - 1; None for a single value) and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def rank(settings: Sequence[Setting], choose_by: str, compares_losses: bool = True) -> list[Setting]:
    """Return the settings whose runs are all finished, the best mean on the validation split first.

    Ties go to the lower mean validation loss, then to the earlier setting in the sweep.

    Args:
        compares_losses: whether the settings' losses are of the same quantity; otherwise they break no ties.
    """
    sign = 1 if choose_by == "loss" else -1

    def key(one: Setting) -> tuple[float, float]:
        losses = [scores.validation.get("loss", 0.0) if compares_losses else 0.0 for scores in one.scores]
        return sign * one.validation()["mean"], statistics.fmean(losses)

    return sorted((one for one in settings if one.is_whole), key=key)


def summarise(runs: Runs, failed: Mapping[str, str]) -> Path:
    """Print the scores of the folder's finished runs, write summary.json and report.html, and return the report's path.

    Args:
        failed: why a run is not finished, by its name; a run without an entry just "is not finished".
    Raises:
        Refused: no run is finished, the runs validated on different rows, or a run's results are damaged.
    """
    runs = all_runs_of_folder(runs)
    finished = {
        member.name: read_scores(runs.folder / member.name)
        for member in runs.members
        if is_finished(runs.folder / member.name)
    }
    if not finished:
        reasons = "; ".join(f"{name} {why}" for name, why in failed.items())
        raise Refused(f"none of {counted(len(runs.members), 'run')} is finished" + (f": {reasons}" if reasons else ""))
    _check_comparable(finished)
    choose_by = next(iter(finished.values())).choose_by
    settings = _by_setting(runs, finished)
    for setting in settings:
        _check_same_inputs(setting)
    _check_shared_inputs(finished, set(runs.sweep))
    ranked = rank(settings, choose_by, not changes_loss(runs.sweep, str(runs.flags.get("head"))))
    record = _record(runs, settings, ranked, failed, finished)
    write_json(runs.folder / "summary.json", record)
    lines = _ranking_lines(settings, ranked, choose_by) if runs.sweep else _seed_lines(settings[0], choose_by)
    for line in lines:
        say(line)
    report = runs.folder / "report.html"
    write_text(report, _page(runs, settings, ranked, record))
    return report


def read_scores(folder: Path) -> Scores:
    """Read the results of a finished run. Raises Refused if a file is damaged."""
    final = read_json(folder / "final/task.json")
    best_step, choose_by = final.get("best_step"), final.get("choose_by")
    rows = [row for row in read_metrics_lines(folder / "metrics.jsonl") if row["step"] == best_step]
    validation = {
        name.removeprefix("eval_"): value
        for row in rows
        for name, value in row.items()
        if name.startswith("eval_") and value is not None
    }
    if choose_by not in validation:
        raise Refused(f"{folder}/metrics.jsonl has no eval_{choose_by} of step {best_step}: restore it")
    split = read_split(folder / "split.json")
    source = split["sources"].get("validation") or split["sources"]["train"]
    validation_rows = (split["splits"]["validation"]["ids_sha256"], source["sha256"])
    test = read_metrics(folder / "eval/final/metrics.json")
    identity = read_run_record(folder / "run.json").get("identity", {})
    return Scores(choose_by, best_step, validation, test, validation_rows, identity)


def _check_comparable(finished: Mapping[str, Scores]) -> None:
    (first, one), *others = finished.items()
    for name, other in others:
        if other.validation_rows != one.validation_rows:
            raise Refused(
                f"{first} and {name} validated on different rows, so their scores cannot be compared: sweep flags "
                "that leave the validation split as it is, or give --validation-file and --test-file"
            )


def _check_same_inputs(setting: Setting) -> None:
    """Refuse a mean over seeds that trained on different data or models, as after a correction of the file."""
    for other in setting.scores[1:]:
        first = setting.scores[0].identity
        changed = [name for name in {**first, **other.identity} if first.get(name) != other.identity.get(name)]
        _refuse_changed("seeds of one setting", changed, listed([member.name for member in setting.members]))


def _check_shared_inputs(finished: Mapping[str, Scores], swept: set[str]) -> None:
    """Refuse a ranking of settings whose data or model have changed between them, other than by a swept flag."""
    shared = [part for part, flags in _SHARED_INPUTS.items() if not flags & swept]
    (first, one), *others = finished.items()
    for name, other in others:
        changed = [part for part in shared if one.identity.get(part) != other.identity.get(part)]
        _refuse_changed("runs of a sweep", changed, f"{first} and {name}")


def _refuse_changed(which: str, changed: list[str], between: str) -> None:
    if changed:
        raise Refused(
            f"the {which} must have the same inputs: {listed(changed)} changed between {between}; use another "
            "--output-dir, or delete the runs from before the change"
        )


def _by_setting(runs: Runs, finished: Mapping[str, Scores]) -> list[Setting]:
    grouped: dict[tuple, list[Member]] = {}
    for member in runs.members:
        grouped.setdefault(tuple(member.setting.values()), []).append(member)
    return [
        Setting(members[0].setting, members, [finished[one.name] for one in members if one.name in finished])
        for members in grouped.values()
    ]


def _record(
    runs: Runs,
    settings: Sequence[Setting],
    ranked: Sequence[Setting],
    failed: Mapping[str, str],
    finished: Mapping[str, Scores],
) -> dict:
    """Return summary.json. With a sweep, only the chosen setting has test scores."""
    shows_tests = ranked[:1] if runs.sweep else settings
    return {
        "script": runs.script,
        "sweep": {name: list(values) for name, values in runs.sweep.items()},
        "seeds": list(runs.seeds),
        "choose_by": next(iter(finished.values())).choose_by,
        "chosen": dict(ranked[0].values) if runs.sweep and ranked else None,
        "settings": [
            {
                "setting": dict(one.values),
                "rank": next((number for number, other in enumerate(ranked, 1) if other is one), None),
                "runs": [member.name for member in one.members],
                "num_finished": len(one.scores),
                "validation": one.validation() if one.scores else None,
            }
            | ({"test": one.tests()} if any(one is other for other in shows_tests) else {})
            for one in settings
        ],
        "runs": [
            {
                "name": member.name,
                "setting": dict(member.setting),
                "seed": member.seed,
                "finished": one is not None,
                "reason": None if one else failed.get(member.name, NOT_FINISHED),
            }
            | ({"best_step": one.best_step, "validation": dict(one.validation)} if one else {})
            for member in runs.members
            for one in [finished.get(member.name)]
        ],
    }


def shown(values: Mapping[str, object], digits: int) -> str:
    """Return a spread as text: 0.8840 ± 0.0123, or just the value if there is only one."""
    deviation = "" if values["sd"] is None else f" ± {values['sd']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{deviation}"


def _digits(setting: Setting, metric: str) -> int:
    """Return the decimals of a metric: fewer for a score on 0-100, but not for the loss."""
    return 2 if metric != "loss" and setting.scores and is_in_percent(setting.scores[0].test) else 4


def _test_names(setting: Setting, choose_by: str) -> list[str]:
    """Return the test scores that are printed: the share of right items, the metric that chose, and an F1."""
    tests = setting.tests()
    wanted = dict.fromkeys((headline(setting.scores[0].test), choose_by, "f1", "f1_macro"))
    return [name for name in wanted if name in tests][:3]


def _seed_lines(setting: Setting, choose_by: str) -> list[str]:
    """Return the table of runs that differ only in their seeds."""
    tests, finished = setting.tests(), setting.scores
    seeds = [one.seed for one in setting.members]
    rows = [("validation", choose_by, setting.validation())]
    rows += [("test", name, tests[name]) for name in _test_names(setting, choose_by)]
    told = f"{len(finished)} of " * (len(finished) < len(seeds)) + counted(len(seeds), "seed")
    lines = [f"{'':<24}{'mean ± sd':>18}   values of {told}"]
    for part, name, values in rows:
        digits, title = _digits(setting, name), f"{part} {name.replace('_', ' ')}"
        each = "  ".join(f"{value:.{digits}f}" for value in values["values"])
        lines.append(f"{title:<24}{shown(values, digits):>18}   {each}")
    return lines


def _ranking_lines(settings: Sequence[Setting], ranked: Sequence[Setting], choose_by: str) -> list[str]:
    """Return the ranking of a sweep by the validation split, and the test scores of the chosen setting."""
    order = [*ranked, *(one for one in settings if not one.is_whole)]
    width = max(len(one.name) for one in order) + 2
    lines = [f"{'':<{width}}{f'validation {choose_by}':>24}   runs"]
    for one in order:
        score = shown(one.validation(), _digits(one, choose_by)) if one.scores else "–"
        runs = f"{len(one.scores)} of {len(one.members)}, not ranked" if not one.is_whole else str(len(one.members))
        lines.append(f"{one.name:<{width}}{score:>24}   {runs}{'   chosen' if one is order[0] and ranked else ''}")
    return [*lines, chosen_sentence(ranked, choose_by)]


def chosen_sentence(ranked: Sequence[Setting], choose_by: str) -> str:
    """Return a sentence with the test scores of the chosen setting and the number of settings tied with it."""
    if not ranked:
        return "no setting is chosen: none has all of its runs finished"
    chosen, best = ranked[0], ranked[0].validation()["mean"]
    tied = sum(one.validation()["mean"] == best for one in ranked) - 1
    tests, num_runs = chosen.tests(), len(chosen.members)
    scores = ", ".join(
        f"test {name.replace('_', ' ')} {shown(tests[name], _digits(chosen, name))}"
        for name in _test_names(chosen, choose_by)
    )
    over = f" (mean ± sd of {num_runs} seeds)" if num_runs > 1 else ""
    rule = "ties go to the lower validation loss if losses can be compared, then to the first"
    tie = f" (as good as {tied} other{'s' * (tied > 1)}; {rule})" if tied else ""
    return f"chosen by validation {choose_by}: {chosen.name}{tie}; {scores}{over}"


def _page(runs: Runs, settings: Sequence[Setting], ranked: Sequence[Setting], record: dict) -> str:
    choose_by, finished = record["choose_by"], {each["name"] for each in record["runs"] if each["finished"]}
    order = [*ranked, *(one for one in settings if not one.is_whole)]
    # the best first: curves have colours for only a few
    names = [member.name for one in order for member in one.members if member.name in finished]
    histories = [read_history(runs.folder / name) for name in names]
    records = [read_run_record(runs.folder / name / "run.json") for name in names]
    task = str(records[0].get("task"))
    num_finished, num_runs = sum(len(one.scores) for one in settings), len(runs.members)
    part = f"{num_finished} of " * (num_finished < num_runs)
    title = f"{TASK_NAMES.get(task, task)}: {part}{counted(num_runs, 'run')}"
    scores = _ranking(order, ranked, choose_by) if runs.sweep else _seed_table(settings[0], choose_by)
    sections = [
        html.heading(title, "sweep" if runs.sweep else "seeds"),
        html.section("Ranking" if runs.sweep else "Scores", *scores),
        html.section("Runs", _run_list(record, _digits(order[0], choose_by))),
        html.section("Training", timings_table(names, records, histories), curves_of_runs(names, histories)),
        html.section("Shared flags", html.table([], html.flattened(dict(runs.flags)), num_text_columns=2)),
    ]
    return html.page(f"{runs.folder.resolve().name} – zerotune", sections)


def _seed_table(setting: Setting, choose_by: str) -> list[str]:
    rows = [("validation", choose_by, setting.validation())]
    rows += [("test", name, values) for name, values in setting.tests().items()]
    cells = []
    for part, name, values in rows:
        digits = _digits(setting, name)
        each = [f"{value:.{digits}f}" for value in values["values"]]
        cells.append([f"{part} {html.metric_title(name)}", shown(values, digits), str(values["n"]), *each])
    finished = len(setting.scores)
    headers = ["", "mean ± sd", "n", *(f"run {number}" for number in range(1, finished + 1))]
    if finished == len(setting.members):
        headers[3:] = [f"seed {member.seed}" for member in setting.members]
    return [html.table(headers, cells), html.paragraph("Standard deviation of a sample, with n − 1.", "note")]


def _ranking(order: Sequence[Setting], ranked: Sequence[Setting], choose_by: str) -> list[str]:
    rows = []
    for one in order:
        score = shown(one.validation(), _digits(one, choose_by)) if one.scores else "–"
        place = "chosen" if ranked and one is ranked[0] else "" if one.is_whole else "not ranked"
        rows.append([one.name, score, f"{len(one.scores)} of {len(one.members)}", place])
    text = chosen_sentence(ranked, choose_by)
    note = (
        "Ranked by the mean on the validation split; ± is the standard deviation of a sample, with n − 1. Test scores "
        "of the other settings are left out on purpose: the best of several would be too high."
    )
    headers = ["setting", f"validation {html.metric_title(choose_by)}", "runs finished", ""]
    return [html.paragraph(f"{text[0].upper()}{text[1:]}."), html.table(headers, rows), html.paragraph(note, "note")]


def _run_list(record: dict, digits: int) -> str:
    """Return a list of the runs with links to their pages."""
    items = []
    for run in record["runs"]:
        name = escape(run["name"])
        if run["finished"]:
            found = f"validation {record['choose_by']} {run['validation'][record['choose_by']]:.{digits}f}"
            found += f", best step {run['best_step']:,}"
            name = f'<a href="{quote(run["name"])}/report.html">{name}</a>'
        else:
            found = run["reason"]
        items.append(f"<li>{name}: {escape(found)}</li>")
    return f"<ul>{''.join(items)}</ul>"
