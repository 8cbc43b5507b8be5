"""What all prompts begin with is computed once: the rest of each prompt sees its keys and values.

Every layer keeps the whole prefix, also those that see only a window of it: transformers masks them by position, and a
window may begin anywhere in the prefix.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class _PrefixLayer(DynamicLayer):
    """A layer's keys and values of the prefix, [1, heads, prefix, dim]: seen by every row of a batch, never changed."""

    def __init__(self, computed: DynamicLayer):
        super().__init__()
        self.lazy_initialization(computed.keys, computed.values)
        self.keys, self.values = computed.keys, computed.values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """Keys and values of prefix and rows, [rows, heads, prefix + row, dim], which nobody keeps."""
        shape = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(shape), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(shape), value_states], dim=-2)


def num_shared_tokens(rows: list[list[int]], most: int) -> int:
    """How many first tokens all rows have in common, `most` at the utmost."""
    first, last = min(rows), max(rows)  # in lexical order these differ soonest
    return next((place for place in range(most) if first[place] != last[place]), most)


@torch.no_grad()
def prefix_cache(model, token_ids: list[int], device: torch.device) -> Cache | None:
    """Keys and values of a causal model for prompts that begin with the tokens; None for no tokens."""
    if not token_ids:
        return None
    cache = DynamicCache()  # without the configuration, so that no layer forgets what leaves its window
    model.base_model(torch.tensor([token_ids], device=device), past_key_values=cache, use_cache=True)
    return Cache(layers=[_PrefixLayer(layer) for layer in cache.layers])
