"""How a run ends early: the one exception for users, and the exit codes of every script."""

from collections.abc import Iterable

EXIT_BUG = 1  # as Python ends after a traceback
EXIT_REFUSED = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell reports it

MOST_LISTED = 8  # names in a message


class Refused(ValueError):
    """Bad input, or a run that cannot continue as asked: one line names the rule, the value found and the way out."""


class NotJoined(Refused):
    """The processes of a run did not find each other: each rank reports it, since none can speak for the others."""


class Preempted(Exception):
    """The run was asked to stop, has saved itself, and resumes when the same command is started again."""


class Interrupted(Preempted):
    """Preempted by Ctrl-C."""


def listed(names: Iterable[str], most: int = MOST_LISTED) -> str:
    """Return names for a message: quoted, shortened, and no more than `most` of them."""
    quoted = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names]
    more = f" and {len(quoted) - most:,} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more
