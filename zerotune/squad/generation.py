"""Questions with the answers that a generator learns to write; questions of a paragraph share its tokens in a row.

The loss covers an answer's tokens and its end. An example is a question: a batch of 32 has 32 questions, from as few
paragraphs as possible.
"""

import math
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from zerotune.models.branches import BranchRows, branch_rows
from zerotune.models.device import to_device
from zerotune.squad.paragraphs import (
    Groups,
    grouped_epoch_steps,
    grouped_evaluation_batches,
    grouped_micro_batches,
    row_costs,
)
from zerotune.squad.prompts import QuestionPrompt, QuestionTokenizer
from zerotune.squad.questions import Question, distinct_paragraphs
from zerotune.training.data import Batch

# Texts tokenised at once: a tokenizer's own objects take about a hundred bytes per token.
TEXTS_AT_ONCE = 1024

# A row keeps the shared prefix's keys and values but does not compute them: this many cost as much as one own token.
_PREFIX_TOKENS_PER_TOKEN = 8


@dataclass(frozen=True)
class GenerationData:
    """Questions tokenised for a generator. "Rows" in arguments are indices of questions.

    Attributes:
        ids: stable id of each question, [num_questions].
        prompt: how they are asked.
        prefix: token ids that all prompts begin with.
        contexts: token ids of each context, which follow the prefix; [num_contexts].
        context_of: the context of each question, [num_questions].
        questions: token ids of each question, which follow its context.
        answers: token ids of each answer with its end, which follow its question; empty if it is not known.
        num_truncated: number of questions whose context was cut to fit.
        shares: whether questions share their context's tokens in a row; results are the same either way.
    """

    ids: list[str]
    prompt: QuestionPrompt
    prefix: array
    contexts: list[array]
    context_of: np.ndarray
    questions: list[array]
    answers: list[array]
    pad_id: int
    num_truncated: int
    shares: bool = True
    packs: ClassVar[bool] = False  # questions of a paragraph share its tokens instead

    @cached_property
    def num_answer_tokens(self) -> np.ndarray:
        """Return the tokens of each question's answer with its end, [num_questions]."""
        return np.array([len(answer) for answer in self.answers])

    def _groups(self, own: np.ndarray, num_prefix: int) -> Groups:
        lengths = np.array([num_prefix + len(context) for context in self.contexts])
        if self.shares:
            return Groups(self.context_of, lengths, own)
        return Groups(np.arange(len(self.ids)), lengths[self.context_of], own)

    @cached_property
    def groups(self) -> Groups:
        """Return the groups of training rows, where the model reads all of an answer but its last token."""
        own = np.array([len(question) for question in self.questions]) + np.maximum(self.num_answer_tokens - 1, 0)
        return self._groups(own, len(self.prefix))

    @cached_property
    def prompt_groups(self) -> Groups:
        """Return the groups of rows for writing answers.

        A shared prefix is computed only once, but its keys and values take memory in each row, so part of it counts.
        """
        own = np.array([len(question) for question in self.questions])
        return self._groups(own, self._num_prefix_counted)

    @property
    def _num_prefix_counted(self) -> int:
        return len(self.prefix) // _PREFIX_TOKENS_PER_TOKEN if self.shares else len(self.prefix)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens that the model reads of each question in its own row, [num_questions]."""
        return self.groups.shared[self.groups.group_of] + self.groups.own

    @property
    def token_ids(self) -> np.ndarray:
        """Return the token ids of all parts, int64 [tokens]."""
        parts = chain([self.prefix], self.contexts, self.questions, self.answers)
        return np.fromiter(chain.from_iterable(parts), np.int64)

    def num_targets(self, rows: np.ndarray) -> int:
        """Count the tokens of some questions' answers, the divisor for the sum of their losses."""
        return int(self.num_answer_tokens[rows].sum())

    def num_tokens(self, rows: np.ndarray) -> int:
        """Count the tokens that the model reads in a batch of some questions, a shared context's once."""
        return self.groups.num_tokens(rows)

    def num_padded_tokens(self, rows: np.ndarray) -> int:
        """Count the same tokens with padding."""
        return self.groups.num_padded_tokens(rows)

    def epoch_steps(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Split one epoch into steps of `batch_size` questions (`grouped_epoch_steps`)."""
        return grouped_epoch_steps(self.groups, batch_size, seed, epoch)

    def micro_batches(self, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
        """Cut a step into micro-batches for every rank (`grouped_micro_batches`)."""
        return grouped_micro_batches(self.groups, step, budget, world_size)

    def loss_batches(self, budget: int) -> list[np.ndarray]:
        """Cut all questions into batches for `scores`, the same at any world size."""
        return grouped_evaluation_batches(self.groups, budget)

    def writing_batches(self, budget: int) -> list[np.ndarray]:
        """Cut all questions into batches for writing their answers, the same at any world size."""
        return grouped_evaluation_batches(self.prompt_groups, budget)

    def writing_costs(self, budget: int) -> np.ndarray:
        """Return each question's cost in tokens in `writing_batches`, sorted by falling cost, [num_questions]."""
        return row_costs(self.prompt_groups, budget)

    def writing_shape(self, rows: np.ndarray, num_new_tokens: int) -> tuple[int, int, int]:
        """Return the size of a batch for writing answers.

        Returns:
            Its number of rows, the tokens of its longest row without the prefix, and the most tokens written in a row.
        """
        units = self.prompt_groups.by_group(rows)
        longest = max(map(self.prompt_groups.row_length, units)) - self._num_prefix_counted
        return len(units), longest, num_new_tokens * max(map(len, units))

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the inputs of a `TextGenerator` for some questions, and the tokens [N] of their answers, row by row.

        The answers are in the order of `by_context`.
        """
        units, order = self.groups.by_group(rows), self.by_context(rows)
        trunks = [self.prefix + self.contexts[self.context_of[unit[0]]] for unit in units]
        laid = branch_rows(
            trunks, [[self.questions[row] + self.answers[row][:-1] for row in unit] for unit in units], self.pad_id
        )
        counts = self.num_answer_tokens[order]
        # a token is predicted at the position before it: an answer's first token where its question ends
        firsts = laid.starts + np.array([len(self.questions[row]) for row in order]) - 1
        inputs = {
            "input_ids": laid.input_ids,
            "rows": np.repeat(laid.rows, counts),
            "columns": np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]),
        }
        if not laid.is_plain:
            inputs |= {"positions": laid.positions, "branches": laid.branches}
        answers = np.fromiter(chain.from_iterable(self.answers[row] for row in order), np.int64)
        return Batch({name: to_device(values, device) for name, values in inputs.items()}, to_device(answers, device))

    def by_context(self, rows: np.ndarray) -> np.ndarray:
        """Return some questions in their order within a batch."""
        return np.concatenate(self.groups.by_group(rows))

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each question: the "loss" of its answer, summed over the tokens."""
        batch, order = self.batch(rows, device), self.by_context(rows)
        losses = functional.cross_entropy(forward(**batch.inputs), batch.targets, reduction="none").cpu().numpy()
        counts = self.num_answer_tokens[order]
        sums = np.add.reduceat(losses, np.cumsum(counts) - counts)
        by_question = dict(zip(order.tolist(), sums.tolist(), strict=True))
        return [{"loss": by_question[row]} for row in rows.tolist()]

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss per answer token, given all questions' records."""
        return math.fsum(record["loss"] for record in records) / int(self.num_answer_tokens.sum())

    def prompt_tokens(self, row: int) -> list[int]:
        """Return the token ids of a question's whole prompt."""
        return [*self.prefix, *self.contexts[self.context_of[row]], *self.questions[row]]

    def prompt_rows(self, rows: np.ndarray) -> tuple[BranchRows, np.ndarray]:
        """Lay out the prompts of some questions without the prefix; also return the questions in that order."""
        units = self.prompt_groups.by_group(rows)
        trunks = [self.contexts[self.context_of[unit[0]]] for unit in units]
        laid = branch_rows(trunks, [[self.questions[row] for row in unit] for unit in units], self.pad_id)
        return laid, np.concatenate(units)


def encode_questions(
    tokenizer,
    prompt: QuestionPrompt,
    questions: list[Question],
    max_length: int,
    num_positions: int,
    num_new_tokens: int = 0,
) -> GenerationData:
    """Tokenise questions for a generator. A context that does not fit its row is cut, for that question only.

    A question's answer is the first of its gold answers.

    Args:
        max_length: most tokens of a whole row with its answer and end, not counting the solved questions.
        num_positions: number of the model's positions; no row is longer.
        num_new_tokens: most tokens that the model may write: room is left for them, and the gold answer does not decide
            which part of a context is kept. 0 for questions that the model is trained on.
    Raises:
        Refused: a row has no room for any context, or the tokenizer has no end of text.
    """
    parts = QuestionTokenizer(tokenizer, prompt, max_length, num_positions)
    paragraphs, paragraph_of = distinct_paragraphs(questions)
    contexts = _in_pieces(parts.contexts, [paragraph.context for paragraph in paragraphs])
    asked = _in_pieces(parts.questions, [question.text for question in questions])
    golds = [question.answers[0].text if question.answers else "" for question in questions]
    answers = _in_pieces(parts.answers, golds)
    known = [question.answers is not None for question in questions]
    answers = [answer if is_known else array("i") for answer, is_known in zip(answers, known, strict=True)]
    prefix, context_of, num_truncated = array("i", parts.prefix), [], 0
    for place, question in enumerate(questions):
        number = paragraph_of[place]
        others = len(prefix) + len(asked[place]) + max(len(answers[place]), num_new_tokens)
        if others + len(contexts[number]) > parts.most:
            held = None if num_new_tokens else _place_of_answer(question)
            cut = parts.fitted_context(question.paragraph.context, question.text, others, held)
            number = len(contexts)
            contexts.append(array("i", cut))
            num_truncated += 1
        context_of.append(number)
    ids = [question.id for question in questions]
    used, context_of = np.unique(context_of, return_inverse=True)
    contexts = [contexts[number] for number in used]
    return GenerationData(
        ids, prompt, prefix, contexts, context_of, asked, answers, tokenizer.pad_token_id, num_truncated
    )


def _place_of_answer(question: Question) -> tuple[int, int] | None:
    if not question.answers:
        return None
    answer = question.answers[0]
    return answer.start, answer.start + len(answer.text)


def _in_pieces(tokenise, texts: list[str]) -> list[array]:
    """Tokenise texts, TEXTS_AT_ONCE at a time, into arrays: Python lists would take ten times their memory."""
    pieces = (tokenise(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE))
    return [array("i", row) for piece in pieces for row in piece]
