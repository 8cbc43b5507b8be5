"""Turn the errors of libraries about model folders into one-line refusals."""

import contextlib
import io
import logging

import torch
from transformers.utils import logging as transformers_logging

from zerotune.errors import Refused
from zerotune.run.out_of_memory import is_out_of_device_memory, reports_full_device_memory


@contextlib.contextmanager
def reading(what: str, name: str, way_out: str):
    """Turn a library's errors on a model's files inside the block into refusals.

    Args:
        what: the thing that is read, such as "the config".
        name: hub id or folder.
        way_out: what the user can do.
    Raises:
        Refused: on any Exception, with its first line; refusals and a device's out-of-memory errors pass unchanged.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if is_out_of_device_memory(error):  # not the files' fault; wrong sizes in them may use up host memory
            raise
        found = _first_line(error)
        described = found if isinstance(error, OSError | ValueError) and found else f"{type(error).__name__}: {found}"
        raise Refused(f"{what} of {name} cannot be used ({described}): {way_out}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error, and the second if the first ends with a colon."""
    if type(error).__name__ == "UnpicklingError":  # its message advises to run code from the file
        return "the file holds no weights"
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    found = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return found[:300]


@contextlib.contextmanager
def device_memory_errors():
    """Raise torch.OutOfMemoryError where a GPU's memory ran out while weights were quantised or stacked.

    transformers catches that error, logs it in its loading report, and raises a RuntimeError without its text.
    """
    logger, report = logging.getLogger("transformers.modeling_utils"), io.StringIO()
    level, propagates, handler = logger.level, logger.propagate, logging.StreamHandler(report)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    except RuntimeError as error:
        if line := next(filter(reports_full_device_memory, report.getvalue().splitlines()), None):
            raise torch.OutOfMemoryError(line.strip()) from error
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


@contextlib.contextmanager
def quiet_transformers():
    """Hide transformers' progress bars and its warnings about missing and unexpected keys, which zerotune checks."""
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
