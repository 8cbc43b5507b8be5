"""A prefix that all prompts share, computed once: the rest of each prompt attends to its keys and values.

Every layer keeps the whole prefix, even those that attend to a window only: transformers masks them by position, and a
window may begin anywhere in the prefix.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from zerotune.models.branches import FULL, SLIDING, layer_types


class _PrefixLayer(DynamicLayer):
    """A layer's keys and values of the prefix, [1, heads, prefix, dim]: shared by a batch's rows, never changed."""

    def __init__(self, computed: DynamicLayer):
        super().__init__()
        self.lazy_initialization(computed.keys, computed.values)
        self.keys, self.values = computed.keys, computed.values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """Return keys and values of prefix and rows, [rows, heads, prefix + row, dim], without keeping them."""
        shape = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(shape), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(shape), value_states], dim=-2)


@dataclass
class SharedRows(Sequence):
    """Rows of token ids that keep their common beginning once: with shots, 25,000 prompts would take gigabytes.

    Attributes:
        head: the beginning of all rows, an array of 32-bit integers (Python's lists take ten times the memory).
        tails: the rest of each row.
    """

    head: array = field(default_factory=lambda: array("i"))
    tails: list[array] = field(default_factory=list)

    def append(self, row: Sequence[int]) -> None:
        """Add a row, and cut the head to the part that it shares with the others."""
        row = array("i", row)
        if not self.tails:
            self.head = row
        elif row[: len(self.head)] != self.head:
            pairs = enumerate(zip(self.head, row, strict=False))
            common = next((place for place, (ours, its) in pairs if ours != its), min(len(self.head), len(row)))
            self.tails = [self.head[common:] + tail for tail in self.tails]
            self.head = self.head[:common]
        self.tails.append(row[len(self.head) :])

    def __len__(self) -> int:
        return len(self.tails)

    def __getitem__(self, number: int) -> array:
        return self.head + self.tails[number]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [num_rows]."""
        return len(self.head) + np.array([len(tail) for tail in self.tails])


def keeps_keys_and_values(config) -> bool:
    """Return whether all layers keep keys and values, which prompts can share; Qwen3.5's linear attention does not."""
    return set(layer_types(config)) <= {FULL, SLIDING}


@torch.no_grad()
def prefix_cache(model, token_ids: Sequence[int], device: torch.device) -> Cache | None:
    """Return keys and values of a causal model for prompts that begin with the tokens; None for no tokens.

    Also None for a model that does not keep them (`keeps_keys_and_values`): it reads whole prompts.
    """
    if not token_ids or not keeps_keys_and_values(model.config):
        return None
    cache = DynamicCache()  # without the configuration, so that no layer drops tokens outside its window
    model.base_model(torch.tensor([list(token_ids)], device=device), past_key_values=cache, use_cache=True)
    return Cache(layers=[_PrefixLayer(layer) for layer in cache.layers])
