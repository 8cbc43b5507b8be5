"""Show metrics.jsonl: curves of one or several runs over the optimizer step, and a table by epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from math import ceil
from pathlib import Path

import numpy as np

from zerotune.report import figures, html
from zerotune.report.figures import Series
from zerotune.run.run_files import read_metrics_lines

# key of a line, title, label of the y axis; evaluations are drawn as points
_FIGURES = (
    ("loss", "Loss", "loss (mean cross-entropy, nats)"),
    ("eval_loss", "Loss on the validation split", "loss (mean cross-entropy, nats)"),
    ("eval_accuracy", "Accuracy on the validation split", "accuracy"),
    ("eval_exact_match", "All labels right on the validation split", "exact match"),
    ("eval_f1_micro", "F1 over all labels on the validation split", "F1, micro"),
    ("eval_exact", "Exact answers on the validation split", "exact, %"),
    ("eval_f1", "F1 on the validation split", "F1, %"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "gradient norm before clipping"),
)
_SCORES = ("eval_accuracy", "eval_exact_match", "eval_f1_micro", "eval_exact", "eval_f1")
_IN_PERCENT = ("eval_exact", "eval_f1")
_NOISY = ("loss", "grad_norm")
FEWEST_SMOOTHED = 20  # points


@dataclass(frozen=True)
class History:
    """The lines of a run's metrics.jsonl by step: those of logged steps, and those of evaluations."""

    steps: list[dict]
    evaluations: list[dict]

    def series(self, key: str, label: str = "", colour: str = figures.TUNED) -> list[Series]:
        """Return the values of one key by step, from the lines that have it; [] if none has."""
        evaluated = key == "train_loss" or key.startswith("eval_")
        kept = [line for line in (self.evaluations if evaluated else self.steps) if line.get(key) is not None]
        x, y = ([line[name] for line in kept] for name in ("step", key))
        return [Series(label, x, y, colour, as_points=evaluated)] if kept else []

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in an epoch; None if no line has an epoch."""
        lines = [line for line in (*self.evaluations, *self.steps) if line.get("epoch")]
        return max(line["step"] for line in lines) / max(line["epoch"] for line in lines) if lines else None


def read_history(run_dir: Path) -> History:
    """Read run_dir/metrics.jsonl; the history is empty if it is missing. Raises Refused for a damaged line."""
    lines = read_metrics_lines(run_dir / "metrics.jsonl")
    # A resumed run may log a step twice; the later line is the one that led to the weights.
    steps = {line["step"]: line for line in lines if "loss" in line}
    evaluations = {line["step"]: line for line in lines if any(key.startswith("eval_") for key in line)}
    return History([steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)])


def curves_of_run(history: History) -> str:
    """Return the figures of one run; its losses share one."""
    losses = [
        *with_smoothed(history.series("loss", "training step"), "loss"),
        *history.series("train_loss", "training, mean since the last evaluation", figures.RUNS[2]),
        *history.series("eval_loss", "validation split", figures.BASE),
    ]
    colours = {key: figures.BASE if key.startswith("eval_") else figures.TUNED for key, *_ in _FIGURES}
    drawn = [
        (title, y_label, with_smoothed(history.series(key, colour=colours[key]), key))
        for key, title, y_label in _FIGURES[2:]
    ]
    return _drawn([(*_FIGURES[0][1:], losses), *drawn], history.steps_per_epoch)


def with_smoothed(series: list[Series], key: str) -> list[Series]:
    """Return the series; each long one of a noisy key is drawn faint, with its centred moving mean over it."""
    found = []
    for one in series:
        width = len(one.y) // 15 | 1
        if key not in _NOISY or len(one.y) < FEWEST_SMOOTHED or width < 3:
            found.append(one)
            continue
        y = np.array(figures.drawable(one.y))
        counted, ones = np.isfinite(y), np.ones(width)
        sums, counts = np.convolve(np.where(counted, y, 0.0), ones, "same"), np.convolve(counted, ones, "same")
        smooth = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        label = f"{one.label} (bold: mean of {width} neighbours)" if one.label == "training step" else one.label
        found += [replace(one, label="", is_faint=True), replace(one, label=label, y=smooth.tolist())]
    return found


def curves_of_runs(names: Sequence[str], histories: Sequence[History]) -> str:
    """Return figures with a line for each run, for as many runs as there are colours (figures.RUNS)."""
    runs = list(zip(names, histories, figures.RUNS, strict=False))
    drawn = [
        (
            title,
            y_label,
            with_smoothed([one for name, history, colour in runs for one in history.series(key, name, colour)], key),
        )
        for key, title, y_label in _FIGURES
    ]
    lengths = {history.steps_per_epoch for history in histories}
    left_out = ", ".join(names[len(runs) :])
    return _drawn(drawn, lengths.pop() if len(lengths) == 1 else None) + (
        html.paragraph(f"Without curves: {left_out}.", "note") if left_out else ""
    )


def epochs_table(history: History, best_step: int | None) -> str:
    """Return a table of losses and validation scores at the end of each epoch, and a collapsed one of all evaluations.

    Args:
        best_step: of the checkpoint that final/ is made from.
    """
    lines = [line for line in history.evaluations if line.get("epoch")]
    if not lines:
        return ""
    before = [0, *(line["step"] for line in lines)]
    num_steps = {line["step"]: line["step"] - earlier for line, earlier in zip(lines, before, strict=False)}
    names = [name for name in (*_SCORES, "eval_f1_macro") if any(line.get(name) is not None for line in lines)]
    by_epoch: dict[int, list[dict]] = {}
    for line in lines:
        by_epoch.setdefault(ceil(line["epoch"] - 1e-6), []).append(line)

    def row(epoch: str, within: list[dict]) -> list[str]:
        last, trained = within[-1], [line for line in within if line.get("train_loss") is not None]
        steps = sum(num_steps[line["step"]] for line in trained)
        training = sum(line["train_loss"] * num_steps[line["step"]] for line in trained) / steps if steps else None
        losses = ["–" if loss is None else f"{loss:.4f}" for loss in (training, last.get("eval_loss"))]
        scores = [(last.get(name), 100 if name in _IN_PERCENT else 1) for name in names]
        shown = ["–" if score is None else html.percent(score / scale) for score, scale in scores]
        return [epoch, f"{last['step']:,}", *losses, *shown, "best" if last["step"] == best_step else ""]

    titles = [html.metric_title(name.removeprefix("eval_")) for name in names]
    headers = ["epoch", "step", "training loss", "validation loss", *titles, ""]
    table = html.table(headers, [row(str(epoch), within) for epoch, within in by_epoch.items()])
    note = "Training loss is the mean of the steps since the last evaluation of the epoch before. "
    note += "final/ is the best evaluation." if best_step else ""
    parts = [table, html.paragraph(note.strip(), "note")]
    if len(lines) > len(by_epoch):
        every = html.table(headers, [row(f"{line['epoch']:.2f}", [line]) for line in lines])
        parts.append(html.details(f"All {len(lines)} evaluations", every))
    return "\n".join(parts)


def _drawn(drawn: list[tuple[str, str, list[Series]]], steps_per_epoch: float | None) -> str:
    made = [
        f'<div class="card"><h3>{escape(title)}</h3>'
        f"{figures.curves(title, 'optimizer step', y_label, lines, steps_per_epoch)}</div>"
        for title, y_label, lines in drawn
        if lines
    ]
    some = {title for title, _, lines in drawn if lines}
    scores = {title for key, title, _ in _FIGURES if key in _SCORES}
    # a task has only some of the scores; the others are not missing
    missing = [title.lower() for title, _, lines in drawn if not lines and not (title in scores and scores & some)]
    note = html.paragraph(f"Not in metrics.jsonl: {', '.join(missing)}.", "note") if missing else ""
    return f'<div class="figures">{"".join(made)}</div>{note}'
