"""Write answers to questions greedily; the questions about a paragraph share its keys and values.

The prompts are laid out as in training: a row is a paragraph with its questions as branches (models/branches.py). The
keys and values of the prefix of all prompts, the instruction and solved questions, are computed once.
"""

from bisect import bisect_left
from functools import partial

import numpy as np
import torch

from zerotune.evaluation.generation import BranchWriter, answer_texts, end_tokens, write_answers
from zerotune.evaluation.scoring import Scorer
from zerotune.models.branches import can_share
from zerotune.models.precision import autocast
from zerotune.squad.generation import GenerationData
from zerotune.squad.prompts import has_first_line, read_answer


def greedy_writer(
    model, data: GenerationData, ends: list[int], max_new_tokens: int, device: torch.device, *more, **options
) -> Scorer:
    """Return a scorer whose records hold the "tokens" of a written answer to each question, without the end.

    The likeliest next token is always taken. The arguments are those of `BranchWriter`.
    """
    write = BranchWriter(model, data.prefix, data.pad_id, ends, max_new_tokens, device, *more, **options)

    def score(rows: np.ndarray) -> list[dict]:
        laid, order = data.prompt_rows(rows)
        written = write(laid, np.array([len(data.questions[row]) for row in order]))
        tokens = dict(zip(order.tolist(), written, strict=True))
        return [{"tokens": tokens[row]} for row in rows.tolist()]

    return score


def writing_scorer(
    model,
    data: GenerationData,
    tokenizer,
    max_new_tokens: int,
    device: torch.device,
    precision: str = "fp32",
    in_step: bool = False,
) -> Scorer:
    """Return a scorer whose records hold the "tokens" of a written answer to each question.

    Only the first line of an answer is read, so nothing is written after it. A model whose questions cannot share a row
    (`can_share`) gets a row for each prompt.

    Args:
        precision, in_step: as for `BranchWriter`.
    """
    ends = end_tokens(model, tokenizer, data.prompt.wording)
    if can_share(model.config, model.config._attn_implementation):
        have_line = partial(_have_line, tokenizer)
        write = greedy_writer(model, data, ends, max_new_tokens, device, precision, in_step, have_line)
    else:

        def write(rows: np.ndarray) -> list[dict]:
            prompts = [data.prompt_tokens(row) for row in rows]
            with autocast(device.type, precision):
                written = write_answers(model, prompts, data.pad_id, ends, max_new_tokens, device)
            return [{"tokens": tokens} for tokens in written]

    return lambda rows: [{"tokens": first_line(tokenizer, record["tokens"])} for record in write(rows)]


def _have_line(tokenizer, answers: list[list[int]]) -> list[bool]:
    return [has_first_line(text) for text in answer_texts(tokenizer, [{"tokens": tokens} for tokens in answers])]


def first_line(tokenizer, tokens: list[int]) -> list[int]:
    """Cut the tokens of an answer after its first line that is not blank.

    The token with the line break goes too, unless it also holds the end of the line's text.
    """

    def has_line(number: int) -> bool:
        return _have_line(tokenizer, [tokens[:number]])[0]

    if not has_line(len(tokens)):
        return tokens
    end = bisect_left(range(len(tokens)), True, key=has_line)
    shorter, longer = read_answers(tokenizer, [{"tokens": tokens[:number]} for number in (end - 1, end)])
    return tokens[: end - 1] if shorter == longer else tokens[:end]


def read_answers(tokenizer, records: list[dict]) -> list[str]:
    """Read the answer from each record's "tokens", "" for none."""
    return [read_answer(text) for text in answer_texts(tokenizer, records)]


def writing_summary(records: list[dict], answers: list[str], max_new_tokens: int) -> dict[str, float]:
    """Return the statistics of written answers that are reported besides their scores.

    Args:
        records: of all questions, with the "tokens" of their answers.
        answers: as `read_answers` returns them.
    Returns:
        eos_rate: share of the answers that the model ended itself, by an end token or a line break.
        mean_answer_tokens: without the end.
        abstention_share: share of the answers that are "".
    """
    lengths = [len(record["tokens"]) for record in records]
    return {
        "eos_rate": sum(length < max_new_tokens for length in lengths) / len(lengths),
        "mean_answer_tokens": sum(lengths) / len(lengths),
        "abstention_share": answers.count("") / len(answers),
    }
