"""An embedding that trains only the rows that the training split uses.

The other rows would get no gradient, and AdamW with zero moments only decays them, by a factor known in closed form.
SST-2 uses about a tenth of a 128,256-row table: gradients, both moments and the optimizer's passes shrink with it.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class UsedRowsEmbedding(nn.Module):
    """Replaces an `nn.Embedding` during full tuning.

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
            return functional.embedding(place, self.weight, self._padding_place)
        trained = functional.embedding(place.clamp(min=0), self.weight)
        unused = functional.embedding(input_ids, self.table) * self.unused_decay
        return torch.where((place < 0).unsqueeze(-1), unused, trained)

    def whole(self) -> nn.Embedding:
        """Return the plain embedding that training the whole table would have given."""
        table = self.table * self.unused_decay
        table[self.rows] = self.weight.detach().to(table.dtype)
        return nn.Embedding(*table.shape, padding_idx=self.padding_idx, _weight=table)


def train_used_rows(model: nn.Module, used: np.ndarray) -> UsedRowsEmbedding | None:
    """Put a `UsedRowsEmbedding` into a transformers model and return it; None if its embedding does not train."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad:
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
    """Scale the rows that are not trained as AdamW's weight decay would have after some steps.

    Args:
        rate_factors: share of the peak rate at each step that is done.
    """
    for part in model.modules():
        if isinstance(part, UsedRowsEmbedding):
            part.unused_decay = unused_decay(rate_factors, peak_rate, weight_decay)


def unused_decay(rate_factors: list[float], peak_rate: float, weight_decay: float) -> float:
    """Return the factor by which AdamW shrinks a weight without gradient: the product of 1 - rate × weight decay.

    Loshchilov & Hutter 2019, algorithm 2, with both moments zero.
    """
    return float(np.prod(1 - np.array(rate_factors, dtype=np.float64) * peak_rate * weight_decay))
