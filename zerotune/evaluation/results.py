"""What a run shows at its ends: a classifier before training, final/ after it, a table; for any run the report."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from zerotune.errors import Refused
from zerotune.evaluation.options import EvalOptions, QuestionOptions
from zerotune.evaluation.text_evaluation import evaluate_checkpoint
from zerotune.files import read_json
from zerotune.metrics.paired import paired_comparison, read_evaluation
from zerotune.run.folder import RunFolder
from zerotune.run.process import is_main_process, say, started_at
from zerotune.tasks.splits import Splits, stratified_subset
from zerotune.tasks.task_sources import reporting_sha256

BASE_EVAL_ITEMS = 1000


def evaluate_base(run: RunFolder, args, precision: str, task, splits: Splits, stop_signal) -> float:
    """Evaluate the model as it is before training into eval/base: zero-shot for a causal model. Returns the seconds."""
    started = time.perf_counter()
    if args.base_eval == "none":
        return 0.0
    test = splits.test
    if args.base_eval == "subset":
        test = stratified_subset(test, BASE_EVAL_ITEMS, args.split_seed, "base evaluation")
    options = EvalOptions(
        model=args.model,
        revision=args.revision,
        attention=args.attention,
        precision=precision,
        max_length=args.max_length,
        tokens_per_device=args.tokens_per_device,
        load_4bit=args.method == "qlora",
        prompt_format=args.prompt_format,
        as_generator=args.head == "generate",
        truncation=args.truncation,
        seed=args.seed,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "base"
    metrics = evaluate_checkpoint(folder, options, task, test, run.accelerator, stop_signal, replace=True)
    say(f"base ({metrics['setting']}): {accuracy_line(metrics)}")
    return time.perf_counter() - started


def evaluate_final(run: RunFolder, args, final: Path, precision: str, task, splits: Splits, stop_signal) -> dict:
    """Evaluate the reloaded final/ on all test items into eval/final."""
    options = final_options(EvalOptions, args, final, precision, splits)
    folder = run.path / "eval" / "final"
    metrics = evaluate_checkpoint(folder, options, task, splits.test, run.accelerator, stop_signal, replace=True)
    say(f"tuned (step {read_json(final / 'task.json')['best_step']}): {accuracy_line(metrics)}")
    return metrics


def final_options(
    kind: type[EvalOptions] | type[QuestionOptions], args, final: Path, precision: str, splits: Splits
) -> EvalOptions | QuestionOptions:
    """How a run's final/ is evaluated: as its task.json says, on the items that report."""
    return kind(
        model=str(final),
        revision=None,
        attention=args.attention,
        precision=precision,
        tokens_per_device=args.tokens_per_device,
        data_sha256=reporting_sha256(splits.record),
    )


def print_results(run: RunFolder, final: dict) -> None:
    """The table of a run: before and after, on the items that both scored."""
    if not is_main_process() or not (run.path / "eval" / "base" / "metrics.json").exists():
        return
    base, tuned = (read_evaluation(run.path / "eval" / name) for name in ("base", "final"))
    paired = paired_comparison(base, tuned)
    low, high = paired.difference_ci95
    say(f"{'':<28}{'accuracy':>10}{'95 % interval':>20}{'f1':>10}{'items':>8}")
    for name, metrics in ((f"base, {base.metrics['setting']}", base.metrics), ("tuned", final)):
        interval = "[{:.4f}, {:.4f}]".format(*metrics["accuracy_ci95"])
        say(f"{name:<28}{metrics['accuracy']:>10.4f}{interval:>20}{metrics['f1']:>10.4f}{metrics['count']:>8,}")
    say(
        f"on the {paired.num_common:,} common items: {paired.difference:+.4f} [{low:+.4f}, {high:+.4f}], "
        f"McNemar p = {paired.p_value:.2g}"
    )


def accuracy_line(metrics: dict) -> str:
    """Accuracy with its 95 % interval, for printing; what was done where there were no labels."""
    if "accuracy" not in metrics:
        return f"{metrics['count']:,} predictions (the items have no labels)"
    low, high = metrics["accuracy_ci95"]
    unparsable = f", {metrics['num_unparsable']:,} of them unparsable" if metrics.get("num_unparsable") else ""
    return f"accuracy {metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {metrics['count']:,} items{unparsable}"


def finish(
    run: RunFolder, args, progress, write_report: Callable[[Path], Path], startup_s: float, base_eval_s: float
) -> None:
    """Write the timings and the report, mark the run as finished, and upload it if asked to.

    Args:
        write_report: run folder -> path of its report.html, made last of all.
        startup_s: launch to first step, without the base evaluation's seconds base_eval_s.
    """
    if not is_main_process():
        return
    seconds = max(progress.train_seconds, 1e-9)
    timings = {
        "startup_s": startup_s,
        "base_eval_s": base_eval_s,
        "train_s": progress.train_seconds,
        "train_examples_per_s": progress.num_examples / seconds,
        "train_tokens_per_s": progress.num_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
        "total_s": time.time() - started_at(),
    }
    run.update_json("run.json", timings=timings)
    report = write_report(run.path)
    run.write_state("finished", None)
    if args.push_to_hub:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            HfApi().create_repo(args.push_to_hub, exist_ok=True, private=True)
            HfApi().upload_folder(repo_id=args.push_to_hub, folder_path=run.path / "final")
        except (OSError, HfHubHTTPError.__bases__[0]) as error:  # the HTTPError of the client that it uses
            raise Refused(
                f"--push-to-hub {args.push_to_hub} failed ({str(error).splitlines()[0]}); the run is done, see "
                f"{report}: start the same command again, or `hf upload {args.push_to_hub} {run.path / 'final'}`"
            ) from None
    say(f"report: {report}")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
