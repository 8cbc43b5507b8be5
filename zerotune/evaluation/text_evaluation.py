"""Evaluating a classifier or a prompt on labelled texts, and writing what came of it: shared by SST-2 and IMDB."""

import contextlib
import hashlib
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np

from zerotune.data.splits import Example
from zerotune.errors import Refused
from zerotune.evaluation.evaluation_options import EvalOptions, QuestionOptions, answers_by_prompt
from zerotune.evaluation.scorers import Answering, LoadModel, prepare_classifier, prepare_prompt
from zerotune.evaluation.scoring import BackOff, PartialScores, score_items
from zerotune.examples.batching import evaluation_batches
from zerotune.files import json_sha256, read_json, write_json, write_json_lines, write_text
from zerotune.models.language_model import load_language_model
from zerotune.models.model_files import model_identity
from zerotune.models.pretrained import read_config
from zerotune.prompts.prompting import calibrate
from zerotune.run.process import is_main_process, say
from zerotune.scores.metrics import UNPARSABLE, classification_metrics

FINGERPRINT_FILE = ".fingerprint.json"
# Beside a calibrated score, the same items without calibration.
PLAIN_METRICS = ("accuracy", "precision", "recall", "f1")


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
    fingerprint = fingerprint_of(described, options, [f"{e.id}\t{e.text}\t{e.label}" for e in examples]) | {
        "shots": [asdict(shot) for shot in options.shots],
        "prompt": task.WORDINGS[options.wording],
    }
    earlier = finished_metrics(folder, fingerprint, replace)
    if earlier is not None:
        return earlier
    with without_zero_init(accelerator):
        if answers_by_prompt(config):
            ready = prepare_prompt(options, task, examples, config, accelerator.device, load_model)
        else:
            ready = prepare_classifier(options, task, examples, config, accelerator.device)
    partial = partial_scores(folder, options, fingerprint)
    batches = evaluation_batches(ready.lengths, options.tokens_per_device)
    score = BackOff(ready.score, ready.lengths)
    scores = score_items(score, batches, accelerator, partial, lambda: stop_signal.raise_when_noted(accelerator))
    check_finite(scores, [example.id for example in examples], options)
    metrics = described | ready.found
    if ready.content_free is not None:
        plain = label_metrics(examples, scores.argmax(axis=1).tolist())
        kept = [name for name in plain if name.removesuffix("_ci95") in PLAIN_METRICS]
        metrics |= {f"uncalibrated_{name}": plain[name] for name in kept}
        scores = calibrate(scores, ready.content_free)
    predictions, details = _predictions(ready, scores)
    metrics |= label_metrics(examples, predictions)
    if ready.read is not None:
        num_unparsable = predictions.count(None)
        metrics |= {"num_unparsable": num_unparsable, "unparsable_share": num_unparsable / len(predictions)}
    if is_main_process():
        write_predictions(folder, examples, predictions, details)
        mark_finished(folder, metrics, fingerprint, partial)
    accelerator.wait_for_everyone()
    return metrics


def fingerprint_of(described: dict, options: EvalOptions | QuestionOptions, items: list[str]) -> dict:
    """All that an evaluation's results depend on: what is `described`, the model's files, and the items as lines."""
    return described | {
        "tokens_per_device": None,
        "model_files": model_identity(options.model, options.revision),
        "versions": [metadata.version(name) for name in ("torch", "transformers")],
        "items": hashlib.sha256("\n".join(items).encode()).hexdigest(),
    }


def partial_scores(folder: Path, options: EvalOptions | QuestionOptions, fingerprint: dict) -> PartialScores:
    """Where an evaluation keeps the scores of finished batches; another cut into batches begins again."""
    return PartialScores(folder, fingerprint | {"tokens_per_device": options.tokens_per_device})


def check_finite(scores: np.ndarray, ids: list[str], options: EvalOptions | QuestionOptions) -> None:
    """Raises Refused, naming the first item, for scores [items, numbers] that are not finite."""
    if not np.isfinite(scores).all():
        broken = ids[int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])]
        raise Refused(
            f"{options.model} gives scores that are not finite, first for {broken}: its weights are damaged, or "
            f"--precision {options.precision} is too narrow; try fp32"
        )


def mark_finished(folder: Path, metrics: dict, fingerprint: dict, partial: PartialScores) -> None:
    """Write metrics.json and what tells the same evaluation again, and drop the scores of single batches."""
    write_json(folder / "metrics.json", metrics)
    write_json(folder / FINGERPRINT_FILE, {"sha256": json_sha256(fingerprint)})
    partial.delete()


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


def finished_metrics(folder: Path, fingerprint: dict, replace: bool) -> dict | None:
    """metrics.json of the same evaluation, None where it is yet to be done. Raises Refused as evaluate_checkpoint."""
    marker = folder / FINGERPRINT_FILE
    if not marker.exists():
        return None
    if read_json(marker)["sha256"] == json_sha256(fingerprint):
        return read_json(folder / "metrics.json")
    if not replace:
        raise Refused(f"{folder} holds an evaluation of another model, items or settings: choose another --output-dir")
    return None


def _predictions(ready: Answering, scores: np.ndarray) -> tuple[list[int | None], dict[str, list]]:
    """The label of each item, None where an answer holds none, and what predictions.jsonl says beside it."""
    if ready.read is None:
        return scores.argmax(axis=1).tolist(), {"scores": scores.tolist()}
    texts, predictions = ready.read(scores)
    return predictions, {"answer": texts}


def label_metrics(examples: list[Example], predictions: list[int | None]) -> dict:
    """The task's metrics; {"count": n} alone where the examples have no labels. None is an unparsable prediction."""
    if examples[0].label is None:
        return {"count": len(examples)}
    labels = np.array([example.label for example in examples])
    return classification_metrics(labels, [UNPARSABLE if one is None else one for one in predictions])


def write_predictions(
    folder: Path, examples: list[Example], predictions: list[int | None], details: dict[str, list]
) -> None:
    """predictions.jsonl; for unlabelled rows also submission.tsv in the form of GLUE's test server.

    Args:
        details: what else a line holds, by name: a value for each example.
    """
    rows = [
        {"id": example.id, "label": example.label, "prediction": prediction}
        | {name: values[number] for name, values in details.items()}
        for number, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
    ]
    write_json_lines(folder / "predictions.jsonl", rows)
    if examples[0].label is None:
        if None in predictions:
            say("submission.tsv is not written: it needs a label for every row, and some answers hold none")
            return
        lines = [f"{index}\t{prediction}\n" for index, prediction in enumerate(predictions)]
        write_text(folder / "submission.tsv", "index\tprediction\n" + "".join(lines))
