"""Write answers greedily with a causal model, and read the label in each."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from zerotune.models.boundary import quiet_transformers
from zerotune.models.branches import PADDING, TRUNK, BranchRows, Places, branch_masks, mask_dtype
from zerotune.models.device import to_device
from zerotune.models.generator import likeliest_tokens
from zerotune.models.precision import autocast
from zerotune.models.shared_prefix import shared_prefix
from zerotune.tasks.prompts import Prompt
from zerotune.training.generation import template_end

# Tokens besides the longest label word: a line break before it, a full stop and the end after it.
EXTRA_TOKENS = 4
_NO_TOKEN = -1  # after an answer's last token
# Rows are dropped from a batch once no more than this share of them has an unfinished answer.
LARGEST_SHARE_OF_ROWS = 0.75


def tokens_per_check(device: torch.device) -> int:
    """Return the number of tokens written between two checks whether all answers have ended: each makes a GPU wait."""
    return 1 if device.type == "cpu" else 8


def end_tokens(model, tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids that end an answer: the tokenizer's eos, the model folder's, the end of a chat turn."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *(template_end(tokenizer, prompt)[-1:])]
    return sorted({token for token in ends if token is not None})


class _RowsLayer(DynamicLayer):
    """A layer's keys and values for the rows of a batch, [R, heads, tokens, dim], allocated at full length.

    Every layer keeps all tokens, even one that attends only to a window of them: masks select by position.

    Args:
        capacity: most tokens of a row, including the prefix.
        prefix: the layer's keys and values of the prefix, [1, heads, tokens, dim].
    """

    def __init__(self, capacity: int, prefix: tuple[torch.Tensor, torch.Tensor] | None):
        super().__init__()
        self._capacity, self._prefix = capacity, prefix
        self._length = 0 if prefix is None else prefix[0].shape[2]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """Add the keys and values of new tokens. Returns those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._capacity, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
            if self._prefix is not None:
                self.keys[:, :, : self._length], self.values[:, :, : self._length] = self._prefix
        start, self._length = self._length, self._length + key_states.shape[2]
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Count the tokens so far."""
        return self._length


class BranchWriter:
    """Continues each branch of rows (models/branches.py) with the likeliest tokens, without waiting for the device.

    One pass computes the rows, and each further pass adds a token to every branch.

    Args:
        model: a causal model in eval mode (`load_language_model`) whose branches can share a row (`can_share`).
        prefix: token ids that all rows begin with, computed once for all batches.
        ends: token ids that end an answer (`end_tokens`).
        precision: of the passes; "fp32" computes in the model's own type.
        in_step: write max_new_tokens tokens even if all answers have ended: under ZeRO-3, the ranks must make equally
            many passes.
        are_complete: the tokens of answers so far -> whether each one needs no further token.
    """

    def __init__(  # noqa: PLR0913
        self,
        model,
        prefix: Sequence[int],
        pad_id: int,
        ends: list[int],
        max_new_tokens: int,
        device: torch.device,
        precision: str = "fp32",
        in_step: bool = False,
        are_complete: Callable[[list[list[int]]], list[bool]] | None = None,
    ):
        self.model, self.pad_id, self.ends, self.max_new_tokens = model, pad_id, ends, max_new_tokens
        self.device, self.precision, self.in_step, self.are_complete = device, precision, in_step, are_complete
        with autocast(device.type, precision):
            self._prefix = shared_prefix(model, prefix, device)

    @torch.no_grad()
    def __call__(self, laid: BranchRows, lengths: np.ndarray) -> list[list[int]]:
        """Return the tokens written after each branch, without the end.

        Args:
            laid: the rows without the prefix.
            lengths: tokens of each branch, [branches].
        """
        with autocast(self.device.type, self.precision):
            written = self._write(laid, lengths)
        return _answers(written)

    def _write(self, laid: BranchRows, lengths: np.ndarray) -> torch.Tensor:
        """Return the tokens of each branch, int64 [branches, max_new_tokens]."""
        device = self.device
        places = Places.of(laid, device, self._prefix.num_tokens)
        last = to_device(laid.starts + lengths - 1, device)
        open_ = self._open(laid, last, places)
        hidden = self._pass(to_device(laid.input_ids, device), places, open_, laid.is_plain)
        hidden = hidden[open_.rows, last]
        written = torch.full((len(lengths), self.max_new_tokens), _NO_TOKEN, device=device)
        ends, ended = torch.tensor(self.ends, device=device), torch.zeros(len(lengths), dtype=torch.bool, device=device)
        every = tokens_per_check(device)
        for step in range(self.max_new_tokens):
            tokens = likeliest_tokens(self.model, hidden)
            ended |= torch.isin(tokens, ends)
            written[open_.answers, step] = torch.where(ended, _NO_TOKEN, tokens)
            if step == self.max_new_tokens - 1:
                break
            if not self.in_step and (step + 1) % every == 0:  # a device sync
                closed = ended.cpu().numpy()
                if self.are_complete:
                    closed |= self.are_complete(_answers(written[open_.answers, : step + 1]))
                if closed.all():
                    break
                if closed.any():
                    kept = open_.keep(np.flatnonzero(~closed))
                    tokens, ended = tokens[kept], ended[kept]
            input_ids, new = open_.lay_out(tokens, self.pad_id)
            hidden = self._pass(input_ids, new, open_, False)[open_.rows, open_.columns]
        return written

    def _open(self, laid: BranchRows, last: torch.Tensor, places: Places) -> "OpenBranches":
        """Return all branches of a batch, before anything is computed.

        Args:
            last: column of each one's last token. [branches]
        """
        device = self.device
        columns, rows = _numbers_in_rows(laid.rows), to_device(laid.rows, device)
        width = int(columns.max()) + 1
        capacity = self._prefix.num_tokens + laid.input_ids.shape[1] + self.max_new_tokens * width
        prefixes = self._prefix.layers or [None] * self.model.config.num_hidden_layers
        prefix = torch.arange(self._prefix.num_tokens, device=device).expand(len(laid.input_ids), -1)
        return OpenBranches(
            host_rows=laid.rows,
            answers=torch.arange(len(last), device=device),
            rows=rows,
            columns=to_device(columns, device),
            numbers=to_device(columns + 1, device),
            positions=places.positions[rows, last],
            known=Places(prefix, torch.full_like(prefix, TRUNK)),
            cache=Cache(layers=[_RowsLayer(capacity, layer) for layer in prefixes]),
            width=width,
        )

    def _pass(self, input_ids, places: Places, open_: "OpenBranches", is_plain: bool) -> torch.Tensor:
        """Return the hidden states [R, T, dim] of new tokens, and add their places to those of the rows so far."""
        open_.known = open_.known.and_then(places)
        if is_plain:
            masks = None
            positions = torch.arange(input_ids.shape[1], device=self.device)[None] + self._prefix.num_tokens
        else:
            masks = branch_masks(self.model.config, places, open_.known, mask_dtype(self.model, self.device))
            positions = places.positions
        return self.model.base_model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=open_.cache,
            use_cache=True,
        ).last_hidden_state


@dataclass
class OpenBranches:
    """The N branches of a batch whose answers are unfinished, in the order of their rows, and the R rows with them.

    Attributes:
        host_rows, rows: row of each branch, on the host and on the device. [N]
        answers: number of each branch in the batch. [N]
        columns: column of each branch in a pass that adds a token. [N]
        numbers: number of each branch in its row, as in the masks. [N]
        positions: position of each branch's newest token. [N]
        known: the places of all tokens so far. [R, tokens]
        cache: their keys and values.
        width: columns of a pass that adds a token: the most open branches of a row.
    """

    host_rows: np.ndarray
    rows: torch.Tensor
    answers: torch.Tensor
    columns: torch.Tensor
    numbers: torch.Tensor
    positions: torch.Tensor
    known: Places
    cache: Cache
    width: int

    @property
    def num_rows(self) -> int:
        return len(self.known.positions)

    def lay_out(self, tokens: torch.Tensor, pad_id: int) -> tuple[torch.Tensor, Places]:
        """Return one more token of each branch, [N], as rows [R, width] with their places."""
        self.positions = self.positions + 1
        input_ids = tokens.new_full((self.num_rows, self.width), pad_id)
        input_ids[self.rows, self.columns] = tokens
        new = Places(torch.zeros_like(input_ids), torch.full_like(input_ids, PADDING))
        new.positions[self.rows, self.columns] = self.positions
        new.branches[self.rows, self.columns] = self.numbers
        return input_ids, new

    def keep(self, kept: np.ndarray) -> torch.Tensor:
        """Keep the branches with these indices (ascending). Returns the indices on the device.

        Dropping rows copies the keys and values of the others, which costs about as much as a pass. So a row without an
        open branch stays until a quarter of the rows have none.
        """
        device, self.host_rows = self.rows.device, self.host_rows[kept]
        columns = _numbers_in_rows(self.host_rows)
        self.columns, self.width = to_device(columns, device), int(columns.max()) + 1
        rows, rows_after = np.unique(self.host_rows, return_inverse=True)
        if len(rows) <= LARGEST_SHARE_OF_ROWS * self.num_rows:
            self.host_rows, rows = rows_after, to_device(rows, device)
            self.known = self.known.of_rows(rows)
            self.cache.batch_select_indices(rows)
        self.rows, kept = to_device(self.host_rows, device), to_device(kept, device)
        self.answers, self.numbers, self.positions = self.answers[kept], self.numbers[kept], self.positions[kept]
        return kept


def _answers(written: torch.Tensor) -> list[list[int]]:
    """Return the tokens of each row without the places after its end."""
    return [[token for token in row if token != _NO_TOKEN] for row in written.tolist()]


def _numbers_in_rows(rows: np.ndarray) -> np.ndarray:
    """Number the branches of each row from 0, given the row of every branch in rising order."""
    first = np.searchsorted(rows, rows)
    return np.arange(len(rows)) - first


def write_answers(
    model, rows: list[list[int]], pad_id: int, ends: list[int], max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    """Write an answer after each prompt, the likeliest token at each place.

    The model's own generation settings (sampling, penalties) are ignored.

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
    """Return the label whose word an answer begins with, as a whole word in any case; None if there is none.

    The longest matching word wins: "art history" is not "art"."""
    answer = text.strip().casefold()
    found = [
        label for label, word in enumerate(label_words) if re.match(rf"{re.escape(word.casefold())}(?!\w)", answer)
    ]
    return max(found, key=lambda label: len(label_words[label]), default=None)
