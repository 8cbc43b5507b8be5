"""Questions ready for a span head: an example is a question with all its windows, and so are the losses and scores."""

import contextlib
import gc
import math
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

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return a record for each question: its "null" score, its "loss" over the windows, and its best "spans".

        Spans come best first, at most num_best, each as [score, first character, character after its last].
        """
        windows = self.windows(rows)
        inputs = self.batch(windows, device)
        logits = forward(**inputs).float()
        losses = self._losses(logits, inputs["attention_mask"], windows).cpu().numpy()
        totals = np.add.reduceat(losses, self._first_windows(rows))
        null, best, chars = self.spans(logits, rows)
        kept = (best > ABSENT).sum(axis=1).tolist()
        spans = [
            [[score, *ends] for score, ends in zip(of_row[:count], chars_of_row, strict=False)]
            for of_row, chars_of_row, count in zip(best.tolist(), chars.tolist(), kept, strict=True)
        ]
        columns = {"null": null.tolist(), "loss": totals.tolist(), "spans": spans}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

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

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss of a window, given all questions' records."""
        return math.fsum(record["loss"] for record in records) / int(self.num_windows.sum())

    def null_odds(self, records: list[dict]) -> np.ndarray:
        """Return each null score minus the best span's, float32 [rows]: high where there seems to be no answer."""
        best = [record["spans"][0][0] if record["spans"] else ABSENT for record in records]
        return np.array([record["null"] for record in records], np.float32) - np.array(best, np.float32)

    def answers(self, records: list[dict]) -> list[list[SpanAnswer]]:
        """Return each question's best spans, best first; none where it has no context."""
        with _no_collection():
            contexts = (question.paragraph.context for question in self.questions)
            return [
                [SpanAnswer(context[start:stop], start, score) for score, start, stop in record["spans"]]
                for context, record in zip(contexts, records, strict=True)
            ]


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
