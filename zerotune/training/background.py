"""Checkpoints that a thread of each rank writes while training continues.

What the ranks have to agree on is done by their main threads together, at a step's boundary or when training ends: only
then does a checkpoint count.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from zerotune.errors import Refused
from zerotune.training import checkpoints
from zerotune.training.snapshot import StateFile


class Carrier(Protocol):
    """Where a rank's files are until a thread has written them into the run folder: host memory, or a scratch disk."""

    def begin(self, files: list[StateFile], aside: Path, num_bytes: int) -> Callable[[], dict[str, dict]]:
        """Copy the files while training waits. Returns what the thread has to do.

        That writes them into `aside` and returns their manifest entries. Both raise Refused: a disk is full.

        Args:
            num_bytes: of the checkpoint on all ranks.
        """

    def close(self) -> None:
        """Free what `begin` needs."""


class BackgroundSaves:
    """The checkpoints of a run, one on its way at a time. All ranks call every method together.

    Args:
        keep: --keep-checkpoints.
    """

    def __init__(self, carrier: Carrier, keep: int, accelerator):
        self.carrier, self.keep, self.accelerator = carrier, keep, accelerator
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._deleting: Future | None = None
        self._target, self._progress, self._num_bytes = Path(), {}, 0

    @property
    def target(self) -> Path | None:
        """The folder of the checkpoint that is on its way, None without one."""
        return self._target if self._writing else None

    @property
    def has_arrived(self) -> bool:
        """Whether this rank's files of the checkpoint on its way are in the run folder, or cannot be written there."""
        return self._writing is not None and self._writing.done()

    def start(self, target: Path, progress: dict, files: list[StateFile], num_bytes: int) -> None:
        """Copy a checkpoint's files and set them on their way, once the one before counts.

        Args:
            files: this rank's.
            target, progress, num_bytes: as for `checkpoints.save`.
        Raises:
            Refused: the disk has no room. `finish` reports one that fills up.
        """
        self.finish()
        aside = checkpoints.prepare(target, num_bytes, self.accelerator)
        self._target, self._progress, self._num_bytes = target, progress, num_bytes
        try:
            write = self.carrier.begin(files, aside, num_bytes)
        except Refused as refusal:
            self._writing = Future()
            self._writing.set_exception(refusal)
        else:
            self._writing = self._thread.submit(write)

    def finish(self) -> None:
        """Wait for the checkpoint on its way, make it count, and delete what is no longer kept.

        Raises:
            Refused: a disk is full. Earlier checkpoints are as they were.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        self._check_deletion()
        entries, problem = {}, None
        try:
            entries = writing.result()
        except Refused as refusal:
            problem = str(refusal)
        checkpoints.publish(self._target, self._progress, entries, problem, self._num_bytes, self.accelerator)
        if self.accelerator.is_main_process:
            checkpoints.delete_leftovers(self._target.parent)
            # a file system takes its time over large files; the thread does this before it writes the next ones
            superseded = checkpoints.superseded(self._target, self.keep)
            self._deleting = self._thread.submit(checkpoints.delete, superseded)

    def close(self) -> None:
        """Call `finish`, and free what the copies needed; no further ones are saved."""
        self.finish()
        self._check_deletion()
        self._thread.shutdown()
        self.carrier.close()

    def _check_deletion(self) -> None:
        """Wait for the deletion of what is no longer kept. Raises what it raised."""
        if self._deleting is not None:
            deleting, self._deleting = self._deleting, None
            deleting.result()
