"""Requests to stop: a signal or a file is noted, and the ranks stop together."""

import os
import signal
import time
from pathlib import Path

from zerotune.errors import Interrupted, Preempted
from zerotune.run.launch import on_all_ranks
from zerotune.run.process import is_main_process

# The variable that names a file whose appearance means "stop"; the file holds the reason. On a signal, launchers die or
# kill the ranks, so on a cluster the job script writes this file instead, on a disk that all nodes share.
STOP_FILE = "ZEROTUNE_STOP_FILE"
_NAMED = f"({STOP_FILE})"  # ends the name of a stop file without a reason
# Each look costs a request to a file server; with longer steps there is one look per step.
SECONDS_BETWEEN_LOOKS = 0.5


def hang_up() -> list[signal.Signals]:
    """Return SIGHUP, which a closing terminal sends to its processes; nothing under nohup, which shields them."""
    return [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGHUP (not under nohup) from its creation on, and on rank 0 the stop file.

    Ctrl-C ends the process at once, as usual, except while `can_save`: then the first one is noted as well.
    """

    def __init__(self):
        self.can_save = False
        self._noted = None
        self._file = Path(os.environ[STOP_FILE]) if os.environ.get(STOP_FILE) and is_main_process() else None
        self._next_look = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, *hang_up()):
            signal.signal(number, self._note)
        signal.signal(signal.SIGINT, self._note_interrupt)

    def _note(self, number, frame) -> None:
        self._noted = signal.Signals(number).name

    def _note_interrupt(self, number, frame) -> None:
        if not self.can_save or self._noted == "SIGINT":
            raise KeyboardInterrupt
        self._note(number, frame)

    @property
    def name(self) -> str | None:
        """The signal or file that asks this rank to stop, None without one."""
        if self._noted is None and self._file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            self._noted = _read_stop_file(self._file)
        return self._noted

    def stopped(self, line: str) -> Preempted:
        """Return the exception to raise once the run is saved.

        Args:
            line: `{name}` in it becomes the signal or file, `{way_out}` how to resume.
        """
        kind, name = Interrupted if self._noted == "SIGINT" else Preempted, self._noted or "a signal on another rank"
        return kind(line.format(name=name, way_out=_way_out(name)))

    def raise_when_noted(self, accelerator, during: str = "an evaluation") -> None:
        """Stop all ranks if one of them has been asked to stop; all ranks take part.

        Args:
            during: the activity that is interrupted.
        Raises:
            Preempted: a rank was asked to stop; Interrupted for Ctrl-C.
        """
        noted = [name for name in on_all_ranks(accelerator, self.name) if name]
        if noted:
            kind = Interrupted if noted[0] == "SIGINT" else Preempted
            raise kind(f"stopped by {noted[0]} during {during}: {_way_out(noted[0])}")


def _read_stop_file(path: Path) -> str | None:
    """Return the reason in a stop file, or a name for the file; None where there is none."""
    if not path.exists():
        return None
    named = f"the file {path.name} {_NAMED}"
    try:
        return path.read_text(errors="replace").strip() or named
    except OSError:  # a folder, or a file that cannot be read, still means stop
        return named


def _way_out(name: str) -> str:
    """Return how to resume; a job script deletes its own stop file, in which it gives a reason."""
    return "delete it, and the same command resumes" if name.endswith(_NAMED) else "the same command resumes there"
