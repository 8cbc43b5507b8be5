"""Checkpoints that a thread on each rank writes while training continues, or that training waits for.

The ranks' main threads do the collective part together, between two steps or when training ends. Only then is a
checkpoint complete.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from zerotune.errors import Refused
from zerotune.training import checkpoints
from zerotune.training.snapshot import StateFile


class Carrier(Protocol):
    """Holds a rank's files until a thread has written them to the run folder: host memory, a scratch disk, or nothing.

    Attributes:
        waits: whether `begin` writes the files itself, while training waits.
    """

    waits: bool

    def begin(self, files: list[StateFile], aside: Path, num_bytes: int) -> Callable[[], dict[str, dict]]:
        """Copy the files while training waits. Returns the function that the thread has to call.

        It writes the files into `aside` and returns their manifest entries. Both calls raise Refused if a disk is full.

        Args:
            num_bytes: size of the checkpoint over all ranks.
        """

    def close(self) -> None:
        """Free the resources of `begin`."""


class BackgroundSaves:
    """Saves the checkpoints of a run, one at a time. All ranks call every method together.

    Args:
        keep: the value of --keep-checkpoints.
    """

    def __init__(self, carrier: Carrier, keep: int, accelerator):
        self.carrier, self.keep, self.accelerator = carrier, keep, accelerator
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._deleting: Future | None = None
        self._target, self._progress, self._num_bytes = Path(), {}, 0

    @property
    def on_its_way(self) -> Path | None:
        """The folder of the checkpoint being written in the background, or None."""
        return self._target if self._writing else None

    @property
    def has_arrived(self) -> bool:
        """Whether this rank has written its files of the current checkpoint to the run folder, or failed to."""
        return self._writing is not None and self._writing.done()

    def start(self, target: Path, progress: dict, files: list[StateFile], num_bytes: int) -> None:
        """Finish the previous checkpoint, copy this one's files, and write them: aside, or now if training waits.

        Args:
            files: this rank's files.
            target, progress, num_bytes: as for `checkpoints.publish`.
        Raises:
            Refused: the previous checkpoint failed, or the disk has no room. `finish` reports later failures.
        """
        self.finish()
        aside = checkpoints.prepare(target, num_bytes, self.accelerator, self._check_deletion)
        self._target, self._progress, self._num_bytes = target, progress, num_bytes
        try:
            write = self.carrier.begin(files, aside, num_bytes)
        except Refused as refusal:
            self._writing = Future()
            self._writing.set_exception(refusal)
        else:
            self._writing = self._thread.submit(write)
        if self.carrier.waits:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written, publish it, and start deleting superseded ones.

        Raises:
            Refused: a disk is full. Earlier checkpoints are unchanged.
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
            # deleting large files can be slow; the thread does it before it writes the next checkpoint
            superseded = checkpoints.superseded(self._target, self.keep)
            self._deleting = self._thread.submit(checkpoints.delete, superseded)

    def close(self) -> None:
        """Call `finish` and free the copies' resources. No checkpoint can be saved afterwards."""
        self.finish()
        self._check_deletion()
        self._thread.shutdown()
        self.carrier.close()

    def _check_deletion(self) -> None:
        """Wait for the pending deletion."""
        if self._deleting is not None:
            deleting, self._deleting = self._deleting, None
            deleting.result()
