"""Files of flags: a flag and its values on each line, `#` before a comment, and the script that the flags belong to.

# RoBERTa-large on SST-2 (Liu et al. 2019)
train/sst2.py
--model FacebookAI/roberta-large
--learning-rate 1e-5
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import Refused, nearest
from zerotune.settings.flag_parser import FlagParser

MOST_BYTES = 2**20


@dataclass(frozen=True)
class FlagLine:
    """A flag of a file with its values, as text. `where` names file and line for messages."""

    where: str
    flag: str
    values: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The line as words of a command line."""
        return [self.flag, *self.values]


def read_flag_file(path: Path, parser: FlagParser, script: str) -> list[FlagLine]:
    """Return the flags of a file, in order; their values are not checked yet.

    Args:
        parser: knows the flags.
        script: "train/sst2.py"; a file may name its script on a line of its own.
    Raises:
        Refused: the file is not text, a line is not a flag of this script, or a flag appears twice.
    """
    found: dict[str, FlagLine] = {}
    for where, words in read_words(path):
        first, *values = words
        if not first.startswith("-"):
            _check_script(where, words, script)
            continue
        _check_flag(where, first, values, parser, script)
        if first in found:
            raise Refused(f"{where}: {first} is on {found[first].where} already; remove one")
        found[first] = FlagLine(where, first, tuple(values))
    return list(found.values())


def read_words(path: Path, name: str | None = None) -> list[tuple[str, list[str]]]:
    """Return (file and line number, words) of each line that is not empty or a comment.

    Args:
        name: of the file in messages; by default its path.
    Raises:
        Refused: the file cannot be read, is not UTF-8 text, or has a quote that is not closed.
    """
    lines = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        where = f"{name or path} line {number}"
        if "\0" in line:
            raise Refused(f"{where} holds a NUL character: wanted lines of text")
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise Refused(f"{where}: {str(error).lower()}: {line.strip()!r}; correct its quotes") from None
        if words:
            lines.append((where, words))
    return lines


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise Refused(f"{path} is a folder: name a file")
        if not path.exists():
            raise Refused(f"no such file: {path}")
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise Refused(f"{path} is not a short file: wanted lines of text, at most {MOST_BYTES:,} bytes")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise Refused(f"{path} line {number} is not UTF-8 text ({error.reason}): save the file as UTF-8") from None


def _check_script(where: str, words: list[str], script: str) -> None:
    if words == [script]:
        return
    if len(words) == 1 and words[0].startswith("train/") and words[0].endswith(".py"):
        raise Refused(f"{where}: these are flags of {words[0]}, and this is {script}: start {words[0]} with them")
    raise Refused(f"{where}: {' '.join(words)!r} is not a flag; wanted a flag and its values, such as --epochs 3")


def _check_flag(where: str, flag: str, values: list[str], parser: FlagParser, script: str) -> None:
    if "=" in flag:
        raise Refused(f"{where}: {flag!r}; write a space between the flag and its value")
    known = parser.flag_names()
    if flag not in known:
        meant = nearest(flag, known)
        raise Refused(f"{where}: {script} has no flag {flag}" + (f": did you mean {meant}?" if meant else ""))
    further = next((value for value in values if value.startswith("--")), None)
    if further:
        raise Refused(f"{where}: {flag} and {further}; wanted one flag a line")


def flag_name(flag: str) -> str:
    """Return a flag as argparse names its value: learning_rate for --learning-rate."""
    return flag.removeprefix("--").replace("-", "_")
