"""From start and end logits to answers: the best spans of a window and of a question, and the score for none.

A span's score is its start logit plus its end logit (Devlin et al. 2019, arXiv:1810.04805, section 4.3).
"""

import numpy as np
import torch
from torch.nn import functional

# the score of a span that does not exist, where a question has fewer than are asked for: finite, and below any other
ABSENT = -1e30


def window_spans(
    logits: torch.Tensor, context_columns: torch.Tensor, counts: torch.Tensor, num_best: int, max_answer_length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best spans of each window, exactly: all pairs of first and last token are in the running.

    The starts of the best spans are among the best starts, where a start counts with the best end that it can have:
    only their ends are looked at one by one.

    Args:
        logits: float32 [W, T, 2], of start and end.
        context_columns, counts: int64 [W], where a window's context begins, and how many tokens it has.
        max_answer_length: most tokens of a span.
    Returns:
        Scores, float32, and the columns of first and last token, int64, [W, num_best] each, best first. Where a window
        has fewer spans the score is ABSENT and the columns mean nothing.
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
    """The best spans of each question over its windows: a stretch of text counts once, with its best score.

    Args:
        questions: int64 [W], the question of each window, from 0 to num_questions - 1.
        scores: float32 [W, K], ABSENT where there is no span.
        chars: int64 [W, K, 2], first character of each span and the one after its last.
    Returns:
        Scores, float32 [num_questions, K], best first; of equal ones the earlier and shorter span. Its characters,
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
    """How strongly each question is left unanswered: float32 [questions].

    The lowest of its windows' scores for "no answer", that of the window which is surest of an answer, as in
    transformers' run_qa.py: a window without the answer says rightly that it holds none.

    Args:
        questions: int64 [W], rising from 0, each question once or more.
        scores: float32 [W].
    """
    return np.minimum.reduceat(scores, np.flatnonzero(np.diff(questions, prepend=-1)))
