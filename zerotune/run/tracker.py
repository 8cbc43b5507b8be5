"""TensorBoard and Weights & Biases: the run's flags, and its numbers by group, as in `train/loss`, `test/accuracy`."""

from collections.abc import Mapping
from pathlib import Path


def grouped(row: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values of a line of metrics.jsonl by "train/NAME" and "validation/NAME", without missing ones.

    In an evaluation's line, `train_loss` is the mean since the previous evaluation, returned as "train/mean_loss".
    """
    is_evaluation, values = "train_loss" in row, {}
    for name, value in row.items():
        if value is None or name == "step" or (is_evaluation and name == "epoch"):
            continue
        if name == "train_loss":
            values["train/mean_loss"] = value
        else:
            values[f"validation/{name.removeprefix('eval_')}" if is_evaluation else f"train/{name}"] = value
    return values


def scores(metrics: Mapping[str, object], group: str) -> dict[str, float]:
    """Return the scores of a metrics.json by "GROUP/NAME": the values with a confidence interval."""
    return {f"{group}/{name}": value for name, value in metrics.items() if f"{name}_ci95" in metrics}


def start_tracker(kind: str, folder: Path, run_id: str, flags: Mapping[str, object]):
    """Return an accelerate tracker for a run folder, with the run's flags as hyperparameters.

    A run that resumes logs to the same place.

    Args:
        kind: "tensorboard" or "wandb".
        run_id: of run.json; a run made anew in the same folder has another one.
    """
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if kind == "wandb":  # run_name is accelerate's word for a project
        tracker = WandBTracker("zerotune", name=folder.name, id=run_id, resume="allow", dir=folder)
        tracker.start()
        tracker.store_init_configuration(dict(flags))
        return tracker
    tracker = TensorBoardTracker(run_name="tensorboard", logging_dir=folder)
    tracker.start()
    _write_flags(tracker.writer, flags)
    return tracker


def _write_flags(writer, flags: Mapping[str, object]) -> None:
    """Write the flags as TensorBoard's hyperparameters of this very run, with the metrics to show beside them.

    `SummaryWriter.add_hparams`, which accelerate calls, would add a second run for them at each start.
    """
    from torch.utils.tensorboard.summary import hparams

    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flags.items()}
    chosen_by = flags.get("choose_by", "loss")
    shown = dict.fromkeys(("validation/loss", f"validation/{chosen_by}", f"test/{chosen_by}"), 0.0)
    for summary in hparams(plain, shown):
        writer.file_writer.add_summary(summary)
    writer.flush()
