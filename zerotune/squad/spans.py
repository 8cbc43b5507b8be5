"""Spans of text as answers: a head gives each token a start and an end logit, and a span's score is their sum.

The score of "no answer" is the same sum at the null position of a window (Devlin et al. 2019, arXiv:1810.04805, section
4.3). An example is a question with all its windows.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional

from zerotune.files import default_cache_dir
from zerotune.models.device import on_device, to_device
from zerotune.models.heads import is_encoder
from zerotune.models.packed import pack
from zerotune.settings.groups import QuestionSettings
from zerotune.squad.questions import Question
from zerotune.squad.windows import UNKNOWN, Windows, cut_windows
from zerotune.training.batches import LengthBatches
from zerotune.training.data import Batch

# The score that stands for missing spans if a window or question has too few: finite, and below all others.
ABSENT = -1e30


# --- arithmetic ---


def window_losses(
    logits: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return each window's loss, the mean of the cross entropies of its start and its end: float32 [windows].

    Args:
        logits: [windows, T, 2], of start and end. Padding gets no probability.
        attention_mask: [windows, T], 0 on padding.
        targets: int64 [windows, 2], columns of the answer's first and last token; UNKNOWN ones have a loss of 0.
        label_smoothing: share of a target's probability that is spread evenly over the window's tokens.
    """
    padding = attention_mask[..., None] == 0
    logits = logits.float().masked_fill(padding, -torch.inf)
    losses = functional.cross_entropy(logits, targets, ignore_index=UNKNOWN, reduction="none")
    if label_smoothing:  # torch's own smoothing would include the padding, and be infinite
        surprisals = -logits.log_softmax(dim=1).masked_fill(padding, 0.0)
        spread = surprisals.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        losses = (1 - label_smoothing) * losses + label_smoothing * spread.masked_fill(targets == UNKNOWN, 0.0)
    return losses.mean(dim=1)


