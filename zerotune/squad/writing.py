"""Writing answers to questions, greedily: the questions about a paragraph share its keys and values.

The prompts are laid out as in training: a row is a paragraph with its questions as branches (models/branches.py). One
pass computes them, and each further pass adds a token to every branch. The keys and values of what all prompts begin
with, the instruction and the solved questions, are computed once for all batches.
"""

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from zerotune.evaluation.generation import answer_texts, end_tokens, write_answers
from zerotune.evaluation.scoring import Scorer
from zerotune.models.branches import PADDING, TRUNK, Places, branch_masks, can_share, mask_dtype
from zerotune.models.device import to_device
from zerotune.models.generator import finish_logits
from zerotune.models.precision import autocast
from zerotune.models.shared_prefix import prefix_cache
from zerotune.squad.generation import GenerationData
from zerotune.squad.prompts import read_answer

_NO_TOKEN = -1  # after an answer's last token


class _RowsLayer(DynamicLayer):
    """A layer's keys and values of a batch's rows, [R, heads, tokens, dim], in memory allocated at full length.

    Every layer keeps all tokens, even one that attends to a window of them: masks go by position.

    Args:
        capacity: most tokens of a row, those of the prefix included.
        prefix: the layer's keys and values of the prefix, [1, heads, tokens, dim].
    """

    def __init__(self, capacity: int, prefix: DynamicLayer | None):
        super().__init__()
        self._capacity, self._prefix = capacity, prefix
        self._length = 0 if prefix is None else prefix.get_seq_length()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """Add the keys and values of new tokens. Returns those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._capacity, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
            if self._prefix is not None:
                self.keys[:, :, : self._length] = self._prefix.keys
                self.values[:, :, : self._length] = self._prefix.values
        start, self._length = self._length, self._length + key_states.shape[2]
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Count the tokens so far."""
        return self._length


