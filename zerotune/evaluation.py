"""Evaluating a classifier or a prompt on labelled texts, and writing what came of it: shared by SST-2 and IMDB."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from zerotune.answers import AnswerData
from zerotune.batching import evaluation_batches
from zerotune.data import LabelledData
from zerotune.encoding import default_cache_dir, encode_texts
from zerotune.errors import Refused
from zerotune.files import json_sha256, read_json, write_json, write_json_lines, write_text
from zerotune.final_folder import load_final_or_base
from zerotune.heads import is_encoder
from zerotune.language_model import load_language_model
from zerotune.metrics import classification_metrics, confusion_matrix, confusion_scores
from zerotune.model_files import model_identity
from zerotune.models import attention_kernel
from zerotune.precision import autocast
from zerotune.pretrained import (
    check_token_ids,
    check_window,
    is_trained_classifier,
    load_tokenizer,
    most_tokens,
    read_config,
)
from zerotune.prompting import (
    CONTENT_FREE_TEXTS,
    Prompt,
    PromptData,
    calibrate,
    encode_prompts,
    normalise,
    uses_chat,
)
from zerotune.runs import is_main_process
from zerotune.scoring import PartialScores, score_items
from zerotune.splits import Example

UNLABELLED = -100
FINGERPRINT_FILE = ".fingerprint.json"
DEFAULT_MAX_LENGTH = 256

Scorer = Callable[[np.ndarray], np.ndarray]


def labelled_data(tokenizer, examples: list[Example], max_length: int) -> LabelledData:
    """Examples tokenised for a classifier head, from the cache where it has them."""
    encoded = encode_texts(tokenizer, [example.text for example in examples], max_length, default_cache_dir())
    labels = np.array([UNLABELLED if example.label is None else example.label for example in examples], dtype=np.int64)
    return LabelledData([example.id for example in examples], encoded, labels, tokenizer.pad_token_id)


def classifier_scorer(model, data: LabelledData, device: torch.device, precision: str) -> Scorer:
    """indices [batch] -> log-probabilities [batch, labels] of a `SequenceClassifier` (or an engine's wrapped one)."""

    def score(rows: np.ndarray) -> np.ndarray:
        with autocast(device.type, precision):
            return data.scores(model, rows, device)

    return score


def prompt_scorer(model, data: PromptData, content_free: PromptData | None, device: torch.device) -> Scorer:
    """indices [batch] -> log-probabilities [batch, labels] of a causal model's label words.

    They are calibrated by the content-free prompts, where there are some.
    """
    baseline, prefix = None, data.prefix(model, device)
    if content_free is not None:
        with torch.no_grad():
            numbers = range(len(content_free.lengths))
            baseline = np.concatenate([content_free.log_likelihoods(model, np.array([n]), device) for n in numbers])

    def score(items: np.ndarray) -> np.ndarray:
        likelihoods = data.log_likelihoods(model, items, device, prefix)
        return normalise(likelihoods) if baseline is None else calibrate(likelihoods, baseline)

    return score


def choosing_values(data: LabelledData | AnswerData, found: np.ndarray, choose_by: str) -> dict[str, float]:
    """eval_loss, eval_accuracy, eval_f1_macro of the choosing split, and "choose_by", where greater is better.

    Args:
        found: what `data.scores` gave for all examples.
    """
    predictions = data.log_probabilities(found).argmax(axis=1)
    scores = confusion_scores(confusion_matrix(data.labels, predictions))
    values = {"loss": data.mean_loss(found)} | {name: float(scores[name]) for name in ("accuracy", "f1_macro")}
    better = -values[choose_by] if choose_by == "loss" else values[choose_by]
    return {f"eval_{name}": value for name, value in values.items()} | {"choose_by": better}


@dataclass(frozen=True)
class EvalOptions:
    """How a checkpoint is evaluated.

    `shots` are (text, label) pairs; `max_length` None is what the model folder says; `data_sha256` tells the source of
    the items from others, whose ids may be the same.
    """

    model: str
    revision: str | None
    attention: str
    precision: str
    tokens_per_device: int
    max_length: int | None = None
    load_4bit: bool = False
    prompt_format: str = "auto"
    calibrate: str = "none"
    shots: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    data_sha256: str | None = None


def answers_by_prompt(config) -> bool:
    """Whether a checkpoint has only an LM head to answer with."""
    return not is_trained_classifier(config) and not is_encoder(config)


def check_options(options: EvalOptions, config, tokenizer) -> None:
    """Refuse what this checkpoint would ignore or cannot do, before a weight is loaded."""
    attention_kernel(options.attention, config)
    if answers_by_prompt(config):
        uses_chat(options.prompt_format, tokenizer, options.model)
        return
    if options.max_length is not None:
        check_window(options.model, config, options.max_length)
    given = {
        "--shots": options.shots,
        "--calibrate": options.calibrate != "none",
        "--prompt-format": options.prompt_format != "auto",
    }
    ignored = [flag for flag, is_given in given.items() if is_given]
    if ignored:
        raise Refused(
            f"{options.model} answers with a classifier head, which has no use for {', '.join(ignored)}: leave it out"
        )


def evaluate_checkpoint(
    folder: Path, options: EvalOptions, task, examples: list[Example], accelerator, stop_signal, replace: bool = False
) -> dict:
    """Load a model and evaluate it into a folder, all ranks together.

    Results of the same evaluation are used again, and an interrupted one goes on where it stopped. A classifier (a
    final/ folder, or a published one) answers with its head, a causal model without one by the likelihood of the label
    words, an encoder without one with an untrained head, so labelled.

    Args:
        task: a task module (zerotune.sst2): TASK, LABELS, PROMPT, LABEL_WORDS.
        stop_signal: a StopSignal, heeded after each batch.
        replace: results of another evaluation in the folder make room.
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
        "shots": options.shots,
        "tokens_per_device": None,
        "prompt": (task.PROMPT, task.LABEL_WORDS),
        "model_files": model_identity(options.model, options.revision),
        "versions": [metadata.version(name) for name in ("torch", "transformers")],
        "items": hashlib.sha256("\n".join(f"{e.id}\t{e.text}\t{e.label}" for e in examples).encode()).hexdigest(),
    }
    earlier = _finished_metrics(folder, fingerprint, replace)
    if earlier is not None:
        return earlier
    prepare = _prepare_prompt if answers_by_prompt(config) else _prepare_classifier
    with without_zero_init(accelerator):
        score, lengths, found = prepare(options, task, examples, config, accelerator.device)
    partial = PartialScores(folder, fingerprint | {"tokens_per_device": options.tokens_per_device})
    batches = evaluation_batches(lengths, options.tokens_per_device)
    scores = score_items(score, batches, accelerator, partial, lambda: stop_signal.raise_when_noted(accelerator))
    if not np.isfinite(scores).all():
        broken = examples[int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])].id
        raise Refused(
            f"{options.model} gives scores that are not finite, first for {broken}: its weights are damaged, or "
            f"--precision {options.precision} is too narrow; try fp32"
        )
    metrics = described | found | label_metrics(examples, scores)
    if is_main_process():
        write_predictions(folder, examples, scores)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / FINGERPRINT_FILE, {"sha256": json_sha256(fingerprint)})
        partial.delete()
    accelerator.wait_for_everyone()
    return metrics


def _prepare_prompt(options: EvalOptions, task, examples, config, device) -> tuple[Scorer, np.ndarray, dict]:
    tokenizer = load_tokenizer(options.model, options.revision)
    chat = uses_chat(options.prompt_format, tokenizer, options.model)
    prompt = Prompt(task.PROMPT, task.LABEL_WORDS, chat, options.shots)
    max_length, window = options.max_length or DEFAULT_MAX_LENGTH, config.max_position_embeddings

    def encode(texts: list[str]) -> PromptData:
        return encode_prompts(tokenizer, prompt, texts, max_length, window)

    data = encode([example.text for example in examples])
    content_free = encode(list(CONTENT_FREE_TEXTS)) if options.calibrate == "contextual" else None
    model = load_language_model(options, device)
    found = {
        "setting": f"{len(options.shots)}-shot prompt" if options.shots else "zero-shot prompt",
        "head": "prompt",
        "method": None,
        "prompt_format": "chat" if chat else "plain",
        "prompt": task.PROMPT,
        "label_words": task.LABEL_WORDS,
        "num_truncated": data.num_truncated,
    }
    return prompt_scorer(model, data, content_free, device), data.lengths, found


def _prepare_classifier(options: EvalOptions, task, examples, config, device) -> tuple[Scorer, np.ndarray, dict]:
    model, tokenizer, record = load_final_or_base(
        options.model,
        task.LABELS,
        revision=options.revision,
        precision=options.precision,
        attention=options.attention,
        load_4bit=options.load_4bit,
    )
    record = record or {}
    trained = bool(record) or is_trained_classifier(config)
    default = min(DEFAULT_MAX_LENGTH, most_tokens(config) or DEFAULT_MAX_LENGTH)
    max_length = options.max_length or record.get("max_length", default)
    data = labelled_data(tokenizer, examples, max_length)
    check_token_ids(options.model, config, data.encoded.ids)
    found = {
        "setting": "classifier head" if trained else "untrained head",
        "head": "classify",
        "method": record.get("method"),
        "model": record.get("base_model", options.model),
        "seed": record.get("seed", options.seed),
        "training_sha256": record.get("training_sha256"),
        "max_length": max_length,
        "prompt_format": None,
        "num_truncated": data.encoded.num_truncated,
    }
    return classifier_scorer(model.to(device), data, device, options.precision), data.lengths, found


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
