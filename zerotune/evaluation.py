"""Evaluating a classifier or a prompt on labelled texts, and writing what came of it: shared by SST-2 and IMDB."""

import contextlib
import hashlib
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np

from zerotune.batching import evaluation_batches
from zerotune.errors import Refused
from zerotune.evaluation_options import EvalOptions, answers_by_prompt
from zerotune.files import json_sha256, read_json, write_json, write_json_lines, write_text
from zerotune.language_model import load_language_model
from zerotune.metrics import classification_metrics, confusion_matrix, confusion_scores
from zerotune.model_files import model_identity
from zerotune.pretrained import read_config
from zerotune.prompting import calibrate
from zerotune.runs import is_main_process
from zerotune.scorers import LoadModel, prepare_classifier, prepare_prompt
from zerotune.scoring import BackOff, PartialScores, score_items
from zerotune.splits import Example

FINGERPRINT_FILE = ".fingerprint.json"
# Beside a calibrated score, the same items without calibration.
PLAIN_METRICS = ("accuracy", "precision", "recall", "f1")


def choosing_values(labels: np.ndarray, log_probabilities: np.ndarray, choose_by: str) -> dict[str, float]:
    """eval_loss, eval_accuracy, eval_f1_macro of the choosing split, and "choose_by", where greater is better."""
    predictions = log_probabilities.argmax(axis=1)
    scores = confusion_scores(confusion_matrix(labels, predictions))
    loss = float(-log_probabilities[np.arange(len(labels)), labels].mean())
    values = {"loss": loss, "accuracy": float(scores["accuracy"]), "f1_macro": float(scores["f1_macro"])}
    better = -values[choose_by] if choose_by == "loss" else values[choose_by]
    return {f"eval_{name}": value for name, value in values.items()} | {"choose_by": better}


def evaluate_checkpoint(
    folder: Path,
    options: EvalOptions,
    task,
    examples: list[Example],
    accelerator,
    stop_signal,
    replace: bool = False,
    load_model: LoadModel = load_language_model,
) -> dict:
    """Load a model and evaluate it into a folder, all ranks together.

    Results of the same evaluation are used again, and an interrupted one goes on where it stopped. A classifier (a
    final/ folder, or a published one) answers with its head, a causal model without one by the likelihood of the label
    words, an encoder without one with an untrained head, so labelled.

    Args:
        task: a task module (zerotune.sst2): TASK, LABELS, MAX_LENGTH, WORDINGS.
        stop_signal: a StopSignal, heeded after each batch.
        replace: results of another evaluation in the folder make room.
        load_model: what gives a causal model; several evaluations may share one.
    Returns:
        The content of metrics.json.
    Raises:
        Refused: the folder holds another evaluation.
        Preempted: a rank was asked to stop; what is scored is kept.
    """
    config = read_config(options.model, options.revision)
    described = {"task": task.TASK, **asdict(options), "shots": len(options.shots), "dtype": options.precision}
    del described["precision"]  # here the name of a score
    fingerprint = described | {
        "shots": [asdict(shot) for shot in options.shots],
        "tokens_per_device": None,
        "prompt": task.WORDINGS[options.wording],
        "model_files": model_identity(options.model, options.revision),
        "versions": [metadata.version(name) for name in ("torch", "transformers")],
        "items": hashlib.sha256("\n".join(f"{e.id}\t{e.text}\t{e.label}" for e in examples).encode()).hexdigest(),
    }
    earlier = _finished_metrics(folder, fingerprint, replace)
    if earlier is not None:
        return earlier
    with without_zero_init(accelerator):
        if answers_by_prompt(config):
            ready = prepare_prompt(options, task, examples, config, accelerator.device, load_model)
        else:
            ready = prepare_classifier(options, task, examples, config, accelerator.device)
    partial = PartialScores(folder, fingerprint | {"tokens_per_device": options.tokens_per_device})
    batches = evaluation_batches(ready.lengths, options.tokens_per_device)
    score = BackOff(ready.score, ready.lengths)
    scores = score_items(score, batches, accelerator, partial, lambda: stop_signal.raise_when_noted(accelerator))
    if not np.isfinite(scores).all():
        broken = examples[int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])].id
        raise Refused(
            f"{options.model} gives scores that are not finite, first for {broken}: its weights are damaged, or "
            f"--precision {options.precision} is too narrow; try fp32"
        )
    metrics = described | ready.found | label_metrics(examples, scores)
    if ready.content_free is not None:
        plain = {name: value for name, value in metrics.items() if name.removesuffix("_ci95") in PLAIN_METRICS}
        scores = calibrate(scores, ready.content_free)
        metrics |= label_metrics(examples, scores) | {f"uncalibrated_{name}": value for name, value in plain.items()}
    if is_main_process():
        write_predictions(folder, examples, scores)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / FINGERPRINT_FILE, {"sha256": json_sha256(fingerprint)})
        partial.delete()
    accelerator.wait_for_everyone()
    return metrics


@contextlib.contextmanager
def without_zero_init(accelerator):
    """A context in which transformers loads a model whole, also under ZeRO-3: evaluation needs no shards."""
    plugin = accelerator.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # accelerate's zero3_init_context_manager leaves it set
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def _finished_metrics(folder: Path, fingerprint: dict, replace: bool) -> dict | None:
    marker = folder / FINGERPRINT_FILE
    if not marker.exists():
        return None
    if read_json(marker)["sha256"] == json_sha256(fingerprint):
        return read_json(folder / "metrics.json")
    if not replace:
        raise Refused(f"{folder} holds an evaluation of another model, items or settings: choose another --output-dir")
    return None


def label_metrics(examples: list[Example], log_probabilities: np.ndarray) -> dict:
    """The task's metrics; {"count": n} alone where the examples have no labels."""
    if examples[0].label is None:
        return {"count": len(examples)}
    labels = np.array([example.label for example in examples])
    return classification_metrics(labels, log_probabilities.argmax(axis=1))


def write_predictions(folder: Path, examples: list[Example], log_probabilities: np.ndarray) -> None:
    """predictions.jsonl; for unlabelled rows also submission.tsv in the form of GLUE's test server."""
    predictions = log_probabilities.argmax(axis=1).tolist()
    rows = [
        {"id": example.id, "label": example.label, "prediction": prediction, "scores": scores}
        for example, prediction, scores in zip(examples, predictions, log_probabilities.tolist(), strict=True)
    ]
    write_json_lines(folder / "predictions.jsonl", rows)
    if examples[0].label is None:
        lines = [f"{index}\t{prediction}\n" for index, prediction in enumerate(predictions)]
        write_text(folder / "submission.tsv", "index\tprediction\n" + "".join(lines))
