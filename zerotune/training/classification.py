"""Tokenised examples with one label or with any number of labels, their batches, and a classifier's scores for them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from zerotune.errors import Refused
from zerotune.files import default_cache_dir
from zerotune.metrics.label_sets import membership
from zerotune.models.device import on_device, to_device
from zerotune.models.heads import is_encoder
from zerotune.models.packed import pack
from zerotune.tasks.splits import Example
from zerotune.tasks.tokens import Encoded, encode_texts
from zerotune.training.batches import LengthBatches
from zerotune.training.class_weights import weights_of
from zerotune.training.data import Batch

UNLABELLED = -100  # cross entropy ignores it
# A text that may have any number of labels gets those whose probability is above this; task.json records it.
THRESHOLD = 0.5


def classifier_data(
    task, tokenizer, config, examples: list[Example], max_length: int, truncation: str, cached: bool = True
) -> "LabelledData | LabelSetData":
    """Tokenise examples for a classifier head; an encoder reads a pair of texts as two segments.

    Args:
        task: zerotune.tasks.texts.TextTask; an example has one label, or with `multi_label` a set of labels.
        cached: read the tokens from the cache, or add them to it.
    """
    reads_pairs = is_encoder(config)
    texts = [example.pair or example.text if reads_pairs else example.text for example in examples]
    encoded = encode_texts(tokenizer, texts, max_length, default_cache_dir() if cached else None, truncation)
    if task.multi_label:
        kind, labels = LabelSetData, membership([example.labels for example in examples], len(task.labels))
        labels = labels.astype(np.float32)
    else:
        kind, labels = LabelledData, [UNLABELLED if example.label is None else example.label for example in examples]
        labels = np.array(labels, dtype=np.int64)
    return kind([example.id for example in examples], encoded, labels, tokenizer.pad_token_id)


def check_last_tokens(name: str, config, tokenizer, data: "LabelledData") -> None:
    """Refuse texts for a causal model that end with the pad token: transformers would pool the token before it.

    Args:
        name: the model's name.
    """
    if is_encoder(config):
        return
    ends = data.encoded.ids[data.encoded.offsets[1:] - 1]
    if len(wrong := np.flatnonzero(ends == data.pad_id)):
        raise Refused(
            f"{len(wrong)} of {len(ends)} texts end with {tokenizer.pad_token!r}, first {data.ids[wrong[0]]}: the "
            f"tokenizer of {name} also pads with it, so that transformers would not read it; give the tokenizer "
            "another pad_token"
        )


@dataclass(frozen=True)
class LabelledData(LengthBatches):
    """Texts ready for a classification head, with one label each.

    Attributes:
        ids: stable id of each example, [num_examples].
        encoded: token ids of each example.
        labels: int64 class of each example, [num_examples]; -100 if unknown.
        pad_id: token id that fills short rows; it is masked, so its value does not matter.
        class_weights: weight of each label in the training loss, float64 [num_labels]; None: all equal.
        packs: whether a batch is one packed row (zerotune/models/packed.py).
    """

    ids: list[str]
    encoded: Encoded
    labels: np.ndarray
    pad_id: int
    class_weights: np.ndarray | None = None
    packs: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [num_examples]."""
        return self.encoded.lengths

    @property
    def num_truncated(self) -> int:
        """Number of texts that were cut to fit."""
        return self.encoded.num_truncated

    @property
    def token_ids(self) -> np.ndarray:
        """All token ids, one example after the other: int32 [tokens]."""
        return self.encoded.ids

    def num_targets(self, rows: np.ndarray) -> float:
        """Return the divisor for the sum of some examples' losses: the sum of their weights, or their number."""
        return float(weights_of(self.labels[rows], self.class_weights).sum())

    def inputs(self, rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        """Build model inputs for some examples on the device: right-padded int64 [rows, longest], or a packed row."""
        tokens = [self.encoded.row(row) for row in rows]
        longest = max(len(row) for row in tokens)
        input_ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for index, row in enumerate(tokens):
            input_ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self.encoded.type_ids is not None:
            types = np.zeros_like(input_ids)
            for index, row in enumerate(rows):
                start, stop = self.encoded.offsets[row : row + 2]
                types[index, : stop - start] = self.encoded.type_ids[start:stop]
            inputs["token_type_ids"] = types
        return on_device(pack(inputs) if self.packs else inputs, device)

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the inputs of a `SequenceClassifier` for some examples, with their classes and weights [rows]."""
        labels = self.labels[rows]
        weights = weights_of(labels, self.class_weights).astype(np.float32)
        return Batch(self.inputs(rows, device), to_device(labels, device), to_device(weights, device))

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each example: the natural log-probability of each class."""
        logits = forward(**self.inputs(rows, device))
        found = functional.log_softmax(logits.float(), dim=-1).tolist()
        return [{"log_probabilities": values} for values in found]

    def log_probabilities(self, records: list[dict]) -> np.ndarray:
        """Return the labels' natural log-probabilities, float32 [num_examples, labels], given all examples' records."""
        return log_probabilities(records)

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss per example, given all examples' records."""
        return float(-log_probabilities(records)[np.arange(len(records)), self.labels].mean())


@dataclass(frozen=True)
class LabelSetData(LabelledData):
    """Texts ready for a classification head, with any number of labels each.

    Attributes:
        labels: 1 where an example has a label, else 0: float32 [num_examples, num_labels]; all 0 if unknown.
        class_weights: weight of each label in the loss of the examples that have it, float64 [num_labels].
    """

    def num_targets(self, rows: np.ndarray) -> float:
        """Return the divisor for the sum of some examples' losses: their number."""
        return float(len(rows))

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the inputs of a `SequenceClassifier`, with targets of 0 or 1 and their weights, [rows, labels] each."""
        labels, weights = self.labels[rows], self.class_weights
        weights = np.ones_like(labels) if weights is None else np.where(labels > 0, weights, 1).astype(np.float32)
        return Batch(self.inputs(rows, device), to_device(labels, device), to_device(weights, device))

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each example: the logit of each label."""
        return [{"logits": values} for values in forward(**self.inputs(rows, device)).float().tolist()]

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss per example, given all examples' records: binary cross entropy, summed over labels."""
        found = logits(records)
        return float((np.logaddexp(0, found) - self.labels * found).sum(axis=1).mean())


def log_probabilities(records: list[dict]) -> np.ndarray:
    """Return the labels' natural log-probabilities from some records, float32 [items, labels]."""
    return np.array([record["log_probabilities"] for record in records], dtype=np.float32)


def logits(records: list[dict]) -> np.ndarray:
    """Return the labels' logits from some records, float32 [items, labels]."""
    return np.array([record["logits"] for record in records], dtype=np.float32)


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return each label's natural log-probability, independent of the others, from its logit: [items, labels]."""
    return -np.logaddexp(0, -logits)


def likely_labels(log_probabilities: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Return where a label's probability is above the threshold, bool [items, labels]."""
    return log_probabilities > np.log(np.float32(threshold))
