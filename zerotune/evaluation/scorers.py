"""What answers for each item of an evaluation: a classifier head, or the label words after a prompt."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from zerotune.errors import Refused
from zerotune.evaluation.generation import EXTRA_TOKENS, answer_texts, end_tokens, parse_answer, write_answers
from zerotune.evaluation.options import EvalOptions, generator_record, loaded_model, trained_as
from zerotune.evaluation.scoring import PreparedModel, Scorer
from zerotune.files import default_cache_dir
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.final_folder import load_final_or_base
from zerotune.models.parameters import published_table
from zerotune.models.precision import autocast
from zerotune.models.pretrained import check_token_ids, is_trained_classifier, load_tokenizer, most_tokens
from zerotune.run.plan import describe_memory, scoring_memory
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.cutting import fit_shots
from zerotune.tasks.prompts import (
    CONTENT_FREE_TEXTS,
    Prompt,
    PromptData,
    calibrate,
    encode_prompts,
    normalise,
    uses_chat,
)
from zerotune.tasks.splits import Example
from zerotune.tasks.tokens import encode_texts
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import LabelledData
from zerotune.training.generation import answer_window, recorded_prompt

UNLABELLED = -100

LoadModel = Callable[[ModelSettings, torch.device], torch.nn.Module]


def labelled_data(tokenizer, examples: list[Example], max_length: int, truncation: str) -> LabelledData:
    """Examples tokenised for a classifier head, from the cache where it has them."""
    texts = [example.text for example in examples]
    encoded = encode_texts(tokenizer, texts, max_length, default_cache_dir(), truncation)
    labels = np.array([UNLABELLED if example.label is None else example.label for example in examples], dtype=np.int64)
    return LabelledData([example.id for example in examples], encoded, labels, tokenizer.pad_token_id)


def classifier_scorer(model, data: LabelledData, device: torch.device, precision: str) -> Scorer:
    """Return what gives the records of `data.scores` for a model with a head (or an engine's wrapped one)."""

    def score(rows: np.ndarray) -> list[dict]:
        with autocast(device.type, precision):
            return data.scores(model, rows, device)

    return score


def likeliest(records: list[dict], content_free: np.ndarray | None = None) -> PredictedLabels:
    """Return the likeliest label of each item.

    Args:
        records: each with the labels' "log_probabilities".
        content_free: log-likelihoods [inputs, labels] of the content-free prompts, to calibrate by.
    """
    scores = np.array([record["log_probabilities"] for record in records], dtype=np.float32)
    plain = scores.argmax(axis=1).tolist()
    if content_free is None:
        return PredictedLabels(plain, {"scores": scores.tolist()})
    calibrated = calibrate(scores, content_free)
    return PredictedLabels(calibrated.argmax(axis=1).tolist(), {"scores": calibrated.tolist()}, uncalibrated=plain)


def prompt_scorer(model, data: PromptData, device: torch.device) -> Scorer:
    """Return what gives the "log_probabilities" of a causal model's label words, among each other."""
    prefix = data.prefix(model, device)

    def score(items: np.ndarray) -> list[dict]:
        found = normalise(data.log_likelihoods(model, items, device, prefix)).tolist()
        return [{"log_probabilities": values} for values in found]

    return score


def _written_answers(
    model, data: PromptData, tokenizer, prompt: Prompt, device: torch.device
) -> tuple[Scorer, Callable[[list[dict]], PredictedLabels]]:
    """(`score`, `read`) of a model that writes its answers."""
    ends = end_tokens(model, tokenizer, prompt)
    longest = 1 if data.single_token else max(map(len, data.targets))

    def score(items: np.ndarray) -> list[dict]:
        rows = [data.context(item) for item in items]
        written = write_answers(model, rows, data.pad_id, ends, longest + EXTRA_TOKENS, device)
        return [{"tokens": tokens} for tokens in written]

    def read(records: list[dict]) -> PredictedLabels:
        texts = answer_texts(tokenizer, records)
        labels = [parse_answer(text, prompt.label_words) for text in texts]
        return PredictedLabels(labels, {"answer": texts}, written=True)

    return score, read


@dataclass(frozen=True)
class _Asked:
    """How the items are asked: a prompt, most tokens of a text, most of prompt and answer, what metrics.json says."""

    prompt: Prompt
    max_text_tokens: int
    most_tokens: int
    found: dict


def _untuned_prompt(options: EvalOptions, task, tokenizer, window: int) -> _Asked:
    chat = uses_chat(options.prompt_format, tokenizer, options.model)
    template, label_words = task.WORDINGS[options.wording]
    shots, num_shots_cut = fit_shots(tokenizer, options.shots, window)
    found = {
        "setting": f"{len(shots)}-shot prompt" if shots else "zero-shot prompt",
        "head": "prompt",
        "method": None,
        "max_length": options.max_length or task.MAX_LENGTH,
        "shot_ids": [shot.id for shot in shots],
        "num_shots_truncated": num_shots_cut,
    }
    prompt = Prompt(template, label_words, chat, tuple((shot.text, shot.label) for shot in shots))
    if options.as_generator:
        most = answer_window(tokenizer, prompt, found["max_length"], window)
        return _Asked(prompt, most, most, found)
    return _Asked(prompt, found["max_length"], window, found)


def _tuned_prompt(options: EvalOptions, task, tokenizer, window: int, record: dict) -> _Asked:
    """A tuned generator is asked as it was trained: in its own words and cut to the same rows."""
    if record["labels"] != list(task.LABELS):
        raise Refused(
            f"the model's labels must be the task's, {', '.join(task.LABELS)}: {options.model} was tuned for "
            f"{', '.join(record['labels'])}"
        )
    found = {
        "setting": "tuned generator",
        "head": "generate",
        **trained_as(record, options),
        "max_length": options.max_length or record["max_length"],
        "shot_ids": [],
        "num_shots_truncated": 0,
    }
    prompt = recorded_prompt(record["prompt"])
    most = answer_window(tokenizer, prompt, found["max_length"], window)
    return _Asked(prompt, most, most, found)


def prepare_prompt(
    options: EvalOptions, task, examples: list[Example], config, device: torch.device, load_model: LoadModel
) -> PreparedModel:
    """A causal model that answers with the label words, by their likelihood or in writing, as published or tuned.

    Raises Refused, before a weight is loaded, for shots that do not fit the model's window."""
    tokenizer, window = load_tokenizer(options.model, options.revision), config.max_position_embeddings
    record = generator_record(options)
    if record is None:
        asked = _untuned_prompt(options, task, tokenizer, window)
    else:
        options = replace(options, load_4bit=options.load_4bit or record["method"] == "qlora")
        asked = _tuned_prompt(options, task, tokenizer, window, record)
    prompt = asked.prompt

    def encode(texts: list[str]) -> PromptData:
        return encode_prompts(tokenizer, prompt, texts, asked.max_text_tokens, asked.most_tokens)

    data = encode([example.text for example in examples])
    found = asked.found | {
        "prompt_format": "chat" if prompt.chat else "plain",
        "prompt": prompt.template,
        "label_words": list(prompt.label_words),
        "num_shared_tokens": data.num_shared,
        "num_truncated": data.num_truncated,
    }
    _say_what_is_cut(found, len(examples))
    writes = options.answer_by == "generation"  # prompt by prompt, nothing of them shared
    lengths = data.context_lengths if writes else data.lengths
    batches = evaluation_batches(lengths, options.tokens_per_device)
    own = [lengths[batch].max() if writes else data.longest_own(batch) for batch in batches]
    largest = [
        (len(batch) * (1 if writes else data.rows_per_item), most) for batch, most in zip(batches, own, strict=True)
    ]
    num_shared = 0 if writes else data.num_shared
    say(describe_memory(scoring_memory(config, options, published_table(config)["total"], num_shared, largest)))
    model = load_model(loaded_model(options), device)
    if writes:
        score, read = _written_answers(model, data, tokenizer, prompt, device)
        return PreparedModel(score, lengths, batches, found, read)
    read = likeliest
    if options.calibrate == "contextual":
        free = encode(list(CONTENT_FREE_TEXTS))
        with torch.no_grad():
            numbers = range(len(CONTENT_FREE_TEXTS))
            content_free = np.concatenate([free.log_likelihoods(model, np.array([n]), device) for n in numbers])
        read = partial(likeliest, content_free=content_free)
    return PreparedModel(prompt_scorer(model, data, device), lengths, batches, found, read)


def _say_what_is_cut(found: dict, num_items: int) -> None:
    num_shots = len(found["shot_ids"])
    if found["num_shots_truncated"]:
        say(f"prompt: {found['num_shots_truncated']} of {num_shots} shots cut in the middle, to half of the window")
    if found["num_truncated"]:
        say(f"prompt: {found['num_truncated']:,} of {num_items:,} texts cut in the middle to fit")


def prepare_classifier(
    options: EvalOptions, task, examples: list[Example], config, device: torch.device
) -> PreparedModel:
    """A model that answers with a classifier head: a final/ folder's, a published one, or an untrained one."""
    model, tokenizer, record = load_final_or_base(loaded_model(options), task.LABELS)
    record = record or {}
    trained = bool(record) or is_trained_classifier(config)
    default = min(task.MAX_LENGTH, most_tokens(config) or task.MAX_LENGTH)
    max_length = options.max_length or record.get("max_length", default)
    truncation = record.get("truncation", options.truncation)
    data = labelled_data(tokenizer, examples, max_length, truncation)
    check_token_ids(options.model, config, data.encoded.ids)
    found = {
        "setting": "classifier head" if trained else "untrained head",
        "head": "classify",
        **trained_as(record, options),
        "max_length": max_length,
        "truncation": truncation,
        "prompt_format": None,
        "num_truncated": data.encoded.num_truncated,
    }
    score = classifier_scorer(model.to(device), data, device, options.precision)
    batches = evaluation_batches(data.lengths, options.tokens_per_device)
    return PreparedModel(score, data.lengths, batches, found, likeliest)
