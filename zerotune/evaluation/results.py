"""What a run shows at its ends: a classifier before training, final/ after it, a table; for any run the report."""

from pathlib import Path

from zerotune.evaluation.options import EvalOptions
from zerotune.evaluation.text_evaluation import evaluate_checkpoint
from zerotune.files import read_json
from zerotune.run.folder import RunFolder
from zerotune.run.process import say
from zerotune.settings.groups import TrainSettings
from zerotune.tasks.splits import Splits, stratified_subset
from zerotune.tasks.task_sources import reporting_sha256

BASE_EVAL_ITEMS = 1000


def evaluate_base(run: RunFolder, settings: TrainSettings, task, splits: Splits, stop_signal) -> None:
    """Evaluate the model as it is before training into eval/base: zero-shot for a causal model."""
    if settings.run.base_eval == "none":
        return
    test, model = splits.test, settings.model
    if settings.run.base_eval == "subset":
        test = stratified_subset(test, BASE_EVAL_ITEMS, settings.data.split_seed, "base evaluation")
    options = EvalOptions(
        model=model.name,
        revision=model.revision,
        attention=model.attention,
        precision=model.precision,
        max_length=settings.text.max_length,
        tokens_per_device=settings.optimisation.tokens_per_device,
        load_4bit=model.method == "qlora",
        prompt_format=settings.prompt.format,
        as_generator=settings.head == "generate",
        truncation=settings.text.truncation,
        seed=settings.optimisation.seed,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "base"
    with run.timed("base_eval_s"):
        metrics = evaluate_checkpoint(folder, options, task, test, run.accelerator, stop_signal, replace=True)
    say(f"base ({metrics['setting']}): {accuracy_line(metrics)}")


def evaluate_final(run: RunFolder, settings: TrainSettings, final: Path, task, splits: Splits, stop_signal) -> None:
    """Evaluate the reloaded final/ on all test items into eval/final, as its task.json says."""
    options = EvalOptions(
        model=str(final),
        revision=None,
        attention=settings.model.attention,
        precision=settings.model.precision,
        tokens_per_device=settings.optimisation.tokens_per_device,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "final"
    metrics = evaluate_checkpoint(folder, options, task, splits.test, run.accelerator, stop_signal, replace=True)
    say(f"tuned (step {read_json(final / 'task.json')['best_step']}): {accuracy_line(metrics)}")


def accuracy_line(metrics: dict) -> str:
    """Accuracy with its 95 % interval, for printing; what was done where there were no labels."""
    if "accuracy" not in metrics:
        return f"{metrics['count']:,} predictions (the items have no labels)"
    low, high = metrics["accuracy_ci95"]
    unparsable = f", {metrics['num_unparsable']:,} of them unparsable" if metrics.get("num_unparsable") else ""
    return f"accuracy {metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {metrics['count']:,} items{unparsable}"
