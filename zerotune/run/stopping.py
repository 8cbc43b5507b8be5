"""Being asked to stop: a signal or a file is noted, and the ranks agree on when to heed it."""

import os
import signal
import time
from pathlib import Path

from zerotune.errors import Preempted
from zerotune.run.launch import on_all_ranks
from zerotune.run.process import is_main_process

# Names a file whose appearance means "stop"; it holds the reason. Launchers die of signals, or kill the ranks in their
# midst: on a cluster the job script writes this file instead, on a disk that all nodes share.
STOP_FILE = "ZEROTUNE_STOP_FILE"
# A look costs a request to a file server; a step that takes longer is looked at once.
SECONDS_BETWEEN_LOOKS = 0.5


class StopSignal:
    """Notes SIGTERM and SIGUSR1 from its creation on, and on rank 0 the stop file."""

    def __init__(self):
        self._noted = None
        self._file = Path(os.environ[STOP_FILE]) if os.environ.get(STOP_FILE) and is_main_process() else None
        self._next_look = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self._noted = signal.Signals(number).name

    @property
    def name(self) -> str | None:
        """What asks this rank to stop, None when nothing has."""
        if self._noted is None and self._file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            if self._file.exists():
                self._noted = self._file.read_text().strip() or self._file.name
        return self._noted

    def raise_when_noted(self, accelerator, during: str = "an evaluation") -> None:
        """Stop all ranks when one of them has been asked to; all ranks take part.

        Args:
            during: what is interrupted.
        Raises:
            Preempted: one was.
        """
        noted = [name for name in on_all_ranks(accelerator, self.name) if name]
        if noted:
            raise Preempted(f"stopped by {noted[0]} during {during}: the same command goes on from there")
