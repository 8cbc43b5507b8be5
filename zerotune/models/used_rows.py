"""An embedding that trains only the rows that the training split uses.

The other rows would get no gradient, and AdamW with zero moments only decays them, by a factor known in closed form.
SST-2 uses about a tenth of a 128,256-row table: gradients, both moments and the optimizer's passes shrink with it.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class UsedRowsEmbedding(nn.Module):
    """Replaces an `nn.Embedding` during full tuning, or one that multiplies by its `embed_scale` as Gemma's does.

    Args:
        embedding: [num_embeddings, dim].
        used: ids that occur in training, padding included, [num_used], without repeats.
    """

    def __init__(self, embedding: nn.Embedding, used: np.ndarray):
        super().__init__()
        ids = np.sort(used).astype(np.int64)
        rows = torch.from_numpy(ids)
        place = torch.full((embedding.num_embeddings,), -1)
        place[rows] = torch.arange(len(rows))
        table = embedding.weight.detach()
        self.padding_idx = embedding.padding_idx
        self.embed_scale = getattr(embedding, "scalar_embed_scale", None)
        self._kind = type(embedding)
        has_padding = self.padding_idx is not None and self.padding_idx in ids
        self._padding_place = int(np.searchsorted(ids, self.padding_idx)) if has_padding else None
        self.unused_decay = 1.0
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.weight = nn.Parameter(table[rows].clone())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., dim] of ids [...]. In training every id must be a used one."""
        place = self.place[input_ids]
        if self.training:
            return self._scaled(functional.embedding(place, self.weight, self._padding_place))
        trained = functional.embedding(place.clamp(min=0), self.weight)
        unused = functional.embedding(input_ids, self.table) * self.unused_decay
        return self._scaled(torch.where((place < 0).unsqueeze(-1), unused, trained))

    def _scaled(self, embedded: torch.Tensor) -> torch.Tensor:
        return embedded if self.embed_scale is None else embedded * self.embed_scale

    def whole(self) -> nn.Embedding:
        """Return the stock embedding that training the whole table would have given."""
        table = self.table * self.unused_decay
        table[self.rows] = self.weight.detach().to(table.dtype)
        scale = {} if self.embed_scale is None else {"embed_scale": self.embed_scale}
        whole = self._kind(1, table.shape[1], padding_idx=None, **scale)  # no large table is drawn first
        whole.num_embeddings, whole.padding_idx = len(table), self.padding_idx
        whole.weight = nn.Parameter(table)
        return whole.to(table.device)


def train_used_rows(model: nn.Module, used: np.ndarray) -> UsedRowsEmbedding | None:
    """Put a `UsedRowsEmbedding` into a transformers model and return it; None if its embedding does not train."""
    embedding = model.get_input_embeddings()
    is_known = type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale")
    if not is_known or not embedding.weight.requires_grad:
        return None
    replacement = UsedRowsEmbedding(embedding, used)
    model.set_input_embeddings(replacement)
    return replacement


def restore_whole_embedding(model: nn.Module) -> None:
    """Undo `train_used_rows`, keeping the trained rows."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, UsedRowsEmbedding):
        model.set_input_embeddings(embedding.whole())


def decay_unused_rows(model: nn.Module, rate_factors: list[float], peak_rate: float, weight_decay: float) -> None:
    """Scale the rows that are not trained as AdamW's weight decay would have after the steps done so far.

    Args:
        rate_factors: share of the peak rate at each of these steps.
    """
    for part in model.modules():
        if isinstance(part, UsedRowsEmbedding):
            part.unused_decay = unused_decay(rate_factors, peak_rate, weight_decay)


def unused_decay(rate_factors: list[float], peak_rate: float, weight_decay: float) -> float:
    """Return the factor by which AdamW shrinks a weight without gradient: the product of 1 - rate × weight decay.

    Loshchilov & Hutter 2019, algorithm 2, with both moments zero.
    """
    return float(np.prod(1 - np.array(rate_factors, dtype=np.float64) * peak_rate * weight_decay))
