"""Read rows one by one, from files larger than memory and from standard input.

The checks and their messages are those of zerotune/tasks/files.py, which reads whole files.
"""

import gzip
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zerotune.errors import Refused
from zerotune.tasks.files import (
    FILE_KINDS,
    MOST_LINE_BYTES,
    csv_fields,
    decode_part,
    file_kind,
    jsonl_rows,
    long_line,
    reading_file,
    reading_parquet,
    refuse_gzip,
    refuse_repeated,
    tsv_fields,
)

STREAM_KINDS = ("txt", *FILE_KINDS)
STANDARD_INPUT = "-"
TEXT_COLUMN = "text"  # of a txt file, which has a text on each line
# Rows of a jsonl file that are read to learn its columns, and rows of a parquet file that are read at once.
NUM_FIRST_ROWS, PARQUET_ROWS = 100, 1024


class Row(NamedTuple):
    """A row's values by column, and its place for messages."""

    fields: dict
    where: str


class RowDigest:
    """A running sha256 of rows."""

    def __init__(self):
        self._sha256 = hashlib.sha256()

    def add(self, rows: Iterable[dict]) -> None:
        """Add rows."""
        for row in rows:
            self._sha256.update(json.dumps(row, default=str).encode() + b"\n")

    def hexdigest(self) -> str:
        """Return the sha256 of all rows so far."""
        return self._sha256.hexdigest()


@dataclass
class RowStream:
    """The rows of a file, each of which is read once and not kept.

    Attributes:
        name: for messages.
        columns: those of every row; for a jsonl file, whose rows may differ, those of its first rows.
        rows: in the order of the file.
        position: returns how much of the file has been read, 0 to 1; None if its size is unknown.
        schema: a parquet file's own types (a pyarrow.Schema); None for other files.
    """

    name: str
    kind: str
    columns: list[str]
    rows: Iterator[Row]
    position: Callable[[], float | None]
    schema: object | None = None


def stream_kind(file: str, kind: str | None) -> str:
    """Return one of STREAM_KINDS: the given one, else that of the file's name, or "txt" for standard input.

    Raises:
        Refused: the name has no known extension, or the given kind is parquet and the name or source is not.
    """
    if file == STANDARD_INPUT:
        if kind == "parquet":
            raise Refused("--format parquet cannot be read from standard input: give the file's name")
        return kind or "txt"
    if kind in (None, "parquet"):
        is_text = file.lower().removesuffix(".gz").endswith(".txt")
        found = "txt" if is_text else _named_kind(file)
        if kind and found != kind:
            raise Refused(f"--format {kind}: {file} is named otherwise; leave --format out, or rename the file")
        return found
    return kind


def _named_kind(file: str) -> str:
    try:
        return file_kind(Path(file))
    except Refused:
        wanted = ".txt, .csv, .tsv, .jsonl (each also .gz) or .parquet"
        raise Refused(f"{file}: unknown file extension; wanted {wanted}, or name its format with --format") from None


def open_rows(file: str, kind: str | None = None) -> RowStream:
    """Open a file, or standard input for "-", and read enough to know its columns.

    Args:
        kind: one of STREAM_KINDS; None: that of the name, or "txt" for standard input.
    Raises:
        Refused: the file cannot be read, or holds no rows. Later bad rows are refused when they are read.
    """
    kind = stream_kind(file, kind)
    if kind == "parquet":
        return _open_parquet(Path(file))
    name = "standard input" if file == STANDARD_INPUT else file
    binary, position = _open_binary(file)
    path = name if file == STANDARD_INPUT else Path(file)
    lines = _text_lines(binary, path)
    first = next(lines, None)
    if first is None:
        raise Refused(f"{name} is empty (0 bytes); give a file with rows")
    lines = chain([first], lines)
    if kind == "txt":
        numbered = ((number, {TEXT_COLUMN: _without_end(line)}) for number, line in enumerate(lines, start=1))
        return RowStream(name, kind, [TEXT_COLUMN], _placed(numbered, name), position)
    lines = _without_last_blanks(lines)
    first = next(lines, None)
    if first is None:
        raise Refused(f"{name} is empty (blank lines only); give a file with a header and rows")
    lines = chain([first], lines)
    if kind == "csv":  # whose rows may end in a lone carriage return, as in files.py
        lines = chain.from_iterable(io.StringIO(line, newline="") for line in lines)
    if kind == "jsonl":
        numbered = jsonl_rows(lines, name)
        columns = None
    else:
        columns, rows = csv_fields(lines, name, MOST_LINE_BYTES) if kind == "csv" else tsv_fields(lines, name)
        numbered = ((line, dict(zip(columns, fields, strict=True))) for line, fields in rows)
    first_rows = list(islice(numbered, NUM_FIRST_ROWS))
    if not first_rows:
        raise Refused(f"{name} holds no rows; give a file with at least one row below the header")
    columns = columns or list(dict.fromkeys(chain.from_iterable(fields for _, fields in first_rows)))
    return RowStream(name, kind, columns, _placed(chain(first_rows, numbered), name), position)


def _placed(numbered: Iterator[tuple[int, dict]], name: str) -> Iterator[Row]:
    return (Row(fields, f"{name} line {line}") for line, fields in numbered)


def _open_binary(file: str) -> tuple[BinaryIO, Callable[[], float | None]]:
    """Return the bytes of a file, unpacked if its name ends in .gz, and the `position` of a RowStream."""
    if file == STANDARD_INPUT:
        if sys.stdin is None:
            raise Refused("standard input is closed: name a file, or pipe rows in")
        return sys.stdin.buffer, lambda: None
    path = Path(file)
    with reading_file(path):
        raw = path.open("rb")
        size = os.fstat(raw.fileno()).st_size
    binary = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
    return binary, lambda: min(raw.tell() / size, 1.0) if size and not raw.closed else None


def _text_lines(binary: BinaryIO, path: Path | str) -> Iterator[str]:
    """Yield the lines of UTF-8 text with their line ends. Refuses a line that is not text."""
    unpacks = isinstance(binary, gzip.GzipFile)
    number = offset = 0
    while True:
        with reading_file(path):
            line = binary.readline(MOST_LINE_BYTES + 1)
        number += 1
        if not line:
            return
        if number == 1 and not unpacks:
            refuse_gzip(line, path)
        if len(line) > MOST_LINE_BYTES:
            raise long_line(path, number, MOST_LINE_BYTES)
        yield decode_part(line, path, number, offset)
        offset += len(line)


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _without_last_blanks(lines: Iterator[str]) -> Iterator[str]:
    """Drop blank lines at the end."""
    held = []
    for line in lines:
        if line.strip("\r\n"):
            yield from held
            held.clear()
            yield line
        else:
            held.append(line)


def _open_parquet(path: Path) -> RowStream:
    import pyarrow.parquet

    with reading_file(path):
        path.open("rb").close()
    with reading_parquet(path):
        file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    refuse_repeated(names, str(path))
    num_rows = file.metadata.num_rows
    if not num_rows:
        raise Refused(f"{path} holds no rows; give a file with at least one row")
    num_read = 0

    def rows() -> Iterator[Row]:
        nonlocal num_read
        batches = file.iter_batches(batch_size=PARQUET_ROWS)
        while True:
            with reading_parquet(path):
                batch = next(batches, None)
                found = None if batch is None else batch.to_pylist()
            if found is None:
                return
            for fields in found:
                num_read += 1
                yield Row(fields, f"{path} row {num_read}")

    return RowStream(str(path), "parquet", names, rows(), lambda: num_read / num_rows, file.schema_arrow)
