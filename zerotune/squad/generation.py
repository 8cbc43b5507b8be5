"""Questions with the answers that a generator learns to write: a paragraph's tokens are computed once for all of them.

The loss counts an answer's tokens and its end. Examples are questions: a batch of 32 are 32 questions, of as few
paragraphs as can be.
"""

import math
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

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
from zerotune.squad.questions import Question
from zerotune.tasks.prompts import PREFIX_TOKENS_PER_TOKEN

# Tokenised together: a tokenizer's own record of a text takes some hundred bytes a token until it is dropped.
TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class GenerationData:
    """Questions ready for a generator.

    Attributes:
        ids: stable id of each question, [num_questions].
        prompt: the wording.
        head: token ids that all prompts begin with.
        contexts: token ids of each context, behind the head; [num_contexts].
        context_of: the context of each question, [num_questions].
        questions: token ids of each question, behind its context.
        answers: token ids of each answer with its end, behind its question; empty where it is not known.
        num_truncated: questions whose context was cut to fit.
        shares: whether questions of a context share its tokens in a row, which changes no number.
    """

    ids: list[str]
    prompt: QuestionPrompt
    head: array
    contexts: list[array]
    context_of: np.ndarray
    questions: list[array]
    answers: list[array]
    pad_id: int
    num_truncated: int
    shares: bool = True

    @cached_property
    def num_answer_tokens(self) -> np.ndarray:
        """Tokens of each question's answer with its end, [num_questions]."""
        return np.array([len(answer) for answer in self.answers])

    def _groups(self, own: np.ndarray, num_head: int) -> Groups:
        lengths = np.array([num_head + len(context) for context in self.contexts])
        if self.shares:
            return Groups(self.context_of, lengths, own)
        return Groups(np.arange(len(self.ids)), lengths[self.context_of], own)

    @cached_property
    def groups(self) -> Groups:
        """Rows of training: the model reads all of an answer but the last token."""
        own = np.array([len(question) for question in self.questions]) + np.maximum(self.num_answer_tokens - 1, 0)
        return self._groups(own, len(self.head))

    @cached_property
    def prompt_groups(self) -> Groups:
        """Rows of an evaluation that writes answers, without the head, whose keys and values are computed once; but
        these take memory in each row."""
        own = np.array([len(question) for question in self.questions])
        return self._groups(own, len(self.head) // PREFIX_TOKENS_PER_TOKEN)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model reads of each question in a row of its own, [num_questions]."""
        return self.groups.shared[self.groups.group_of] + self.groups.own

    @property
    def answer_share(self) -> float:
        """The largest part of a row's tokens at which logits are computed."""
        groups = self.groups
        num_answer = np.bincount(groups.group_of, self.num_answer_tokens)
        return float((num_answer / (groups.shared + np.bincount(groups.group_of, groups.own))).max())

    @property
    def token_ids(self) -> np.ndarray:
        """The token ids of all parts, int64 [tokens]."""
        parts = chain([self.head], self.contexts, self.questions, self.answers)
        return np.fromiter(chain.from_iterable(parts), np.int64)

    def num_targets(self, rows: np.ndarray) -> int:
        """What the sum of some questions' losses is divided by: the tokens of their answers."""
        return int(self.num_answer_tokens[rows].sum())

    def num_tokens(self, rows: np.ndarray) -> int:
        """Tokens that the model reads of some questions in one batch, a context once."""
        return self.groups.num_tokens(rows)

    def num_padded_tokens(self, rows: np.ndarray) -> int:
        """The same with the padding."""
        return self.groups.num_padded_tokens(rows)

    def epoch_steps(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Steps of `batch_size` questions, as grouped_epoch_steps."""
        return grouped_epoch_steps(self.groups, batch_size, seed, epoch)

    def micro_batches(self, step: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
        """As grouped_micro_batches."""
        return grouped_micro_batches(self.groups, step, budget, world_size)

    def loss_batches(self, budget: int) -> list[np.ndarray]:
        """Batches for `scores`, the same at any world size."""
        return grouped_evaluation_batches(self.groups, budget)

    def writing_batches(self, budget: int) -> list[np.ndarray]:
        """Batches for question_writing.write_answers, the same at any world size."""
        return grouped_evaluation_batches(self.prompt_groups, budget)

    def writing_costs(self, budget: int) -> np.ndarray:
        """What a question costs in tokens in those batches, which hold them by falling cost, [num_questions]."""
        return row_costs(self.prompt_groups, budget)

    def writing_shape(self, rows: np.ndarray, num_new_tokens: int) -> tuple[int, int, int]:
        """Of a batch whose answers are written: its rows, its longest row without the head, and the tokens that may be
        written in a row."""
        units = self.prompt_groups.by_group(rows)
        num_head = len(self.head) // PREFIX_TOKENS_PER_TOKEN
        longest = max(map(self.prompt_groups.row_length, units)) - num_head
        return len(units), longest, num_new_tokens * max(map(len, units))

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict, torch.Tensor, np.ndarray]:
        """Inputs of an TextGenerator for some questions, and what they are to give.

        Returns:
            the inputs; the answers' tokens, int64 [N]; the questions in the order of their answers, [rows].
        """
        units = self.groups.by_group(rows)
        order = np.concatenate(units)
        trunks = [self.head + self.contexts[self.context_of[unit[0]]] for unit in units]
        laid = branch_rows(
            trunks, [[self.questions[row] + self.answers[row][:-1] for row in unit] for unit in units], self.pad_id
        )
        counts = self.num_answer_tokens[order]
        # a token is predicted where the one before it is read: the first one where the question ends
        firsts = laid.starts + np.array([len(self.questions[row]) for row in order]) - 1
        inputs = {
            "input_ids": laid.input_ids,
            "rows": np.repeat(laid.rows, counts),
            "columns": np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]),
        }
        if not laid.is_plain:
            inputs |= {"positions": laid.positions, "branches": laid.branches}
        answers = np.fromiter(chain.from_iterable(self.answers[row] for row in order), np.int64)
        return {name: to_device(values, device) for name, values in inputs.items()}, to_device(answers, device), order

    def loss_sum(self, engine, rows: np.ndarray) -> torch.Tensor:
        """Cross entropy of the answers' tokens of some questions, added up: a float32 scalar."""
        inputs, answers, _ = self.batch(rows, engine.accelerator.device)
        return functional.cross_entropy(engine.forward(**inputs), answers, reduction="sum")

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each question: the loss of its answer, summed over the tokens."""
        inputs, answers, order = self.batch(rows, device)
        losses = functional.cross_entropy(forward(**inputs), answers, reduction="none").cpu().numpy()
        counts = self.num_answer_tokens[order]
        sums = np.add.reduceat(losses, np.cumsum(counts) - counts)
        by_question = dict(zip(order.tolist(), sums.tolist(), strict=True))
        return [{"loss": by_question[row]} for row in rows.tolist()]

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss of an answer's token, given all questions' records."""
        return math.fsum(record["loss"] for record in records) / int(self.num_answer_tokens.sum())

    def prompt_tokens(self, row: int) -> list[int]:
        """Token ids of a question's whole prompt."""
        return [*self.head, *self.contexts[self.context_of[row]], *self.questions[row]]

    def prompt_rows(self, rows: np.ndarray) -> tuple[BranchRows, np.ndarray]:
        """The prompts of some questions behind the head, and the questions in the order of their branches."""
        units = self.prompt_groups.by_group(rows)
        trunks = [self.contexts[self.context_of[unit[0]]] for unit in units]
        laid = branch_rows(trunks, [[self.questions[row] for row in unit] for unit in units], self.pad_id)
        return laid, np.concatenate(units)


def encode_questions(
    tokenizer,
    prompt: QuestionPrompt,
    questions: list[Question],
    max_length: int,
    window: int,
    num_new_tokens: int = 0,
) -> GenerationData:
    """Questions tokenised for a generator; of a context is cut what exceeds the row's length.

    A question's answer is the first of its gold answers. A context that is cut for a question is not shared.

    Args:
        max_length: most tokens of a whole row, its answer and the end included.
        window: the model's positions; no row is longer.
        num_new_tokens: for questions that a model is to answer, the tokens that it may write: they have room, and
            nobody looks at the answer to choose the part of a context. 0 for questions to be trained on.
    Raises:
        Refused: a row has no room for any context, or the tokenizer has no end of text.
    """
    parts = QuestionTokenizer(tokenizer, prompt, max_length, window)
    paragraphs = list(dict.fromkeys(question.paragraph for question in questions))
    numbers = {paragraph: number for number, paragraph in enumerate(paragraphs)}
    contexts = _in_pieces(parts.contexts, [paragraph.context for paragraph in paragraphs])
    asked = _in_pieces(parts.questions, [question.text for question in questions])
    golds = [question.answers[0].text if question.answers else "" for question in questions]
    answers = _in_pieces(parts.answers, golds)
    known = [question.answers is not None for question in questions]
    answers = [answer if is_known else array("i") for answer, is_known in zip(answers, known, strict=True)]
    head, context_of, num_truncated = array("i", parts.head), [], 0
    for place, question in enumerate(questions):
        number = numbers[question.paragraph]
        others = len(head) + len(asked[place]) + max(len(answers[place]), num_new_tokens)
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
        ids, prompt, head, contexts, context_of, asked, answers, tokenizer.pad_token_id, num_truncated
    )


def _place_of_answer(question: Question) -> tuple[int, int] | None:
    if not question.answers:
        return None
    answer = question.answers[0]
    return answer.start, answer.start + len(answer.text)


def _in_pieces(tokenise, texts: list[str]) -> list[array]:
    """`tokenise` of the texts, some at a time, as arrays: lists of Python's would take ten times their memory."""
    pieces = (tokenise(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE))
    return [array("i", row) for piece in pieces for row in piece]