def window_spans(
    logits: torch.Tensor, context_columns: torch.Tensor, counts: torch.Tensor, num_best: int, max_answer_length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the best spans of each window among all pairs of a first and a last token.

    The search is exact: the starts of the best spans are among those whose score with their best possible end is
    highest, so that only these starts' ends need to be looked at one by one.

    Args:
        logits: float32 [W, T, 2], of start and end.
        context_columns, counts: int64 [W], where a window's context begins, and how many tokens it has.
        max_answer_length: most tokens of a span.
    Returns:
        Scores, float32, and columns of first and last token, int64, [W, num_best] each, best first. If a window has
        fewer spans, the other scores are ABSENT and their columns meaningless.
    """
    num_columns = logits.shape[1]
    longest = min(max_answer_length, num_columns)
    column = torch.arange(num_columns, device=logits.device)
    inside = (column >= context_columns[:, None]) & (column < (context_columns + counts)[:, None])
    start = logits[..., 0].masked_fill(~inside, -torch.inf)
    end = functional.pad(logits[..., 1].masked_fill(~inside, -torch.inf), (0, longest - 1), value=-torch.inf)
    best_end = functional.max_pool1d(end[:, None], longest, stride=1)[:, 0]
    firsts = (start + best_end).topk(min(num_best, num_columns)).indices
    ends = end.gather(1, (firsts[..., None] + torch.arange(longest, device=logits.device)).flatten(1))
    scores = start.gather(1, firsts)[..., None] + ends.view(*firsts.shape, longest)
    found, places = scores.flatten(1).topk(min(num_best, firsts.shape[1] * longest))
    first = firsts.gather(1, places // longest)
    missing = (0, num_best - found.shape[1])
    found = functional.pad(found.masked_fill(found == -torch.inf, ABSENT), missing, value=ABSENT)
    return found, functional.pad(first, missing), functional.pad(first + places % longest, missing)


def question_spans(
    questions: np.ndarray, scores: np.ndarray, chars: np.ndarray, num_questions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the best spans of each question's windows: the same text in two windows counts once, with its best score.

    Args:
        questions: int64 [W], the question of each window, from 0 to num_questions - 1.
        scores: float32 [W, K], ABSENT where there is no span.
        chars: int64 [W, K, 2], each span's first character, and the one after its last.
    Returns:
        Scores, float32 [num_questions, K], best first; of equal ones the earlier and shorter span first. Characters,
        int64 [num_questions, K, 2]. ABSENT and -1 where a question has fewer spans.
    """
    num_best = scores.shape[1]
    exists = scores > ABSENT
    owner = np.broadcast_to(questions[:, None], scores.shape)[exists]
    score, first, stop = scores[exists], *chars[exists].T
    order = np.lexsort((stop, first, -score, owner))
    span = ((owner << 44) + (first << 22) + stop)[order]  # 22 bits: contexts of up to four million characters
    order = order[np.sort(np.unique(span, return_index=True)[1])]
    rank = np.arange(len(order)) - np.searchsorted(owner[order], np.arange(num_questions))[owner[order]]
    order, rank = order[rank < num_best], rank[rank < num_best]
    best = np.full((num_questions, num_best), ABSENT, np.float32)
    found = np.full((num_questions, num_best, 2), -1, np.int64)
    best[owner[order], rank] = score[order]
    found[owner[order], rank, 0], found[owner[order], rank, 1] = first[order], stop[order]
    return best, found


def null_scores(questions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return each question's null score, the lowest of its windows': float32 [questions].

    This is the score of the window that is surest of an answer, as in transformers' run_qa.py: the other windows may be
    right that they hold none.

    Args:
        questions: int64 [W], the question of each window: rising from 0, each question at least once.
        scores: float32 [W], each window's score of "no answer".
    """
    return np.minimum.reduceat(scores, np.flatnonzero(np.diff(questions, prepend=-1)))


# --- data ---


@dataclass(frozen=True)
class SpanData(LengthBatches):
    """Questions with their windows, for a span head. "Rows" are indices of questions.

    Attributes:
        questions: in the order of the windows.
        windows: of all questions.
        pad_id: token id that fills short rows; it is masked, so its value does not matter.
        num_best: spans that `scores` finds for a question.
        max_answer_length: most tokens of a span.
        packs: whether a batch's windows are one packed row (zerotune/models/packed.py).
    """

    questions: list[Question]
    windows: Windows
    pad_id: int
    num_best: int
    max_answer_length: int
    packs: bool = False

    @cached_property
    def ids(self) -> list[str]:
        """Return the id of each question, [num_questions]."""
        return [question.id for question in self.questions]

    @cached_property
    def num_windows(self) -> np.ndarray:
        """Return the number of each question's windows, int64 [num_questions]."""
        return np.diff(self.windows.window_offsets)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the length of each question in tokens, its windows times the longest of them: int64 [num_questions].

        A batch has a row for each window, padded to the longest. Its padded tokens are at most the number of questions
        times the largest of their lengths: if a question has several windows, its first one is full, and no row is
        longer.
        """
        longest = np.maximum.reduceat(self.windows.lengths, self.windows.window_offsets[:-1])
        return self.num_windows * longest

    @property
    def num_truncated(self) -> int:
        """Count the questions that were cut; contexts never are."""
        return self.windows.num_truncated

    @property
    def token_ids(self) -> np.ndarray:
        """Return every token id that occurs, int32."""
        return self.windows.token_ids

    def num_tokens(self, rows: np.ndarray) -> int:
        """Return the number of tokens of some questions' windows, without padding."""
        return int(self.windows.lengths[self.windows_of(rows)].sum())

    def num_targets(self, rows: np.ndarray) -> int:
        """Count the windows of some questions, the divisor for the sum of their losses."""
        return int(self.num_windows[rows].sum())

    def windows_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the indices of some questions' windows, question by question."""
        offsets = self.windows.window_offsets
        return np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Build the rows of some questions' windows, [windows, longest], and the columns of their answers."""
        windows = self.windows_of(rows)
        inputs = self.windows.inputs(windows, self.pad_id)
        inputs = on_device(pack(inputs) if self.packs else inputs, device)
        return Batch(inputs, to_device(self.windows.labels[windows], device))

    def scores(self, forward, rows: np.ndarray, device: torch.device) -> list[dict]:
        """Return `span_records` of some questions, each with the "loss" of all the question's windows."""
        batch = self.batch(rows, device)
        logits = forward(**batch.inputs).float()
        losses = window_losses(logits, batch.inputs["attention_mask"], batch.targets).cpu().numpy()
        sums = np.add.reduceat(losses, np.cumsum(self.num_windows[rows]) - self.num_windows[rows]).tolist()
        return [record | {"loss": loss} for record, loss in zip(self.span_records(logits, rows), sums, strict=True)]

    def span_records(self, logits: torch.Tensor, rows: np.ndarray) -> list[dict]:
        """Return a record for each question: its "null" score, and its best "spans".

        Spans come best first, at most num_best, each as [score, first character, character after its last].

        Args:
            logits: float32 [windows, T, 2], of all the questions' windows.
        """
        windows, chosen, device = self.windows, self.windows_of(rows), logits.device
        every = torch.arange(len(chosen), device=device)
        null = logits[every, to_device(windows.null_columns[chosen], device)].sum(dim=-1)
        columns, counts = (to_device(each[chosen], device) for each in (windows.context_columns, windows.counts))
        found = window_spans(logits, columns, counts, self.num_best, self.max_answer_length)
        scores, first, last = (tensor.cpu().numpy() for tensor in found)
        exists = scores > ABSENT
        window = np.broadcast_to(chosen[:, None], first.shape)[exists]
        chars = np.full((*first.shape, 2), -1, np.int64)
        chars[exists, 0] = windows.characters(window, first[exists], windows.tokens.char_starts)
        chars[exists, 1] = windows.characters(window, last[exists], windows.tokens.char_ends)
        scores[chars[..., 0] >= chars[..., 1]] = ABSENT  # spans of nothing but space
        owner = np.repeat(np.arange(len(rows)), self.num_windows[rows])
        scores, chars = question_spans(owner, scores, chars, len(rows))
        spans = [
            [[score, *ends] for score, ends in zip(*best, strict=True) if score > ABSENT]
            for best in zip(scores.tolist(), chars.tolist(), strict=True)
        ]
        nulls = null_scores(owner, null.cpu().numpy()).tolist()
        return [{"null": lowest, "spans": best} for lowest, best in zip(nulls, spans, strict=True)]

    # --- results from all questions' records ---

    def mean_loss(self, records: list[dict]) -> float:
        """Return the mean loss per window."""
        return math.fsum(record["loss"] for record in records) / int(self.num_windows.sum())

    def null_odds(self, records: list[dict]) -> np.ndarray:
        """Return each question's null score minus its best span's: the higher, the surer that there is no answer.

        Differences of float32 numbers, as float64 [num_questions].
        """
        best = [record["spans"][0][0] if record["spans"] else ABSENT for record in records]
        null = np.array([record["null"] for record in records], np.float32)
        return (null - np.array(best, np.float32)).astype(np.float64)

    def best_texts(self, records: list[dict]) -> list[str]:
        """Return each question's best span, however likely it is that there is no answer; "" if there is no span."""
        return [spans[0]["text"] if spans else "" for spans in self.n_best(records, 1)]

    def n_best(self, records: list[dict], most: int | None = None) -> list[list[dict]]:
        """Return each question's best spans, best first, as {"text", "start", "score"}; `most` of them, None: all."""
        return [
            [
                {"text": question.paragraph.context[start:stop], "start": start, "score": score}
                for score, start, stop in record["spans"][:most]
            ]
            for question, record in zip(self.questions, records, strict=True)
        ]


def span_data(
    tokenizer, questions: list[Question], settings: QuestionSettings, config, cached: bool = True
) -> SpanData:
    """Tokenise questions for a span head.

    Args:
        settings: resolved by `resolve_questions`.
        cached: read the tokens from the cache, or add them to it.
    Raises:
        Refused: as `cut_windows`.
    """
    cache_dir = default_cache_dir() if cached else None
    windows = cut_windows(
        tokenizer, questions, not is_encoder(config), settings.max_length, settings.doc_stride, cache_dir
    )
    return SpanData(questions, windows, tokenizer.pad_token_id, settings.n_best, settings.max_answer_length)
