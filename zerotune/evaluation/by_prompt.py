"""Causal models that answer with label words after a prompt: by the words' likelihood, or by writing one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from zerotune.errors import Refused
from zerotune.evaluation.by_head import likeliest, log_probabilities
from zerotune.evaluation.generation import EXTRA_TOKENS, answer_texts, end_tokens, parse_answer, write_answers
from zerotune.evaluation.options import TextEvaluation, generator_record, training_description
from zerotune.evaluation.scoring import PreparedModel, Scorer
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.parameters import published_table
from zerotune.models.pretrained import load_tokenizer
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
from zerotune.training.batches import evaluation_batches
from zerotune.training.generation import answer_window, recorded_prompt

LoadModel = Callable[[ModelSettings, torch.device], torch.nn.Module]
ReadLabels = Callable[[list[dict]], PredictedLabels]


def prepare_prompt(
    evaluation: TextEvaluation, task, examples: list[Example], config, device: torch.device, load_model: LoadModel
) -> PreparedModel:
    """Load a causal model to answer with label words, as published or tuned.

    Raises:
        Refused: before a weight is loaded, for shots that do not fit the model's window.
    """
    loaded = evaluation.model
    tokenizer, window = load_tokenizer(loaded.name, loaded.revision), config.max_position_embeddings
    record = generator_record(loaded)
    if record is None:
        asking = _published_asking(evaluation, task, tokenizer, window)
    else:
        if record["method"] == "qlora":
            loaded = replace(loaded, method="qlora")
        asking = _tuned_asking(evaluation, task, tokenizer, window, record)
    data = asking.encode(tokenizer, [example.text for example in examples])
    _say_what_is_cut(asking.description, data.num_truncated, len(examples))
    writes = evaluation.prompt.answer_by == "generation"
    costs = data.context_lengths if writes else data.lengths
    batches = evaluation_batches(costs, evaluation.tokens_per_device)
    if writes:  # prompt by prompt, nothing is shared
        num_shared, shapes = 0, [(len(batch), costs[batch].max()) for batch in batches]
    else:
        num_shared = data.num_shared
        shapes = [(len(batch) * data.rows_per_item, data.longest_own(batch)) for batch in batches]
    say(describe_memory(scoring_memory(config, loaded, published_table(config)["total"], num_shared, shapes)))
    model = load_model(loaded, device)
    if writes:
        score, read = _by_writing(model, data, tokenizer, asking.prompt, device)
    else:
        score, read = prompt_scorer(model, data, device), likeliest
        if evaluation.prompt.calibrate == "contextual":
            free = asking.encode(tokenizer, list(CONTENT_FREE_TEXTS))
            read = partial(_likeliest_calibrated, content_free=_log_likelihoods(model, free, device))
    description = asking.description | {
        "prompt_format": "chat" if asking.prompt.chat else "plain",
        "prompt": asking.prompt.template,
        "label_words": list(asking.prompt.label_words),
        "num_shared_tokens": data.num_shared,
        "num_truncated": data.num_truncated,
    }
    return PreparedModel(score, costs, batches, description, read)


def prompt_scorer(model, data: PromptData, device: torch.device) -> Scorer:
    """Return a scorer that gives the "log_probabilities" of a causal model's label words, among each other."""
    prefix = data.prefix(model, device)

    def score(items: np.ndarray) -> list[dict]:
        found = normalise(data.log_likelihoods(model, items, device, prefix)).tolist()
        return [{"log_probabilities": values} for values in found]

    return score


def _likeliest_calibrated(records: list[dict], content_free: np.ndarray) -> PredictedLabels:
    """Return the likeliest label of each item, by log-probabilities calibrated with those of `_log_likelihoods`."""
    plain = log_probabilities(records)
    scores = calibrate(plain, content_free)
    return PredictedLabels(scores.argmax(axis=1).tolist(), {"scores": scores.tolist()}, plain.argmax(axis=1).tolist())


