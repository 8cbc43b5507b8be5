"""Evaluate causal models by a prompt that asks for a label word: by the words' likelihood, or by writing one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain

import numpy as np
import torch

from zerotune.errors import Refused, listed
from zerotune.evaluation.by_head import likeliest
from zerotune.evaluation.generation import (
    EXTRA_TOKENS,
    BranchWriter,
    answer_texts,
    end_tokens,
    parse_answer,
    write_answers,
)
from zerotune.evaluation.options import TextEvaluation, training_description
from zerotune.evaluation.scoring import PreparedModel, Scorer
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.branches import branch_rows, can_share
from zerotune.models.generator import load_language_model
from zerotune.models.model_files import generator_record
from zerotune.models.parameters import published_table
from zerotune.models.pretrained import check_token_ids, most_tokens
from zerotune.models.shared_prefix import keeps_keys_and_values
from zerotune.run.plan import ScoringMemory, describe_memory, scoring_memory
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.cutting import fit_shots
from zerotune.tasks.prompts import (
    CONTENT_FREE_TEXTS,
    Prompt,
    PromptData,
    answers_overlap,
    calibrate,
    encode_prompts,
    log_softmax,
    uses_chat,
)
from zerotune.tasks.splits import Example
from zerotune.tasks.texts import joined_pair
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import log_probabilities
from zerotune.training.generation import answer_window, end_of_answer, line_break, recorded_prompt


class SharedModel:
    """A causal model for the evaluations that share it: its tokenizer, and its weights, loaded by the first one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.load = cache(load_language_model)


@dataclass(frozen=True)
class PromptPlan:
    """How a causal model is asked for labels, known before a weight is loaded.

    Attributes:
        settings: those to load the model with.
        encode: texts -> their prompts with the answers (PromptData), each cut to fit.
        description: the entries of metrics.json about it.
    """

    prompt: Prompt
    settings: ModelSettings
    encode: Callable[..., PromptData]
    description: dict

    def checked(self, data: PromptData, config) -> PromptData:
        """Return prompts after checking that their tokens, except those of the texts, have embeddings.

        Prompts for a model that does not keep keys and values share no tokens.
        """
        if not keeps_keys_and_values(config):
            data = replace(data, num_shared=0)
        # apart from the texts, which `check_texts` checks, all prompts have the same tokens
        first = [*data.context(0), *chain.from_iterable(data.targets[: len(self.prompt.label_words)])]
        check_token_ids(self.settings.name, config, np.array(first))
        return data


def plan_prompt(evaluation: TextEvaluation, task, config, tokenizer) -> PromptPlan:
    """Plan how a published or tuned causal model is asked.

    Raises:
        Refused: shots do not fit the model's window, or it was tuned for other labels.
    """
    loaded, record = evaluation.model, generator_record(evaluation.model)
    window = most_tokens(config)
    if record is None:
        prompt, description = _published_prompt(evaluation, task, tokenizer, window)
    else:
        prompt, description = _tuned_prompt(evaluation, task, record)
        if record["method"] == "qlora":
            loaded = replace(loaded, method="qlora")
    max_text_tokens = description["max_length"]
    if record is not None or evaluation.as_generator:  # text, prompt and answer together
        max_text_tokens = window = answer_window(tokenizer, prompt, max_text_tokens, window)
    end = []
    if answers_overlap(tokenizer, prompt):
        is_tuned = record is not None
        end = end_of_answer(tokenizer, prompt) if is_tuned or prompt.chat else line_break(tokenizer)
        window -= 0 if is_tuned or evaluation.as_generator else len(end)
    encode = partial(encode_prompts, tokenizer, prompt, max_text_tokens=max_text_tokens, window=window, end=end)
    return PromptPlan(prompt, loaded, encode, description)


def prepare_prompt(
    evaluation: TextEvaluation,
    task,
    examples: list[Example],
    config,
    device: torch.device,
    shared: SharedModel,
) -> PreparedModel:
    """Load a published or tuned causal model that answers with label words.

    Raises:
        Refused: before a weight is loaded, as in `plan_prompt` and for texts that do not fit.
    """
    tokenizer = shared.tokenizer
    plan = plan_prompt(evaluation, task, config, tokenizer)
    prompt, loaded, encode = plan.prompt, plan.settings, plan.encode
    data = plan.checked(encode(texts=[example.text for example in examples]), config)
    description = plan.description | {
        "prompt_format": "chat" if prompt.chat else "plain",
        "prompt": prompt.template,
        "label_words": list(prompt.label_words),
        "instruction": prompt.instruction,
        "num_shared_tokens": data.num_shared,
        "num_truncated": data.num_truncated,
    }
    _say_what_is_cut(description, len(examples))
    costs, batches, memory = prompt_batches(evaluation, plan, data, config)
    say(f"evaluation, {describe_memory(memory)}")
    model = shared.load(loaded, device)
    if evaluation.prompt.answer_by == "generation":
        score = _writing_scorer(model, data, tokenizer, prompt, device, in_step=loaded.divides_layers)
        read = partial(_read_written, tokenizer, prompt)
    else:
        score, read = prompt_scorer(model, data, device), likeliest
    if evaluation.prompt.calibrate == "contextual":
        names = task.pair_names or task.pair_columns
        free = encode(texts=[joined_pair(names, (text, text)) if names else text for text in CONTENT_FREE_TEXTS])
        read = partial(_likeliest_calibrated, _log_likelihoods(model, free, device))
    return PreparedModel(score, costs, batches, description, read, in_step=loaded.divides_layers)