class GreedyWriter:
    """A scorer whose records hold the "tokens" of a written answer to each question, without the end.

    Args:
        model: a causal model in eval mode (`load_language_model`).
        ends: token ids that end an answer (`end_tokens`).
        precision: of the passes; "fp32" computes in the model's own type.
        in_step: write max_new_tokens tokens even if all answers have ended: under ZeRO-3, the ranks must make equally
            many passes.
    """

    def __init__(
        self,
        model,
        data: GenerationData,
        ends: list[int],
        max_new_tokens: int,
        device: torch.device,
        precision: str = "fp32",
        in_step: bool = False,
    ):
        self.model, self.data, self.ends, self.max_new_tokens = model, data, ends, max_new_tokens
        self.device, self.precision, self.in_step = device, precision, in_step
        with autocast(device.type, precision):
            self._prefix = prefix_cache(model, list(data.prefix), device)

    @torch.no_grad()
    def __call__(self, rows: np.ndarray) -> list[dict]:
        """Write an answer to each of some questions, always the likeliest next token."""
        with autocast(self.device.type, self.precision):
            order, written = self._write(rows)
        tokens = dict(zip(order.tolist(), written.tolist(), strict=True))
        return [{"tokens": [token for token in tokens[row] if token != _NO_TOKEN]} for row in rows.tolist()]

    def _write(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the questions in the order of their branches, and their tokens, int64 [rows, max_new_tokens]."""
        data, device, num_prefix = self.data, self.device, len(self.data.prefix)
        laid, order = data.prompt_rows(rows)
        places = Places.of(laid, device, num_prefix)
        known = self._prefix_places(len(laid.input_ids)).and_then(places)
        lengths = np.array([len(data.questions[row]) for row in order])
        last = to_device(laid.starts + lengths - 1, device)
        row_of, branch_of = to_device(laid.rows, device), _numbers_in_rows(laid.rows)
        width = int(branch_of.max()) + 1
        branch_of = to_device(branch_of, device)
        positions = places.positions[row_of, last]
        cache = self._cache(num_prefix + laid.input_ids.shape[1] + self.max_new_tokens * width)
        hidden = self._pass(to_device(laid.input_ids, device), places, known, cache, laid.is_plain)
        hidden = hidden[row_of, last]
        written = torch.full((len(rows), self.max_new_tokens), _NO_TOKEN, device=device)
        ends, ended = torch.tensor(self.ends, device=device), torch.zeros(len(rows), dtype=torch.bool, device=device)
        for step in range(self.max_new_tokens):
            tokens = self._logits(hidden).argmax(-1)
            ended |= torch.isin(tokens, ends)
            written[:, step] = torch.where(ended, _NO_TOKEN, tokens)
            if step == self.max_new_tokens - 1 or (not self.in_step and bool(ended.all())):
                break
            shape = (len(laid.input_ids), width)
            input_ids = torch.full(shape, data.pad_id, device=device)
            input_ids[row_of, branch_of] = tokens
            new = Places(torch.zeros_like(input_ids), torch.full_like(input_ids, PADDING))
            new.positions[row_of, branch_of] = positions + step + 1
            new.branches[row_of, branch_of] = branch_of + 1
            known = known.and_then(new)
            hidden = self._pass(input_ids, new, known, cache, False)[row_of, branch_of]
        return order, written.cpu().numpy()

    def _pass(self, input_ids, places: Places, known: Places, cache: Cache, is_plain: bool) -> torch.Tensor:
        """Return the hidden states [R, T, dim] of new tokens; `known` are the places of all tokens with these."""
        if is_plain:
            masks = None
            positions = torch.arange(input_ids.shape[1], device=self.device)[None] + len(self.data.prefix)
        else:
            masks = branch_masks(self.model.config, places, known, mask_dtype(self.model, self.device))
            positions = places.positions
        return self.model.base_model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return finish_logits(self.model.get_output_embeddings()(hidden), self.model.config)

    def _prefix_places(self, num_rows: int) -> Places:
        """Return the places of the prefix, the same in each row."""
        positions = torch.arange(len(self.data.prefix), device=self.device).expand(num_rows, -1)
        return Places(positions, torch.full_like(positions, TRUNK))

    def _cache(self, capacity: int) -> Cache:
        prefixes = self._prefix.layers if self._prefix else [None] * self.model.config.num_hidden_layers
        return Cache(layers=[_RowsLayer(capacity, prefix) for prefix in prefixes])


def _numbers_in_rows(rows: np.ndarray) -> np.ndarray:
    """Number the branches of each row from 0, given the row of every branch in rising order."""
    first = np.searchsorted(rows, rows)
    return np.arange(len(rows)) - first


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

    A model whose questions cannot share a row (`can_share`) writes prompt by prompt.

    Args:
        precision, in_step: as for `GreedyWriter`.
    """
    ends = end_tokens(model, tokenizer, data.prompt.wording)
    if can_share(model.config, model.config._attn_implementation):
        return GreedyWriter(model, data, ends, max_new_tokens, device, precision, in_step)

    def score(rows: np.ndarray) -> list[dict]:
        prompts = [data.prompt_tokens(row) for row in rows]
        with autocast(device.type, precision):
            written = write_answers(model, prompts, data.pad_id, ends, max_new_tokens, device)
        return [{"tokens": tokens} for tokens in written]

    return score


def read_answers(tokenizer, records: list[dict]) -> list[str]:
    """Read the answer in each record's "tokens", "" for none."""
    return [read_answer(text) for text in answer_texts(tokenizer, records)]


def writing_summary(records: list[dict], answers: list[str], max_new_tokens: int) -> dict[str, float]:
    """Return the statistics of written answers that are reported besides their scores.

    Args:
        records: of all questions, with the "tokens" of their answers.
        answers: what `read_answers` reads in them.
    Returns:
        eos_rate: share of the answers that the model ended itself. mean_answer_tokens: without the end.
        abstention_share.
    """
    lengths = [len(record["tokens"]) for record in records]
    return {
        "eos_rate": sum(length < max_new_tokens for length in lengths) / len(lengths),
        "mean_answer_tokens": sum(lengths) / len(lengths),
        "abstention_share": answers.count("") / len(answers),
    }
