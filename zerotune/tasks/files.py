"""Read rows of local csv, tsv, jsonl and parquet files.

Every reader returns a `Source`: plain rows in the order of the file, where each one came from, and a content hash. A
refusal names the file and, where there is one, the line.
"""

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from zerotune.errors import Refused
from zerotune.run.process import say_how_far

FILE_KINDS = ("csv", "tsv", "jsonl", "parquet")
# Most bytes of text in a file, unpacked, and in a line: a small .gz may hold more than any memory.
MOST_BYTES, MOST_LINE_BYTES = 2**31, 2**26
_BYTES_A_READ = 2**20


class Table(Sequence):
    """Rows that all have the same columns, each a dict when it is read: kept by column, they take a third of the
    memory of a list of dicts."""

    def __init__(self, columns: dict[str, list]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, row: int) -> dict:
        return {name: values[row] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict]:
        names = list(self.columns)
        return (dict(zip(names, values, strict=True)) for values in zip(*self.columns.values(), strict=True))

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class Source:
    """The rows of one file, hub split or sample.

    Attributes:
        lines: the line, from 1, at which each row starts; None where there are no lines.
        record: what split.json keeps: path, dataset or sample; revision; sha256; rows.
        class_names: by column, the names of a hub data set's classes in their own order.
    """

    name: str
    rows: Sequence[dict]
    lines: Sequence[int] | None
    record: dict
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def where(self, row: int) -> str:
        """Return the place of a row for messages."""
        return f"{self.name} line {self.lines[row]}" if self.lines is not None else f"{self.name} row {row}"

    @cached_property
    def columns(self) -> list[str]:
        """Return the columns in order of first appearance; jsonl rows may differ in theirs."""
        if isinstance(self.rows, Table):
            return list(self.rows.columns)
        return list(dict.fromkeys(chain.from_iterable(self.rows)))


def file_kind(path: Path) -> str:
    """Return one of FILE_KINDS by the name alone. Raises Refused for any other extension."""
    parts = path.name.lower().split(".")
    compressed = len(parts) > 1 and parts[-1] == "gz"
    kind = parts[-2] if compressed and len(parts) > 2 else parts[-1] if len(parts) > 1 else ""
    if kind not in FILE_KINDS or (compressed and kind == "parquet"):
        raise Refused(f"{path}: unknown file extension; wanted .csv, .tsv, .jsonl (each also .gz) or .parquet")
    return kind


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises Refused where it is missing, a folder, unreadable or empty."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise Refused(f"{path} is a folder; give a file") from None
    except FileNotFoundError:
        raise Refused(f"{path}: no such file; check the path, or name the items by --test-file") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None
    if not data:
        raise Refused(f"{path} is empty (0 bytes); copy or write the file again")
    return data


def require_file_sha256(path: Path, wanted: str) -> None:
    """Raise Refused where the file is missing or has another sha256."""
    found = hashlib.sha256(read_bytes(path)).hexdigest()
    if found != wanted:
        raise Refused(
            f"{path} has changed since the run was split (sha256 {found[:12]}, wanted {wanted[:12]}); restore it, or "
            "name the items by --test-file"
        )


