"""Standard output and error that cannot end a run: full, closed, or of another encoding."""

import os
import sys


class TolerantStream:
    """A text stream whose first failed write turns it silent: its disk is full or its pipe is closed.

    Everything else is the stream's own.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it where nobody can receive it. Returns its length."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; text that nobody can receive is dropped."""
        self._try(self._stream.flush)

    def _try(self, action, *values) -> None:
        try:
            action(*values)
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._fall_silent()

    def _fall_silent(self) -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(silent, self._stream.fileno())  # text still in the buffer goes there too
        except (OSError, ValueError):
            self._stream = _silent_stream()
        finally:
            os.close(silent)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _silent_stream():
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def make_output_tolerant() -> None:
    """Let standard output and error escape characters they cannot encode, and fall silent where a write fails."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TolerantStream):
            continue
        if stream is None:  # closed before the process began
            stream = _silent_stream()
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, TolerantStream(stream))
