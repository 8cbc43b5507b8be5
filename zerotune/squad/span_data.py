"""Questions ready for a span head: an example is a question with all its windows, and so are the losses and scores."""

import contextlib
import gc
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from zerotune.models.device import to_device
from zerotune.squad.questions import Question
from zerotune.squad.span_selection import ABSENT, null_scores, question_spans, window_spans
from zerotune.squad.windows import UNKNOWN, Windows
from zerotune.training.batches import LengthBatches

# `scores` gives for a question: null score, loss, and of each of its best spans score, first character, end character
NULL, LOSS, SPANS = 0, 1, 2
NUMBERS_OF_SPAN = 3


class SpanAnswer(NamedTuple):
    """A span of a paragraph with its score, start logit plus end logit."""

    text: str
    start: int
    score: float


@dataclass(frozen=True)
class SpanData(LengthBatches):
    """Windows of questions, with the interface of zerotune.training.classification.LabelledData.

    Attributes:
        questions: in the order of the features.
        features: their windows.
        pad_id: token id that fills short rows; masked, so that its value never counts.
        num_best: spans that `scores` gives for a question.
        max_answer_length: most tokens of a span.
    """

    questions: list[Question]
    features: Windows
    pad_id: int
    num_best: int
    max_answer_length: int

    @cached_property
    def ids(self) -> list[str]:
        """Id of each question, [num_questions]."""
        return [question.id for question in self.questions]

    @cached_property
    def num_windows(self) -> np.ndarray:
        """Windows of each question, int64 [num_questions]."""
        return np.diff(self.features.window_offsets)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Windows of each question times its longest: int64 [num_questions].

        A batch has one row for each window, all as long as the longest. Its padded tokens are at most the longest
        question's length times the number of questions: where a question has several windows, its first one is full,
        and so no other row is longer.
        """
        longest = np.maximum.reduceat(self.features.lengths, self.features.window_offsets[:-1])
        return self.num_windows * longest

    @property
    def scored_lengths(self) -> np.ndarray:
        """What a question costs `scores` in tokens, [num_questions]."""
        return self.lengths

    @property
    def num_truncated(self) -> int:
        """Questions that were cut to fit; of a context nothing is."""
        return self.features.num_truncated

    @property
    def token_ids(self) -> np.ndarray:
        """Every token id that occurs, int32."""
        return np.unique(self.features.pool)

    def num_targets(self, rows: np.ndarray) -> int:
        """What the sum of some questions' losses is divided by: their windows."""
        return int(self.num_windows[rows].sum())

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """All windows of some questions, question by question."""
        offsets = self.features.window_offsets
        return np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])

    def batch(self, windows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        """Right-padded model inputs of some windows: int64 [windows, longest], on the device."""
        inputs = self.features.inputs(windows, self.pad_id)
        return {name: to_device(values, device) for name, values in inputs.items()}

    def loss_sum(self, engine, rows: np.ndarray) -> torch.Tensor:
        """Mean of start's and end's cross entropy in each window of some questions, added up: a float32 scalar."""
        device, windows = engine.accelerator.device, self.windows(rows)
        inputs = self.batch(windows, device)
        logits = engine.forward(**inputs)
        return self._losses(logits, inputs["attention_mask"], windows).sum()

    def _losses(self, logits: torch.Tensor, mask: torch.Tensor, windows: np.ndarray) -> torch.Tensor:
        """Of each window, float32 [windows]; 0 where the label is UNKNOWN. Padding has no probability."""
        labels = to_device(self.features.labels[windows], logits.device)
        logits = logits.float().masked_fill(mask[..., None] == 0, -torch.inf)
        return functional.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="none").mean(dim=1)

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> np.ndarray:
        """Null score, loss over the windows, and the best spans of each question, float32 [rows, 2 + 3 × num_best].

        Spans come best first, each with its score, its first character and the one after its last; ABSENT, -1 and -1
        where a question has fewer. Float32 holds the characters exactly.
        """
        windows = self.windows(rows)
        inputs = self.batch(windows, device)
        logits = forward(**inputs).float()
        losses = self._losses(logits, inputs["attention_mask"], windows).cpu().numpy()
        totals = np.add.reduceat(losses, self._first_windows(rows))
        null, best, chars = self.spans(logits, rows)
        spans = np.concatenate([best[..., None], chars], axis=2).reshape(len(rows), -1)
        return np.column_stack([null, totals, spans]).astype(np.float32)

    def spans(self, logits: torch.Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Null scores [rows], scores [rows, num_best] and characters [rows, num_best, 2] of the best spans.

        As span_selection.null_scores and question_spans give them, of the float32 logits [windows, T, 2] of all windows
        of some questions.
        """
        features, windows, device = self.features, self.windows(rows), logits.device
        every = torch.arange(len(windows), device=device)
        null = logits[every, to_device(features.null_columns[windows], device)].sum(dim=-1)
        columns, counts = (to_device(each[windows], device) for each in (features.context_columns, features.counts))
        found = window_spans(logits, columns, counts, self.num_best, self.max_answer_length)
        best, first, last = (tensor.cpu().numpy() for tensor in found)
        exists = best > ABSENT
        window = np.broadcast_to(windows[:, None], first.shape)[exists]
        chars = np.full((*first.shape, 2), -1, np.int64)
        chars[exists, 0] = features.characters(window, first[exists], features.tokens.char_starts)
        chars[exists, 1] = features.characters(window, last[exists], features.tokens.char_ends)
        best[chars[..., 0] >= chars[..., 1]] = ABSENT  # nothing but space
        owner = np.repeat(np.arange(len(rows)), self.num_windows[rows])
        return null_scores(owner, null.cpu().numpy()), *question_spans(owner, best, chars, len(rows))

    def _first_windows(self, rows: np.ndarray) -> np.ndarray:
        """Where each question's windows begin among those of `windows(rows)`."""
        return np.cumsum(self.num_windows[rows]) - self.num_windows[rows]

    def mean_loss(self, scores: np.ndarray) -> float:
        """Of what `scores` gave for all questions: the mean loss of a window."""
        return float(scores[:, LOSS].sum(dtype=np.float64) / self.num_windows.sum())

    def null_odds(self, scores: np.ndarray) -> np.ndarray:
        """Null score minus the best span's, float32 [rows]: the higher, the surer that there is no answer."""
        return scores[:, NULL] - scores[:, SPANS]

    def answers(self, scores: np.ndarray) -> list[list[SpanAnswer]]:
        """Of what `scores` gave for all questions: each one's best spans, best first; none where it has no context."""
        spans = scores[:, SPANS:].reshape(len(scores), -1, NUMBERS_OF_SPAN)
        exists = spans[..., 0] > ABSENT
        values = spans[exists, 0].tolist()
        starts, stops = (spans[exists, side].astype(np.int64).tolist() for side in (1, 2))
        found, first = [], 0
        with _no_collection():
            for question, count in zip(self.questions, exists.sum(axis=1).tolist(), strict=True):
                own, context = slice(first, first + count), question.paragraph.context
                pieces = zip(starts[own], stops[own], values[own], strict=True)
                found.append([SpanAnswer(context[start:stop], start, value) for start, stop, value in pieces])
                first += count
        return found


@contextlib.contextmanager
def _no_collection():
    """Python's garbage collector off: at many new objects without a cycle it takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
