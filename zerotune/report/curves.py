"""Draw what metrics.jsonl holds over the optimizer step: the curves of one run, or of several together."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

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
    ("epoch", "Epoch", "epoch"),
)
_SCORES = ("eval_accuracy", "eval_exact_match", "eval_f1_micro", "eval_exact", "eval_f1")


@dataclass(frozen=True)
class History:
    """The lines of a run's metrics.jsonl by step: those of logged steps, and those of evaluations."""

    steps: list[dict]
    evaluations: list[dict]

    def series(self, key: str, label: str = "", colour: str = figures.TUNED) -> list[Series]:
        """Return one key of the lines that have it, [] if none has."""
        evaluated = key == "train_loss" or key.startswith("eval_")
        kept = [line for line in (self.evaluations if evaluated else self.steps) if line.get(key) is not None]
        x, y = ([line[name] for line in kept] for name in ("step", key))
        return [Series(label, x, y, colour, as_points=evaluated)] if kept else []


def read_history(run_dir: Path) -> History:
    """Read run_dir/metrics.jsonl, without which there are no lines. Raises Refused for a damaged line."""
    lines = read_metrics_lines(run_dir / "metrics.jsonl")
    # A resumed run may log a step twice; the later line is the one that led to the weights.
    steps = {line["step"]: line for line in lines if "loss" in line}
    evaluations = {line["step"]: line for line in lines if any(key.startswith("eval_") for key in line)}
    return History([steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)])


def curves_of_run(history: History) -> str:
    """Return the figures of one run; its losses share one."""
    losses = [
        *history.series("loss", "training step"),
        *history.series("train_loss", "training, mean since the last evaluation", figures.RUNS[2]),
        *history.series("eval_loss", "validation split", figures.BASE),
    ]
    drawn = [
        (title, y_label, history.series(key, colour=figures.BASE if key.startswith("eval_") else figures.TUNED))
        for key, title, y_label in _FIGURES[2:]
    ]
    return _drawn([(*_FIGURES[0][1:], losses), *drawn])


def curves_of_runs(names: Sequence[str], histories: Sequence[History]) -> str:
    """Return figures with a line for each run, for as many runs as there are colours (figures.RUNS)."""
    runs = list(zip(names, histories, figures.RUNS, strict=False))
    drawn = [
        (title, y_label, [one for name, history, colour in runs for one in history.series(key, name, colour)])
        for key, title, y_label in _FIGURES
    ]
    left_out = ", ".join(names[len(runs) :])
    return _drawn(drawn) + (html.paragraph(f"Without curves: {left_out}.", "note") if left_out else "")


def _drawn(drawn: list[tuple[str, str, list[Series]]]) -> str:
    made = [
        f'<div class="card"><h3>{escape(title)}</h3>{figures.curves(title, "optimizer step", y_label, lines)}</div>'
        for title, y_label, lines in drawn
        if lines
    ]
    some = {title for title, _, lines in drawn if lines}
    scores = {title for key, title, _ in _FIGURES if key in _SCORES}
    # a task has some of the scores, and does not miss the others
    missing = [title.lower() for title, _, lines in drawn if not lines and not (title in scores and scores & some)]
    note = html.paragraph(f"Not in metrics.jsonl: {', '.join(missing)}.", "note") if missing else ""
    return f'<div class="figures">{"".join(made)}</div>{note}'
