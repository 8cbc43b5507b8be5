"""Training rows of a generator: prompt, label word and end of the answer.

The loss covers the label word and the end, never the prompt. The prompts are those of zerotune/tasks/prompts.py, as in
evaluation.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch

from zerotune.errors import Refused
from zerotune.models.device import on_device, to_device
from zerotune.models.model_files import generator_record
from zerotune.models.packed import pack
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.chat import answer_closing, around_question
from zerotune.tasks.cutting import token_ids
from zerotune.tasks.prompts import Prompt, PromptData, answers_overlap, encode_prompts, log_softmax
from zerotune.tasks.splits import Example
from zerotune.training.batches import LengthBatches
from zerotune.training.class_weights import weights_of
from zerotune.training.data import Batch


@dataclass(frozen=True)
class AnswerData(LengthBatches):
    """Texts ready for a generator.

    Attributes:
        ids: stable id of each example, [num_examples].
        labels: int64 class of each example, [num_examples].
        prompt: the wording.
        prompts: each example's prompt with the answers of all labels, as in evaluation.
        end: token ids that end an answer; [] if the answers in `prompts` include them.
        class_weights: weight of each label in the training loss, float64 [num_labels]; None: all equal.
        packs: whether a batch is one packed row (zerotune/models/packed.py).
    """

    ids: list[str]
    labels: np.ndarray
    prompt: Prompt
    prompts: PromptData
    end: list[int]
    class_weights: np.ndarray | None = None
    packs: bool = False

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model reads for each example, all of its row but the last: [num_examples]."""
        return np.array([len(self.row(item, label)[0]) - 1 for item, label in enumerate(self.labels)])

    @cached_property
    def num_answer_tokens(self) -> np.ndarray:
        """Tokens of each example's answer with its end, [num_examples]."""
        return np.array([self.row(item, label)[1] for item, label in enumerate(self.labels)])

    @property
    def num_truncated(self) -> int:
        """Number of examples whose text was cut to fit."""
        return self.prompts.num_truncated

    @property
    def token_ids(self) -> np.ndarray:
        """The token ids of all examples, int64 [tokens]."""
        rows = (self.row(item, label)[0] for item, label in enumerate(self.labels))
        return np.fromiter(chain.from_iterable(rows), np.int64)

    def row(self, item: int, label: int) -> tuple[list[int], int]:
        """Return the token ids of an example answered with a label, and how many at the end are the answer."""
        prompts = self.prompts
        if prompts.single_token:
            return [*prompts.rows[item], prompts.targets[item][label], *self.end], 1 + len(self.end)
        number = item * prompts.num_labels + label
        answer = prompts.targets[number]
        return [*prompts.rows[number], answer[-1], *self.end], len(answer) + len(self.end)

    def num_targets(self, items: np.ndarray) -> float:
        """Return the divisor for the sum of some examples' losses: the sum of their answer tokens' weights."""
        return float(self._token_weights(items).sum())

    def _token_weights(self, items: np.ndarray) -> np.ndarray:
        """Return the weight of each answer token of some examples, that of its label (1 without): float64 [tokens]."""
        return np.repeat(weights_of(self.labels[items], self.class_weights), self.num_answer_tokens[items])

    def batch(self, items: np.ndarray, device: torch.device) -> Batch:
        """Build the inputs of a `TextGenerator` for some examples, with their answers' tokens and weights [tokens]."""
        batch = self._answered([self.row(item, self.labels[item]) for item in items], device)
        return replace(batch, target_weights=to_device(self._token_weights(items).astype(np.float32), device))

    def _answered(self, rows: list[tuple[list[int], int]], device: torch.device) -> Batch:
        """Build inputs and targets from rows and their numbers of answer tokens.

        Returns:
            inputs: input_ids [B, T], and rows and columns [N] of the positions before answer tokens; for a packed row
                also its positions and bounds.
            targets: the answer tokens, [N], row by row.
        """
        input_ids = np.full((len(rows), max(len(tokens) for tokens, _ in rows) - 1), self.prompts.pad_id)
        for index, (tokens, _) in enumerate(rows):
            input_ids[index, : len(tokens) - 1] = tokens[:-1]
        counts = [count for _, count in rows]
        # a token is predicted at the position before it
        columns = [len(tokens) - 1 - count + place for tokens, count in rows for place in range(count)]
        owners, columns = np.repeat(np.arange(len(rows)), counts), np.array(columns)
        inputs = {"input_ids": input_ids, "rows": owners, "columns": columns}
        if self.packs:
            lengths = np.array([len(tokens) - 1 for tokens, _ in rows])
            mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
            row = pack({"input_ids": input_ids, "attention_mask": mask})
            inputs = {name: row[name] for name in ("input_ids", "bounds", "longest")}
            inputs |= {"positions": row["position_ids"], "rows": np.zeros_like(owners)}
            inputs["columns"] = row["bounds"][owners] + columns
        answers = np.array([token for tokens, count in rows for token in tokens[-count:]])
        return Batch(on_device(inputs, device), to_device(answers, device))

    @property
    def scored_lengths(self) -> np.ndarray:
        """Cost of scoring each example, in tokens, [num_examples]."""
        return self.lengths * self.prompts.rows_per_item

    def scores(self, forward, items: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each example: the log-likelihood of each label's word, and the loss of its own answer.

        Single-token words are all compared at the prompt's last position, so that an item needs only one row.
        """
        own, num_labels = self.labels[items], self.prompts.num_labels
        single = self.prompts.single_token
        num_rows = self.prompts.rows_per_item
        labels = own if single else np.tile(np.arange(num_labels), len(items))
        rows = [self.row(*pair) for pair in zip(np.repeat(items, num_rows), labels, strict=True)]
        batch = self._answered(rows, device)
        log_probabilities = forward(**batch.inputs).log_softmax(-1)
        found = log_probabilities.gather(1, batch.targets[:, None])[:, 0].cpu().numpy()
        counts = np.array([count for _, count in rows])
        starts = np.cumsum(counts) - counts
        sums = np.add.reduceat(found, starts)  # of answers, including their ends
        if single:
            words = to_device(np.array([self.prompts.targets[item] for item in items]), device)
            likelihoods = log_probabilities[to_device(starts, device)].gather(1, words).cpu().numpy()
            losses = -sums
        else:
            of_words = sums
            if self.end:
                ends = starts + counts - len(self.end)
                of_words = np.add.reduceat(found, np.stack([starts, ends], axis=1).flatten())[::2]
            likelihoods = of_words.reshape(-1, num_labels)
            losses = -sums.reshape(-1, num_labels)[np.arange(len(items)), own]
        pairs = zip(likelihoods.tolist(), losses.tolist(), strict=True)
        return [{"log_likelihoods": values, "loss": loss} for values, loss in pairs]

    def log_probabilities(self, records: list[dict]) -> np.ndarray:
        """Return the labels' natural log-probabilities, float32 [num_examples, labels], given all examples' records."""
        return log_softmax(np.array([record["log_likelihoods"] for record in records], dtype=np.float32))

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss per answer token, given all examples' records."""
        return math.fsum(record["loss"] for record in records) / int(self.num_answer_tokens.sum())


def prompt_record(prompt: Prompt) -> dict:
    """Return a generator's prompt as task.json records it."""
    return {
        "template": prompt.template,
        "label_words": list(prompt.label_words),
        "format": "chat" if prompt.chat else "plain",
        "instruction": prompt.instruction,
    }


def chat_record(tokenizer) -> dict:
    """Return task.json's record of a chat template, with which prompts can be rendered without zerotune."""
    chat = Prompt("question", ("answer",), chat=True)
    before, strips, after = around_question(tokenizer)
    return {"before": before, "strips": strips, "after": after, "end_token": end_of_answer(tokenizer, chat)[-1]}


def recorded_prompt(record: dict) -> Prompt:
    """Return the prompt that `prompt_record` described."""
    chat, instruction = record["format"] == "chat", record.get("instruction", "")
    return Prompt(record["template"], tuple(record["label_words"]), chat, instruction=instruction)


def encode_answers(tokenizer, prompt: Prompt, examples: list[Example], max_length: int, window: int) -> AnswerData:
    """Tokenise labelled examples for a generator. Texts are cut to fit the row's length.

    Args:
        max_length: most tokens of a whole row, answer and end included.
        window: number of the model's positions; no row is longer.
    Raises:
        Refused: a row has no room for any text, or the tokenizer has no end of text.
    """
    end = end_of_answer(tokenizer, prompt)
    most = answer_window(tokenizer, prompt, max_length, window)
    end_is_compared = answers_overlap(tokenizer, prompt)
    texts = [example.text for example in examples]
    prompts = encode_prompts(tokenizer, prompt, texts, most, most, end if end_is_compared else ())
    labels = np.array([example.label for example in examples], dtype=np.int64)
    return AnswerData([example.id for example in examples], labels, prompt, prompts, [] if end_is_compared else end)


def answer_window(tokenizer, prompt: Prompt, max_length: int, window: int) -> int:
    """Return the most tokens that prompt and label word may take in a row of `max_length` with the answer's end.

    Raises:
        Refused: there is no room for any text.
    """
    most = min(max_length, window) - len(end_of_answer(tokenizer, prompt))
    empty = encode_prompts(tokenizer, prompt, [""], 0, window)
    longest = max(map(len, empty.rows)) + 1
    if most <= longest:
        raise Refused(
            f"--max-length {max_length} leaves a text no room beside {longest} tokens of prompt and answer: raise it"
        )
    return most


def format_in_training(wanted: str, model: ModelSettings) -> str:
    """Return --prompt-format of a run that trains a model; "auto" is a tuned model's own format.

    Raises:
        Refused: the model was tuned in another format than the wanted one.
    """
    record = generator_record(model)
    if record is None:
        return wanted
    own_format = record["prompt"]["format"]
    if wanted not in ("auto", own_format):
        raise Refused(
            f"--prompt-format {wanted}: {model.name} was tuned in the {own_format} format: leave the flag out, or "
            "train from the model that it was made from"
        )
    return own_format


def end_of_answer(tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids that end an answer: `template_end`, or else the tokenizer's EOS.

    Raises Refused if there is neither."""
    end = template_end(tokenizer, prompt)
    if not end and tokenizer.eos_token_id is None:
        raise Refused(
            "--head generate teaches a model to end its answer, and its tokenizer has no eos_token: set one in "
            "tokenizer_config.json"
        )
    return end or [tokenizer.eos_token_id]


def line_break(tokenizer) -> list[int]:
    """Return the token ids of the line break that ends the answer of a solved example in plain text."""
    before, with_break = token_ids(tokenizer, ["a", "a\n"], False)
    return list(with_break[len(before) :]) if with_break[: len(before)] == before else []


def template_end(tokenizer, prompt: Prompt) -> list[int]:
    """Return the tokens that a chat template puts after the assistant's content, up to the first special one, or []."""
    if not prompt.chat:
        return []
    after = tokenizer(answer_closing(tokenizer), add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    place = next((place for place, token in enumerate(after) if token in special), None)
    return [] if place is None else after[: place + 1]