def rows_sha256(rows: Sequence[dict]) -> str:
    """Return a hash of rows that have no file: sha256 over one json line per row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def read_file(path: Path) -> Source:
    """Read a csv (quoted fields may hold newlines), tsv (GLUE's form: no quoting), jsonl or parquet file.

    Raises Refused, naming the file and the line, for one that cannot be read."""
    with needs_memory(path):
        return _read_file(path)


def _read_file(path: Path) -> Source:
    kind = file_kind(path)
    data = read_bytes(path)
    record = {"path": str(path.absolute()), "sha256": hashlib.sha256(data).hexdigest()}
    if kind == "parquet":
        rows, lines = _parse_parquet(data, path), None
    else:
        parse = {"csv": _parse_csv, "tsv": _parse_tsv, "jsonl": _parse_jsonl}[kind]
        data = _text_bytes(data, path, MOST_LINE_BYTES).rstrip(b"\r\n")
        if not sum(len(block.strip()) for block in _blocks(data, path)):  # also finds what is not UTF-8 in any line
            raise Refused(f"{path} is empty (blank lines only); give a file with a header and rows")
        rows, lines = parse(data, path)
    if not rows:
        raise Refused(f"{path} holds no rows; give a file with at least one row below the header")
    return Source(str(path), rows, lines, {**record, "rows": len(rows)})


@contextmanager
def needs_memory(path: Path) -> Iterator[None]:
    """Refuse a file for which the memory is too small."""
    try:
        yield
    except MemoryError:
        raise Refused(f"{path}: there is not enough memory to read it; give a smaller file") from None


def decode_text(data: bytes, path: Path, most_line_bytes: int = MOST_BYTES) -> str:
    """Decode a file's UTF-8 text, unpacked where its name ends in .gz.

    Raises:
        Refused: the bytes are no text, or there are too many of them, in all or in a line.
    """
    data = _text_bytes(data, path, most_line_bytes)
    return _decode(data, 0, len(data), path)


def _text_bytes(data: bytes, path: Path, most_line_bytes: int) -> bytes | bytearray:
    """Return the bytes of a file's text, unpacked. Raises Refused as `decode_text`, but not for other than UTF-8."""
    if path.name.lower().endswith(".gz"):
        data = _unpack(data, path)
        if not data:
            raise Refused(f"{path} is empty after decompression; copy or write the file again")
    elif data.startswith(b"\x1f\x8b"):
        raise Refused(f"{path} holds gzip data; name it {path.name}.gz or decompress it")
    _check_size(data, path, most_line_bytes)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refused(f"{path} is UTF-16; wanted UTF-8 (iconv -f UTF-16 -t UTF-8 converts it)")
    nul = data.find(b"\0")
    if nul >= 0:
        raise Refused(f"{path} line {_line_at(data, nul)}: NUL byte at offset {nul}; wanted plain UTF-8 text")
    return data


def _blocks(data: bytes | bytearray, path: Path) -> Iterator[str]:
    """Yield the text of whole lines, about _BYTES_A_READ bytes at a time: one sign beyond Latin-1 makes a string take
    two or four times its bytes."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + _BYTES_A_READ) + 1 or len(data)
        yield _decode(data, start, end, path)
        start = end


def _decode(data: bytes | bytearray, start: int, end: int, path: Path) -> str:
    """Decode data[start:end], less a byte order mark where all of `data` begins."""
    try:
        text = data[start:end].decode()
    except UnicodeDecodeError as error:
        place = start + error.start
        line = _line_at(data, place)
        raise Refused(
            f"{path} line {line}: byte 0x{data[place]:02x} at offset {place} is not UTF-8; convert the file"
        ) from None
    return text if start else text.removeprefix("\ufeff")


def _unpack(data: bytes, path: Path) -> bytearray:
    """Unpack gzip piece by piece, and no further than MOST_BYTES."""
    unpacked = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while len(unpacked) <= MOST_BYTES and (piece := stream.read(_BYTES_A_READ)):
                unpacked += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{path}: broken gzip ({error}); copy or compress the file again") from None
    return unpacked


def _check_size(data: bytes | bytearray, path: Path, most_line_bytes: int) -> None:
    if len(data) > MOST_BYTES:
        raise Refused(f"{path} holds more than {MOST_BYTES / 2**30:.0f} GiB of text; give a part of it")
    start = 0
    while len(data) - start > most_line_bytes:
        end = data.rfind(b"\n", start, start + most_line_bytes + 1)
        if end < 0:
            where, most = f"{path} line {_line_at(data, start)}", f"{most_line_bytes / 2**20:.0f} MiB"
            raise Refused(f"{where}: longer than {most}, which no text is; correct the line")
        start = end + 1


def _line_at(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _header(fields: list[str], path: Path) -> list[str]:
    names = [field.strip() for field in fields]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise Refused(f"{path} line 1: column {_shown(repeated)} appears twice; give each column its own name")
    return names


def _check_width(header: list[str], fields: list[str], path: Path, line: int) -> None:
    if len(fields) != len(header):
        raise Refused(
            f"{path} line {line}: {len(fields)} fields, but the header has {len(header)} ({_shown(header)}); "
            "correct the line"
        )


def _lines(data: bytes, path: Path) -> Iterator[str]:
    """Yield the lines, and say how far they are where that takes long."""
    # not str.splitlines: that also splits at U+2028, U+0085 and form feeds inside a sentence
    lines = (block.removesuffix("\n").split("\n") for block in _blocks(data, path))
    return say_how_far(chain.from_iterable(lines), f"reading {path.name}", "lines")


def _parse_tsv(data: bytes, path: Path) -> tuple[Table, range]:
    lines = _lines(data, path)
    header = _header(next(lines).removesuffix("\r").split("\t"), path)
    columns = [[] for _ in header]
    for number, line in enumerate(lines, start=2):
        fields = line.removesuffix("\r").split("\t")
        _check_width(header, fields, path, number)
        for column, value in zip(columns, fields, strict=True):
            column.append(value)
    return Table(dict(zip(header, columns, strict=True))), range(2, 2 + len(columns[0]))


def _parse_csv(data: bytes, path: Path) -> tuple[Table, array]:
    # the limit is global to the process and only ever raised: the default refuses fields over 131,072 characters
    csv.field_size_limit(max(csv.field_size_limit(), len(data)))
    lines = chain.from_iterable(io.StringIO(block, newline="") for block in _blocks(data, path))
    reader = csv.reader(lines, strict=True)
    header, start = [], 1
    try:
        header = _header(next(reader), path)
        columns, starts, start = [[] for _ in header], array("q"), reader.line_num + 1
        for fields in say_how_far(reader, f"reading {path.name}", "rows"):
            _check_width(header, fields, path, start)
            for column, value in zip(columns, fields, strict=True):
                column.append(value)
            starts.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f"{path}: the row that starts on line {start} is not csv ({error}); correct its quotes") from None
    return Table(dict(zip(header, columns, strict=True))), starts


def _parse_jsonl(data: bytes, path: Path) -> tuple[list[dict], range]:
    rows = []
    for number, line in enumerate(_lines(data, path), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            raise Refused(f"{path} line {number}: not JSON ({error}); wanted one object per line") from None
        if not isinstance(row, dict):
            raise Refused(f"{path} line {number}: {type(row).__name__}, wanted one JSON object per line")
        rows.append({sys.intern(name): value for name, value in row.items()})
    return rows, range(1, 1 + len(rows))


def _parse_parquet(data: bytes, path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        return Table(pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pydict())
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also dates that Python cannot hold
        raise Refused(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shown(names: list[str]) -> str:
    """Return column names for a message, shortened: those of a file without a header are whole sentences."""
    return ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:8])


def find_column(source: Source, accepted: tuple[str, ...], wanted: str) -> str:
    """Return the first of the `accepted` columns that the source has. Raises Refused, saying what is `wanted`, where it
    has none."""
    columns = source.columns
    for name in accepted:
        if name in columns:
            return name
    raise Refused(f"{source.name}: wrong columns: found {_shown(columns)}; wanted {wanted}")


def clean_text(value, where: str) -> str:
    """Return a text without surrounding white space. Raises Refused unless it is a non-empty, valid Unicode string."""
    if not isinstance(value, str):
        raise Refused(f"{where}: the text is {type(value).__name__}, wanted a string")
    text = value.strip()
    if not text:
        raise Refused(f"{where}: empty text; remove the row or fill it in")
    if "\0" in text:
        raise Refused(f"{where}: the text holds a NUL character; wanted plain text")
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raise Refused for a string that cannot be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(
            f"{where}: the text holds half of a surrogate pair, which is not Unicode; correct the row"
        ) from None
