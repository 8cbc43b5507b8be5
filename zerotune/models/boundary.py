"""The boundary to model folders that others made: whatever the libraries raise on one becomes a line."""

import contextlib

from transformers.utils import logging as transformers_logging

from zerotune.errors import Refused
from zerotune.run.out_of_memory import is_out_of_device_memory


@contextlib.contextmanager
def reading(what: str, name: str, way_out: str):
    """Turn what a library raises on a model's files inside the block into a refusal.

    Args:
        what: what is read, such as "the config".
        name: hub id or folder.
        way_out: what the user can do.
    Raises:
        Refused: for any Exception but a refusal and an out-of-memory error of the device, with its first line.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if is_out_of_device_memory(error):  # which is not about the files; the host's may be about their sizes
            raise
        found = _first_line(error)
        described = found if isinstance(error, OSError | ValueError) and found else f"{type(error).__name__}: {found}"
        raise Refused(f"{what} of {name} cannot be used ({described}): {way_out}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error, with the second one where that says what was wrong."""
    if type(error).__name__ == "UnpicklingError":  # its advice is to load code from the file
        return "the file holds no weights"
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    found = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return found[:300]


@contextlib.contextmanager
def quiet_transformers():
    """Hide transformers' progress bars and its warnings of missing and unexpected keys, which we judge ourselves."""
    verbosity = transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
