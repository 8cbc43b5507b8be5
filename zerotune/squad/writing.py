"""Answers that a causal model writes to questions, greedily: those of a paragraph together, from its keys and values.

The prompts are laid out as in training: a paragraph in a row, its questions as branches (paragraph_branches). One pass
computes them; then each further pass adds a token to every branch. Keys and values of what all prompts begin with, the
solved examples, are computed once for all batches.
"""

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from zerotune.evaluation.generation import answer_texts, end_tokens, write_answers
from zerotune.evaluation.scoring import Scorer
from zerotune.models.branches import PADDING, TRUNK, Places, branch_masks, can_share, mask_dtype
from zerotune.models.device import to_device
from zerotune.models.generator import cap_logits
from zerotune.models.precision import autocast
from zerotune.models.shared_prefix import prefix_cache
from zerotune.squad.generation import GenerationData
from zerotune.squad.prompts import read_answer

# After an answer's last token: no token id.
_NO_TOKEN = -1


class _RowsLayer(DynamicLayer):
    """A layer's keys and values of a batch's rows, [R, heads, tokens, dim], in memory that is as long as they get.

    Every layer keeps all of them, also one that sees only a window of them: masks are by position.
    """

    def __init__(self, capacity: int, head: DynamicLayer | None):
        super().__init__()
        self._capacity, self._head = capacity, head
        self._length = 0 if head is None else head.get_seq_length()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """Keys and values up to now, with these."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._capacity, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
            if self._head is not None:
                self.keys[:, :, : self._length] = self._head.keys
                self.values[:, :, : self._length] = self._head.values
        start, self._length = self._length, self._length + key_states.shape[2]
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Tokens up to now."""
        return self._length


class GreedyWriter:
    """A causal model that writes answers: called with questions, it gives a record with the "tokens" of each answer.

    Args:
        model: as language_model.load_causal_model gives it, in eval mode.
        ends: token ids that end an answer (generation.end_tokens).
        precision: of the passes; "fp32" for a model in its own type.
        in_step: write as many tokens as there may be, whether all answers have ended or not: under ZeRO-3 the ranks
            make the same passes.
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
            self._head = prefix_cache(model, list(data.head), device)

    @torch.no_grad()
    def __call__(self, rows: np.ndarray) -> list[dict]:
        """Return the likeliest token at each place of the answers to some questions, without the end."""
        with autocast(self.device.type, self.precision):
            order, written = self._write(rows)
        tokens = {row: tokens for row, tokens in zip(order.tolist(), written.tolist(), strict=True)}
        return [{"tokens": [token for token in tokens[row] if token != _NO_TOKEN]} for row in rows.tolist()]

    def _write(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the questions in the order of their branches, and their tokens, int64 [rows, max_new_tokens]."""
        data, device, num_head = self.data, self.device, len(self.data.head)
        laid, order = data.prompt_rows(rows)
        places = Places.of(laid, device, num_head)
        known = self._head_places(len(laid.input_ids)).and_then(places)
        lengths = np.array([len(data.questions[row]) for row in order])
        last = to_device(laid.starts + lengths - 1, device)
        row_of, branch_of = to_device(laid.rows, device), _numbers_in_rows(laid.rows)
        width = int(branch_of.max()) + 1
        branch_of = to_device(branch_of, device)
        positions = places.positions[row_of, last]
        cache = self._cache(num_head + laid.input_ids.shape[1] + self.max_new_tokens * width)
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
        """Hidden states [R, T, dim] of some tokens; `known` are the places of all up to now."""
        if is_plain:
            masks = None
            positions = torch.arange(input_ids.shape[1], device=self.device)[None] + len(self.data.head)
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
        return cap_logits(self.model.get_output_embeddings()(hidden), self.model.config)

    def _head_places(self, num_rows: int) -> Places:
        """The head's places, the same in each row."""
        positions = torch.arange(len(self.data.head), device=self.device).expand(num_rows, -1)
        return Places(positions, torch.full_like(positions, TRUNK))

    def _cache(self, capacity: int) -> Cache:
        heads = self._head.layers if self._head else [None] * self.model.config.num_hidden_layers
        return Cache(layers=[_RowsLayer(capacity, head) for head in heads])


def _numbers_in_rows(rows: np.ndarray) -> np.ndarray:
    """Of row numbers in rising order: how many equal ones stand before each."""
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
    """Return what is reported of written answers besides their score.

    Args:
        records: of all questions, as GreedyWriter gives them.
        answers: the answer that was read in each, "" for none.
    Returns:
        eos_rate: share that the model has ended itself; mean_answer_tokens: without the end; abstention_share.
    """
    lengths = [len(record["tokens"]) for record in records]
    return {
        "eos_rate": sum(length < max_new_tokens for length in lengths) / len(lengths),
        "mean_answer_tokens": sum(lengths) / len(lengths),
        "abstention_share": answers.count("") / len(answers),
    }
