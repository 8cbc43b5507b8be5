"""Scores of items: each id exactly once, at any world size, token budget or restart."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zerotune.errors import Refused
from zerotune.files import json_sha256, read_json_lines, write_json_lines
from zerotune.run.cpu import give_back_memory
from zerotune.run.folder import PARTIAL_FOLDER
from zerotune.run.launch import from_rank_0, on_all_ranks
from zerotune.training.batches import cut_by_budget

Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Answering:
    """A loaded model and its items, ready to be scored.

    Attributes:
        score: indices [batch] -> float32 [batch, numbers]: log-probabilities, or token ids of written answers.
        lengths: what an item costs, in tokens, [num_items].
        batches: index arrays that cover all items, the same at any world size.
        found: what metrics.json says of model and items.
        read: what `score` gave for all items, [num_items, numbers] -> the model's answers.
    """

    score: Scorer
    lengths: np.ndarray
    batches: list[np.ndarray]
    found: dict
    read: Callable[[np.ndarray], Any]


class PartialScores:
    """Scores of finished batches, kept on disk so that an interrupted evaluation goes on where it stopped.

    Args:
        folder: the evaluation's output folder.
        fingerprint: everything the scores depend on; scores kept under another one are deleted.
    """

    def __init__(self, folder: Path, fingerprint: dict):
        self.folder = folder / PARTIAL_FOLDER
        self.key = json_sha256(fingerprint)
        self._file = None

    def read(self) -> dict[int, np.ndarray]:
        """Scores by batch number, as far as earlier tries came."""
        done = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            rows = _undamaged(path)
            if rows and rows[0] == {"key": self.key}:
                done |= {row["batch"]: np.array(row["scores"], dtype=np.float32) for row in rows[1:]}
        return done

    def open(self, rank: int) -> None:
        """Begin this rank's file with what it holds that is whole and ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{rank}.jsonl"
        rows = _undamaged(path)
        write_json_lines(path, rows if rows[:1] == [{"key": self.key}] else [{"key": self.key}])
        self._file = path.open("a", encoding="utf-8")

    def add(self, batch: int, scores: np.ndarray) -> None:
        """Keep one batch's scores."""
        # float32 -> repr of the equal float64 -> float32 loses nothing
        self._file.write(json.dumps({"batch": batch, "scores": scores.tolist()}) + "\n")
        self._file.flush()

    def delete(self) -> None:
        """Remove the folder, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _undamaged(path: Path) -> list[dict]:
    try:
        return read_json_lines(path)
    except Refused:  # what can be computed again need not be restored
        return []


class BackOff:
    """Scores a batch in smaller parts once one has run out of memory.

    Args:
        score: a Scorer without collective operations.
        lengths: what an item costs, in tokens, [num_items]; batches hold items by falling cost.
    """

    def __init__(self, score: Scorer, lengths: np.ndarray):
        self.score, self.lengths = score, lengths
        self.budget: int | None = None

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """The scores of a batch. Raises Refused where one item alone does not fit."""
        if self.budget is None:
            return self._score(items)
        return np.concatenate([self._score(items[run]) for run in cut_by_budget(self.lengths[items], self.budget)])

    def _score(self, items: np.ndarray) -> np.ndarray:
        try:
            return self.score(items)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        # outside of the except block, where the traceback keeps what did not fit
        longest = int(self.lengths[items].max())
        if len(items) == 1:
            raise Refused(
                f"out of memory on a single item of {longest:,} tokens: use fewer --shots, a smaller --max-length"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.budget = longest * len(items) // 2
        print(f"out of memory: goes on with {self.budget:,} padded tokens in a batch", flush=True)
        return self(items)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error) or "not enough memory" in str(error)


def score_items(
    score: Scorer,
    batches: list[np.ndarray],
    accelerator,
    partial: PartialScores | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Score every item once; all ranks take part and all get the result.

    Args:
        score: indices [batch] -> float32 [batch, num_scores]. Called equally often on every rank.
        batches: disjoint index arrays that cover 0…num_items-1, the same on every rank.
        on_batch: called after each batch, on each rank.
    Returns:
        float32 [num_items, num_scores].
    """
    done = from_rank_0(accelerator, partial.read) if partial else {}  # nobody writes before all have it
    if partial:
        partial.open(accelerator.process_index)
    todo = [number for number in range(len(batches)) if number not in done]
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with torch.no_grad():  # inference_mode's tensors cannot be gathered by ZeRO-3
        for start in range(0, len(todo), world_size):
            mine = start + rank < len(todo)
            number = todo[start + rank] if mine else todo[start]  # a rank without work repeats one: ZeRO-3 would hang
            scores = score(batches[number])
            if mine:
                done[number] = scores
                if partial:
                    partial.add(number, scores)
            if accelerator.device.type == "cpu":
                give_back_memory()
            on_batch()
    return _assemble(_share(done, accelerator), batches)


def _share(done: dict[int, np.ndarray], accelerator) -> dict[int, np.ndarray]:
    return {number: scores for part in on_all_ranks(accelerator, done) for number, scores in part.items()}


def _assemble(done: dict[int, np.ndarray], batches: list[np.ndarray]) -> np.ndarray:
    assert done.keys() == set(range(len(batches))), "every batch is scored"
    num_items = sum(len(batch) for batch in batches)
    scores = np.full((num_items, done[0].shape[1]), np.nan, dtype=np.float32)
    for number, batch in enumerate(batches):
        scores[batch] = done[number]
    return scores
