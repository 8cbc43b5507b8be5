"""Keep standard output and error (full disk, closed pipe, encoding) from ending a run, and show progress on them."""

import contextlib
import logging
import os
import sys
import threading
import time
import warnings

# Seconds until an activity's first line in a log, and between its later lines.
FIRST_LINE, NEXT_LINES = 5, 30
# Log messages that mean nothing here, by logger and first words: DeepSpeed, which transformers imports, sees no GPU;
# bitsandbytes uses its own kernel on a CPU.
REMARKS = {
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


class TolerantStream:
    """A text stream that turns silent at its first failed write: its disk is full or its pipe is closed.

    All other attributes are the wrapped stream's.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it if nobody can receive it. Returns its length."""
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
    """Make standard output and error escape characters they cannot encode, and fall silent when a write fails."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TolerantStream):
            continue
        if stream is None:  # closed before the process began
            stream = _silent_stream()
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, TolerantStream(stream))


def show_progress(activity: str, total: int, done: int = 0, unit: str = "", hidden: bool = False):
    """Return a context manager whose `update(number=1)` counts finished parts and shows progress on standard error.

    A terminal gets a live line. A job's log gets a line after FIRST_LINE seconds and then every NEXT_LINES seconds,
    with an estimate of the time left.

    Args:
        total, done: number of parts, of about equal cost, and how many of them an earlier start finished.
        unit: a part's name ("step"): shows the number of parts too, and keeps the line on a terminal.
        hidden: show nothing.
    """
    if hidden or not sys.stderr.isatty():
        return LoggedProgress(activity, total, done, unit, hidden)
    from tqdm import tqdm

    bar_format = None if unit else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    shown = {"bar_format": bar_format, "leave": bool(unit), "delay": 0 if unit else 1}
    return tqdm(desc=activity, total=total, initial=done, unit=unit or "it", mininterval=0.1, **shown)


class LoggedProgress:
    """Progress as lines of a log; see `show_progress`."""

    def __init__(self, activity: str, total: int, done: int = 0, unit: str = "", hidden: bool = False):
        self.activity, self.total, self.done, self.unit, self.hidden = activity, total, done, unit, hidden
        self._before, self._started = done, time.monotonic()
        self._next = self._started + FIRST_LINE

    def __enter__(self) -> "LoggedProgress":
        return self

    def __exit__(self, *error) -> None:
        """Print nothing: later output shows that the activity is over."""

    def update(self, number: int = 1) -> None:
        """Count finished parts, and print a line if one is due."""
        self.done += number
        now = time.monotonic()
        if self.hidden or now < self._next or self.done >= self.total:
            return
        self._next = now + NEXT_LINES
        left = (self.total - self.done) * (now - self._started) / (self.done - self._before)
        numbers = f"{self.unit} {self.done:,} of {self.total:,}, " if self.unit else ""
        line = f"{self.activity}: {numbers}{self.done / self.total:.0%}, about {duration(left)} left"
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def say_when_slow(activity: str):
    """Print "ACTIVITY: 5 s so far" on rank 0's standard error after FIRST_LINE seconds, then every NEXT_LINES.

    For work that cannot report its progress: loading weights, hashing a model.
    """
    done = threading.Event()

    def speak() -> None:
        seconds = FIRST_LINE
        while not done.wait(seconds if seconds == FIRST_LINE else NEXT_LINES):
            print(f"{activity}: {seconds} s so far", file=sys.stderr, flush=True)
            seconds += NEXT_LINES

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def hide_remarks() -> None:
    """Hide REMARKS, and that libraries use deprecated names of one another. Call before the libraries are imported."""
    for name, beginning in REMARKS.items():
        logging.getLogger(name).addFilter(lambda record, beginning=beginning: not str(record.msg).startswith(beginning))
    warnings.filterwarnings("ignore", r"`[\w.]+` is deprecated", FutureWarning)