def prompt_batches(
    evaluation: TextEvaluation, plan: PromptPlan, data: PromptData, config
) -> tuple[np.ndarray, list[np.ndarray], ScoringMemory]:
    """Return the cost of each item in tokens, the batches, and the memory of a device that scores them."""
    writes = evaluation.prompt.answer_by == "generation"
    costs = data.context_lengths if writes else data.lengths
    batches = evaluation_batches(costs, evaluation.tokens_per_device)
    if writes:  # each row has a copy of the shared keys and values
        num_shared, shapes = 0, [(len(batch), costs[batch].max()) for batch in batches]
    else:
        num_shared = data.num_shared
        shapes = [(len(batch) * data.rows_per_item, data.longest_own(batch)) for batch in batches]
    return costs, batches, scoring_memory(config, plan.settings, published_table(config), num_shared, shapes)


def _published_prompt(evaluation: TextEvaluation, task, tokenizer, window: int) -> tuple[Prompt, dict]:
    """Return the prompt for a published model, and the entries of metrics.json about it."""
    template, label_words, instruction = task.wordings[evaluation.wording]
    shots, num_shots_cut = fit_shots(tokenizer, evaluation.shots, window)
    description = {
        "setting": f"{len(shots)}-shot prompt" if shots else "zero-shot prompt",
        "head": "prompt",
        "method": None,
        "max_length": evaluation.text.max_length or task.max_length,
        "shot_ids": [shot.id for shot in shots],
        "num_shots_truncated": num_shots_cut,
    }
    chat = uses_chat(evaluation.prompt.format, tokenizer, evaluation.model.name)
    solved = tuple((shot.text, shot.label) for shot in shots)
    return Prompt(template, label_words, chat, solved, instruction), description


def _tuned_prompt(evaluation: TextEvaluation, task, record: dict) -> tuple[Prompt, dict]:
    """Return the prompt that a generator was tuned on, and the entries of metrics.json about it.

    Args:
        record: content of task.json.
    """
    name = evaluation.model.name
    if record["labels"] != list(task.labels):
        raise Refused(
            f"the model's labels must be the task's, {listed(task.labels)}: {name} was tuned for "
            f"{listed(record['labels'])}"
        )
    description = {
        "setting": "tuned generator",
        "head": "generate",
        **training_description(record, name, evaluation.seed),
        "max_length": evaluation.text.max_length or record["max_length"],
        "shot_ids": [],
        "num_shots_truncated": 0,
    }
    return recorded_prompt(record["prompt"]), description


def _say_what_is_cut(description: dict, num_items: int) -> None:
    num_shots, num_shots_cut = len(description["shot_ids"]), description["num_shots_truncated"]
    if num_shots_cut:
        say(f"prompt: {num_shots_cut} of {num_shots} shots cut in the middle, to half of the window")
    if description["num_truncated"]:
        say(f"prompt: {description['num_truncated']:,} of {num_items:,} texts cut in the middle to fit")


# --- by likelihood ---


def prompt_scorer(model, data: PromptData, device: torch.device) -> Scorer:
    """Return a scorer that gives a causal model's "log_probabilities" of the label words, normalised over them."""
    prefix = data.prefix(model, device)

    def score(items: np.ndarray) -> list[dict]:
        found = log_softmax(data.log_likelihoods(model, items, device, prefix)).tolist()
        return [{"log_probabilities": values} for values in found]

    return score


@torch.no_grad()
def _log_likelihoods(model, data: PromptData, device: torch.device) -> np.ndarray:
    """Return the label words' log-likelihoods after a few prompts, scored one at a time: [prompts, labels]."""
    prefix = data.prefix(model, device)
    numbers = range(len(data.lengths))
    return np.concatenate([data.log_likelihoods(model, np.array([number]), device, prefix) for number in numbers])


def _likeliest_calibrated(content_free: np.ndarray, records: list[dict]) -> PredictedLabels:
    """Return the likeliest label of each item after calibration.

    Args:
        content_free: log-likelihoods after the content-free prompts, [prompts, labels].
    """
    plain = log_probabilities(records)
    scores = calibrate(plain, content_free)
    return PredictedLabels(scores.argmax(axis=1).tolist(), {"scores": scores.tolist()}, plain.argmax(axis=1).tolist())


# --- by writing ---


def _writing_scorer(model, data: PromptData, tokenizer, prompt: Prompt, device: torch.device, in_step: bool) -> Scorer:
    """Return a scorer that gives the "tokens" that a causal model writes."""
    ends = end_tokens(model, tokenizer, prompt)
    num_new = EXTRA_TOKENS + (1 if data.single_token else max(map(len, data.targets)))
    if can_share(model.config, model.config._attn_implementation):
        num_shared = data.num_shared
        shared = data.rows[0][:num_shared]
        branch_writer = BranchWriter(model, shared, data.pad_id, ends, num_new, device, in_step=in_step)

        def write(prompts: list[list[int]]) -> list[list[int]]:
            own = [prompt[num_shared:] for prompt in prompts]
            laid = branch_rows([()] * len(own), [[tokens] for tokens in own], data.pad_id)
            return branch_writer(laid, np.array([len(tokens) for tokens in own]))

    else:

        def write(prompts: list[list[int]]) -> list[list[int]]:
            return write_answers(model, prompts, data.pad_id, ends, num_new, device)

    def score(items: np.ndarray) -> list[dict]:
        return [{"tokens": tokens} for tokens in write([data.context(item) for item in items])]

    return score


def _read_written(tokenizer, prompt: Prompt, records: list[dict]) -> PredictedLabels:
    """Return the label that each written answer names."""
    texts = answer_texts(tokenizer, records)
    labels = [parse_answer(text, prompt.label_words) for text in texts]
    return PredictedLabels(labels, {"answer": texts}, written=True)
