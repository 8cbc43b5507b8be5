"""Define how a run ends early: the exceptions, and the exit codes of every script."""

import difflib
import re
from collections.abc import Iterable

EXIT_BUG = 1  # Python's own status after a traceback
EXIT_REFUSED = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell reports it

MOST_LISTED = 8  # names in a message


class Refused(ValueError):
    """Bad input, or a run that cannot continue as asked: one line names the rule, the value found and the way out."""

    status = EXIT_REFUSED


class Unavailable(Refused):
    """The data are not on this machine, but could be: a plan continues without them."""


class BrokenMachine(Refused):
    """The machine is at fault, not the command: each rank says so in one line, and another start may succeed."""

    status = EXIT_BUG


class Preempted(Exception):
    """The run was asked to stop, has saved itself, and resumes when the same command is started again."""


class Interrupted(Preempted):
    """Preempted by Ctrl-C."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[str]) -> str:
    """Return names for a message: quoted, shortened, and no more than `MOST_LISTED` of them."""
    quoted = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names]
    more = f" and {len(quoted) - MOST_LISTED:,} more" if len(quoted) > MOST_LISTED else ""
    return ", ".join(quoted[:MOST_LISTED]) + more


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 run", "1,200 runs"; `plural` is the noun and an s by default."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def quoted(name: str) -> str:
    """Return a name for a list in a sentence: quoted if a comma, semicolon, quote or outer space hides its ends."""
    return f'"{name}"' if re.search(r'[,;"]', name) or name != name.strip() else name


def nearest(found: str, known: Iterable[str]) -> str | None:
    """Return the known name that a wrong one probably means; None if no name is similar.

    Case and the separators between words are ignored. The wrong name may also begin the known one ("--limit"), contain
    it ("num_train_epochs") or be its initials ("--lr").
    """
    by_key = {_key(name): name for name in sorted(known, key=len, reverse=True)}  # of equal keys, the shortest name
    key = _key(found)
    alike = difflib.get_close_matches(key, by_key, n=1, cutoff=0.7)
    if alike or len(key) < 2:
        return by_key[alike[0]] if alike else None
    begun = [name for other, name in by_key.items() if len(key) > 2 and other.startswith(key)]
    longer = [name for other, name in by_key.items() if len(other) > 3 and other in key]
    initials = [name for name in by_key.values() if "".join(re.findall(r"(?<![a-z])[a-z]", name.lower())) == key]
    return next(iter([*reversed(begun), *longer, *initials]), None)


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'text'?)" for a message; "" if no name is similar."""
    meant = nearest(found, known)
    return f" (did you mean {meant!r}?)" if meant else ""


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
