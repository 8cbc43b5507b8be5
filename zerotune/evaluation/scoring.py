"""Score items, each exactly once, at any world size and token budget and after any restart."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.files import json_sha256, read_json_lines, write_json_lines
from zerotune.records import Count, record_problem
from zerotune.run.cpu import give_back_memory
from zerotune.run.folder import PARTIAL_FOLDER
from zerotune.run.launch import from_rank_0, on_all_ranks
from zerotune.run.out_of_memory import is_out_of_memory
from zerotune.run.process import is_main_process
from zerotune.terminal import show_progress
from zerotune.training.batches import cut_by_budget

# Item indices [batch] -> one record for each: a JSON object, whose numbers are finite unless the model is damaged.
Scorer = Callable[[np.ndarray], list[dict]]


@dataclass(frozen=True)
class PreparedModel:
    """A loaded model with its items, ready to be scored.

    Attributes:
        score: gives a record for each item of a batch.
        costs: tokens that scoring each item takes, in all of its rows, [num_items].
        batches: index arrays that cover all items, the same at any world size; each holds its items by falling cost.
        description: the entries of metrics.json about the model and the items.
        read: the records of all items, in their order -> the model's answers.
        in_step: the ranks must make equally many passes, so no batch is cut when memory runs out.
    """

    score: Scorer
    costs: np.ndarray
    batches: list[np.ndarray]
    description: dict
    read: Callable[[list[dict]], Any]
    in_step: bool = False


class PartialScores:
    """Records of finished batches, kept on disk so that an interrupted evaluation resumes where it stopped.

    Args:
        folder: the evaluation's output folder.
        fingerprint: everything the records depend on; records kept under another one are deleted.
    """

    def __init__(self, folder: Path, fingerprint: dict):
        self.folder = folder / PARTIAL_FOLDER
        self.key = json_sha256(fingerprint)
        self._file = None

    def read(self) -> dict[int, list[dict]]:
        """Return the records that earlier attempts kept, by batch number."""
        done = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            done |= {row["batch"]: row["records"] for row in self._rows(path)}
        return done

    def _rows(self, path: Path) -> list["_Scored"]:
        """Return the undamaged lines of this evaluation in a file; all others can be computed again."""
        try:
            first, *rows = read_json_lines(path) or [{}]
        except Refused:
            return []
        if first != {"key": self.key}:
            return []
        return [row for row in rows if record_problem(row, _Scored) is None and row["sha256"] == _sha256(row)]

    def open(self, rank: int) -> None:
        """Open this rank's file, keeping only the undamaged lines of this evaluation."""
        if self.folder.is_file():
            self.folder.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{rank}.jsonl"
        write_json_lines(path, [{"key": self.key}, *self._rows(path)])
        self._file = path.open("a", encoding="utf-8")

    def add(self, batch: int, records: list[dict]) -> None:
        """Keep one batch's records. JSON holds their float32 numbers exactly."""
        row = {"batch": batch, "records": records}
        self._file.write(json.dumps(row | {"sha256": _sha256(row)}) + "\n")
        self._file.flush()

    def delete(self) -> None:
        """Remove the folder, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _Scored(TypedDict):
    """A line of a rank's file: a batch and the records of its items, with a hash of both."""

    batch: Count
    records: list[dict[str, Any]]
    sha256: str


def _sha256(row: dict) -> str:
    return json_sha256([row["batch"], row["records"]])


class BackOff:
    """Scores batches in smaller parts once one of them has run out of memory.

    Args:
        score: a Scorer without collective operations.
        costs: tokens of each item, [num_items]; batches hold items by falling cost.
    """

    def __init__(self, score: Scorer, costs: np.ndarray):
        self.score, self.costs = score, costs
        self.budget: int | None = None

    def __call__(self, items: np.ndarray) -> list[dict]:
        """Return the records of a batch. Raises Refused if a single item does not fit."""
        if self.budget is None:
            return self._score(items)
        parts = cut_by_budget(self.costs[items], self.budget)
        return [record for part in parts for record in self._score(items[part])]

    def _score(self, items: np.ndarray) -> list[dict]:
        try:
            return self.score(items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # after the except block: inside it, the traceback would keep the tensors that did not fit
        longest = int(self.costs[items].max())
        if len(items) == 1:
            raise Refused(
                f"out of memory on a single item of {longest:,} tokens: use fewer --shots or a smaller --max-length"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.budget = longest * len(items) // 2
        print(f"out of memory: continuing with {self.budget:,} padded tokens in a batch", flush=True)
        return self(items)


def score_items(
    score: Scorer,
    batches: list[np.ndarray],
    accelerator,
    partial: PartialScores | None = None,
    on_batch: Callable[[], None] = lambda: None,
    activity: str = "evaluation",
) -> list[dict]:
    """Score every item once; all ranks take part and all get the result.

    Args:
        score: called equally often on every rank.
        batches: disjoint index arrays that cover 0…num_items-1, the same on every rank.
        on_batch: called after each batch, on each rank.
        activity: the name of the progress line, which counts batches: they hold about equally many tokens.
    Returns:
        The record of each item, in the items' order.
    """
    done = from_rank_0(accelerator, partial.read) if partial else {}  # no rank writes before all have it
    if partial:
        partial.open(accelerator.process_index)
    todo = [number for number in range(len(batches)) if number not in done]
    rank, world_size, on_cpu = accelerator.process_index, accelerator.num_processes, accelerator.device.type == "cpu"
    if on_cpu:
        give_back_memory(at_once=True)
    progress = show_progress(activity, len(batches), len(batches) - len(todo), hidden=not is_main_process())
    with torch.no_grad(), progress:  # inference_mode's tensors cannot be gathered by ZeRO-3
        for start in range(0, len(todo), world_size):
            mine = start + rank < len(todo)
            number = todo[start + rank] if mine else todo[start]  # an idle rank repeats a batch, else ZeRO-3 hangs
            records = score(batches[number])
            if mine:
                done[number] = records
                if partial:
                    partial.add(number, records)
            if on_cpu:
                give_back_memory()
            progress.update(min(world_size, len(todo) - start))
            on_batch()
    if on_cpu:
        give_back_memory(at_once=True)
    return _in_item_order(_share(done, accelerator), batches)


def _share(done: dict[int, list[dict]], accelerator) -> dict[int, list[dict]]:
    return {number: records for part in on_all_ranks(accelerator, done) for number, records in part.items()}


def _in_item_order(done: dict[int, list[dict]], batches: list[np.ndarray]) -> list[dict]:
    assert done.keys() == set(range(len(batches))), "every batch is scored"
    by_item = {
        item: record
        for number, batch in enumerate(batches)
        for item, record in zip(batch.tolist(), done[number], strict=True)
    }
    return [by_item[item] for item in range(len(by_item))]


def is_finite(value) -> bool:
    """Return whether all numbers in a record are finite."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return math.isfinite(value)