@torch.no_grad()
def _log_likelihoods(model, data: PromptData, device: torch.device) -> np.ndarray:
    """Return the label words' log-likelihoods after a few prompts, one by one: [prompts, labels]."""
    numbers = range(len(data.lengths))
    return np.concatenate([data.log_likelihoods(model, np.array([number]), device) for number in numbers])


def _by_writing(model, data: PromptData, tokenizer, prompt: Prompt, device: torch.device) -> tuple[Scorer, ReadLabels]:
    """Return the scorer of a model that writes its answers, and the function that reads labels in them."""
    ends = end_tokens(model, tokenizer, prompt)
    longest = 1 if data.single_token else max(map(len, data.targets))

    def score(items: np.ndarray) -> list[dict]:
        prompts = [data.context(item) for item in items]
        written = write_answers(model, prompts, data.pad_id, ends, longest + EXTRA_TOKENS, device)
        return [{"tokens": tokens} for tokens in written]

    def read(records: list[dict]) -> PredictedLabels:
        texts = answer_texts(tokenizer, records)
        labels = [parse_answer(text, prompt.label_words) for text in texts]
        return PredictedLabels(labels, {"answer": texts}, written=True)

    return score, read


@dataclass(frozen=True)
class _Asking:
    """How items are put to a model.

    Attributes:
        max_text_tokens: most tokens of a text.
        most_tokens: most tokens of a prompt with its answer.
        description: what metrics.json says of it.
    """

    prompt: Prompt
    max_text_tokens: int
    most_tokens: int
    description: dict

    def encode(self, tokenizer, texts: list[str]) -> PromptData:
        """Return the prompts of some texts."""
        return encode_prompts(tokenizer, self.prompt, texts, self.max_text_tokens, self.most_tokens)


def _published_asking(evaluation: TextEvaluation, task, tokenizer, window: int) -> _Asking:
    chat = uses_chat(evaluation.prompt.format, tokenizer, evaluation.model.name)
    template, label_words = task.WORDINGS[evaluation.wording]
    shots, num_shots_cut = fit_shots(tokenizer, evaluation.shots, window)
    max_length = evaluation.text.max_length or task.MAX_LENGTH
    description = {
        "setting": f"{len(shots)}-shot prompt" if shots else "zero-shot prompt",
        "head": "prompt",
        "method": None,
        "max_length": max_length,
        "shot_ids": [shot.id for shot in shots],
        "num_shots_truncated": num_shots_cut,
    }
    prompt = Prompt(template, label_words, chat, tuple((shot.text, shot.label) for shot in shots))
    if evaluation.as_generator:
        most = answer_window(tokenizer, prompt, max_length, window)
        return _Asking(prompt, most, most, description)
    return _Asking(prompt, max_length, window, description)


def _tuned_asking(evaluation: TextEvaluation, task, tokenizer, window: int, record: dict) -> _Asking:
    """Return how a tuned generator is asked: as it was trained, in its own words and cut to the same rows."""
    name = evaluation.model.name
    if record["labels"] != list(task.LABELS):
        raise Refused(
            f"the model's labels must be the task's, {', '.join(task.LABELS)}: {name} was tuned for "
            f"{', '.join(record['labels'])}"
        )
    max_length = evaluation.text.max_length or record["max_length"]
    description = {
        "setting": "tuned generator",
        "head": "generate",
        **training_description(record, name, evaluation.seed),
        "max_length": max_length,
        "shot_ids": [],
        "num_shots_truncated": 0,
    }
    prompt = recorded_prompt(record["prompt"])
    most = answer_window(tokenizer, prompt, max_length, window)
    return _Asking(prompt, most, most, description)


def _say_what_is_cut(description: dict, num_truncated: int, num_items: int) -> None:
    num_shots, num_shots_cut = len(description["shot_ids"]), description["num_shots_truncated"]
    if num_shots_cut:
        say(f"prompt: {num_shots_cut} of {num_shots} shots cut in the middle, to half of the window")
    if num_truncated:
        say(f"prompt: {num_truncated:,} of {num_items:,} texts cut in the middle to fit")
