"""Greedy writing by a causal model, and the label that is read in what it writes."""

import re
from itertools import takewhile

import numpy as np
import torch
from transformers import GenerationConfig

from zerotune.models.boundary import quiet_transformers
from zerotune.models.device import to_device
from zerotune.tasks.prompts import Prompt
from zerotune.training.generation import template_end

# Tokens beside the longest label word: a line break before it, a full stop and the end after it.
EXTRA_TOKENS = 4


def end_tokens(model, tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids that end an answer: the tokenizer's eos, the model folder's, the end of a chat turn."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *(template_end(tokenizer, prompt)[-1:])]
    return sorted({token for token in ends if token is not None})


def write_answers(
    model, rows: list[list[int]], pad_id: int, ends: list[int], max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    """Write an answer after each prompt, the likeliest token at each place.

    The model's own generation settings (sampling, penalties) do not count.

    Args:
        rows: token ids of each prompt, [num_rows] lists.
        ends: as `end_tokens` returns them.
    Returns:
        Token ids of each answer without the end, at most max_new_tokens.
    """
    longest = max(map(len, rows))
    input_ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for index, row in enumerate(rows):  # padded on the left: all continue from the same column
        input_ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad_id
    )
    published, model.generation_config = model.generation_config, greedy  # transformers fills gaps from the model's
    try:
        with quiet_transformers(), torch.no_grad():
            whole = model.generate(to_device(input_ids, device), attention_mask=to_device(mask, device))
    finally:
        model.generation_config = published
    return [list(takewhile(lambda token: token not in ends, row)) for row in whole[:, longest:].tolist()]


def answer_texts(tokenizer, records: list[dict]) -> list[str]:
    """Return the text of each written answer, given records with its "tokens"."""
    return tokenizer.batch_decode([record["tokens"] for record in records], skip_special_tokens=True)


def parse_answer(text: str, label_words: tuple[str, ...]) -> int | None:
    """Return the label whose word an answer begins with, as a whole word in any case; None for no such word.

    Of several the longest counts: "art history" is not "art"."""
    answer = text.strip().casefold()
    found = [
        label for label, word in enumerate(label_words) if re.match(rf"{re.escape(word.casefold())}(?!\w)", answer)
    ]
    return max(found, key=lambda label: len(label_words[label]), default=None)
