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

from zerotune.errors import Refused, did_you_mean, first_line
from zerotune.files import nearest_entry
from zerotune.run.process import say_how_far
from zerotune.terminal import say_when_slow

FILE_KINDS = ("csv", "tsv", "jsonl", "parquet")
CORRECT_ROW = "correct the row"
OTHER_COLUMN = f"{CORRECT_ROW}, or name another --text-column"
# Most bytes of text in a file, unpacked, and in a line: a small .gz may unpack to more than fits in memory.
MOST_BYTES, MOST_LINE_BYTES = 2**31, 2**26
_BYTES_A_READ = 2**20


class Table(Sequence):
    """Rows that all have the same columns, each read as a dict.

    Stored by column, they take a third of the memory of a list of dicts."""

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
        lines: the line, from 1, at which each row starts; None if the source has no lines.
        record: the source's entry in split.json: path, dataset or sample; revision; sha256; rows.
        class_names: by column, the names of a hub data set's classes in their own order.
    """

    name: str
    rows: Sequence[dict]
    lines: Sequence[int] | None
    record: dict
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def where(self, row: int) -> str:
        """Return the place of a row for messages: its line, or its number from 1."""
        return f"{self.name} line {self.lines[row]}" if self.lines is not None else f"{self.name} row {row + 1}"

    @cached_property
    def columns(self) -> list[str]:
        """Return the columns in order of first appearance; jsonl rows may have different ones."""
        if isinstance(self.rows, Table):
            return list(self.rows.columns)
        return list(dict.fromkeys(chain.from_iterable(self.rows)))


def file_kind(path: Path) -> str:
    """Return one of FILE_KINDS, going only by the name. Raises Refused for any other extension."""
    parts = path.name.lower().split(".")
    compressed = len(parts) > 1 and parts[-1] == "gz"
    kind = parts[-2] if compressed and len(parts) > 2 else parts[-1] if len(parts) > 1 else ""
    if kind not in FILE_KINDS or (compressed and kind == "parquet"):
        raise Refused(f"{path}: unknown file extension; wanted .csv, .tsv, .jsonl (each also .gz) or .parquet")
    return kind


def read_bytes(path: Path, other_way_out: str = "") -> bytes:
    """Return the content of a file. Raises Refused if it is empty, and as `reading_file`."""
    with reading_file(path, other_way_out):
        data = path.read_bytes()
    if not data:
        raise Refused(f"{path} is empty (0 bytes); copy or write the file again")
    return data


@contextmanager
def reading_file(path: Path, other_way_out: str = "") -> Iterator[None]:
    """Refuse a file that is missing, a folder, unreadable or broken gzip.

    Args:
        other_way_out: advice for a missing file besides checking the path.
    """
    try:
        yield
    except IsADirectoryError:
        raise Refused(f"{path} is a folder; give a file") from None
    except FileNotFoundError:
        meant = nearest_entry(path, Path.is_file)
        raise Refused(f"{path}: no such file{meant}; check the path{other_way_out}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{path}: broken gzip ({error}); copy or compress the file again") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None


def require_file_sha256(path: Path, wanted: str) -> None:
    """Raise Refused if the file is missing or has another sha256."""
    found = hashlib.sha256(read_bytes(path, ", or name the items with --test-file")).hexdigest()
    if found != wanted:
        raise Refused(
            f"{path} has changed since the run was split (sha256 {found[:12]}, wanted {wanted[:12]}); restore it, or "
            "name the items with --test-file"
        )


def rows_sha256(rows: Sequence[dict]) -> str:
    """Return a hash of rows that are not from a file: sha256 over one json line per row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def read_file(path: Path) -> Source:
    """Read a csv (quoted fields may hold newlines), tsv (GLUE's form: no quoting), jsonl or parquet file.

    Raises Refused, naming the file and the line, if it cannot be read."""
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
        if not sum(len(block.strip()) for block in _blocks(data, path)):  # also finds invalid UTF-8 in any line
            raise Refused(f"{path} is empty (blank lines only); give a file with a header and rows")
        rows, lines = parse(data, path)
    if not rows:
        raise Refused(f"{path} holds no rows; give a file with at least one row below the header")
    return Source(str(path), rows, lines, {**record, "rows": len(rows)})


@contextmanager
def needs_memory(path: Path) -> Iterator[None]:
    """Refuse a file that does not fit in memory."""
    try:
        yield
    except MemoryError:
        raise Refused(f"{path}: there is not enough memory to read it; give a smaller file") from None


def decode_text(data: bytes, path: Path, most_line_bytes: int = MOST_BYTES) -> str:
    """Decode a file's UTF-8 text, unpacked if its name ends in .gz.

    Raises:
        Refused: the bytes are not text, or there are too many of them in total or in a line.
    """
    data = _text_bytes(data, path, most_line_bytes)
    return _decode(data, 0, len(data), path)


def _text_bytes(data: bytes, path: Path, most_line_bytes: int) -> bytes | bytearray:
    """Return the unpacked bytes of a file's text. Raises Refused as `decode_text`, except for invalid UTF-8."""
    if path.name.lower().endswith(".gz"):
        data = _unpack(data, path)
        if not data:
            raise Refused(f"{path} is empty after decompression; copy or write the file again")
    else:
        refuse_gzip(data, path)
    _check_size(data, path, most_line_bytes)
    _refuse_no_text(data, path)
    return data


def refuse_gzip(data: bytes, path: Path | str) -> None:
    """Refuse gzip data in a file whose name does not say so."""
    if data.startswith(b"\x1f\x8b"):
        way_out = f"name it {path.name}.gz or decompress it" if isinstance(path, Path) else "decompress it"
        raise Refused(f"{path} holds gzip data; {way_out}")


def _blocks(data: bytes | bytearray, path: Path) -> Iterator[str]:
    """Yield the text of whole lines, about _BYTES_A_READ bytes at a time.

    One character beyond Latin-1 makes a whole string take two or four times its bytes."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + _BYTES_A_READ) + 1 or len(data)
        yield _decode(data, start, end, path)
        start = end


def _decode(data: bytes | bytearray, start: int, end: int, path: Path) -> str:
    """Decode data[start:end], without a byte order mark at the beginning of `data`."""
    try:
        text = data[start:end].decode()
    except UnicodeDecodeError as error:
        raise _no_utf8(error, path, _line_at(data, start), start) from None
    return text if start else text.removeprefix("\ufeff")


def decode_part(data: bytes, path: Path | str, line: int = 1, offset: int = 0) -> str:
    """Decode UTF-8 text that begins at a line (from 1) and a byte offset of a file.

    Raises:
        Refused: the bytes are not text; the message names line and offset.
    """
    _refuse_no_text(data, path, line, offset)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _no_utf8(error, path, line, offset) from None
    return text if offset else text.removeprefix("\ufeff")


def _refuse_no_text(data: bytes | bytearray, path: Path | str, line: int = 1, offset: int = 0) -> None:
    """Refuse UTF-16 and NUL bytes."""
    if offset == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refused(f"{path} is UTF-16; wanted UTF-8 (iconv -f UTF-16 -t UTF-8 converts it)")
    nul = data.find(b"\0")
    if nul >= 0:
        where = f"{path} line {line - 1 + _line_at(data, nul)}"
        raise Refused(f"{where}: NUL byte at offset {offset + nul}; wanted plain UTF-8 text")


def _no_utf8(error: UnicodeDecodeError, path: Path | str, line: int, offset: int) -> Refused:
    """Return the refusal of invalid UTF-8 in data that begins at a line and an offset of a file."""
    found, line = error.object[error.start], line - 1 + _line_at(error.object, error.start)
    return Refused(
        f"{path} line {line}: byte 0x{found:02x} at offset {offset + error.start} is not UTF-8; convert the file"
    )


def _unpack(data: bytes, path: Path) -> bytearray:
    """Unpack gzip piece by piece, and stop soon after MOST_BYTES."""
    unpacked = bytearray()
    with reading_file(path), gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        while len(unpacked) <= MOST_BYTES and (piece := stream.read(_BYTES_A_READ)):
            unpacked += piece
    return unpacked


def _check_size(data: bytes | bytearray, path: Path, most_line_bytes: int) -> None:
    if len(data) > MOST_BYTES:
        raise Refused(f"{path} holds more than {MOST_BYTES / 2**30:.0f} GiB of text; give a part of it")
    start = 0
    while len(data) - start > most_line_bytes:
        end = data.rfind(b"\n", start, start + most_line_bytes + 1)
        if end < 0:
            raise long_line(path, _line_at(data, start), most_line_bytes)
        start = end + 1


def long_line(path: Path | str, line: int, most_bytes: int) -> Refused:
    """Return the refusal of a line that is longer than any text."""
    return Refused(
        f"{path} line {line}: longer than the {most_bytes / 2**20:.0f} MiB that a text may have: correct the line"
    )


def _line_at(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _header(fields: list[str], path: Path | str, separator: str) -> list[str]:
    names = [field.strip() for field in fields]
    if not any(names):
        raise Refused(f"{path} line 1 is blank, but must name the columns: delete it, or name them there")
    other = next((each for each in ";,\t|" if each in names[0]), None)
    if other and len(names) == 1:
        shown, wanted = ("a tab" if each == "\t" else repr(each) for each in (other, separator))
        renamed = ", or name it .tsv" if other == "\t" else ", or name it .csv" if other == "," else ""
        raise Refused(
            f"{path}: this file seems to be separated by {shown}: its one column is {_shown(names)}; save it with "
            f"{wanted} between the columns{renamed}"
        )
    refuse_repeated(names, f"{path} line 1")
    return names


def refuse_repeated(names: list[str], where: str) -> None:
    """Refuse two columns of one name: one of them would be lost."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise Refused(f"{where}: column {_shown(repeated)} appears twice; give each column its own name")


def _check_width(header: list[str], fields: list[str], path: Path | str, line: int) -> list[str]:
    if len(fields) != len(header):
        raise Refused(
            f"{path} line {line}: {len(fields)} fields, but the header has {len(header)} ({_shown(header)}); "
            "correct the line"
        )
    return fields


def _lines(data: bytes, path: Path) -> Iterator[str]:
    """Yield the lines, and report progress if that takes long."""
    # not str.splitlines: that also splits at U+2028, U+0085 and form feeds inside a sentence
    lines = (block.removesuffix("\n").split("\n") for block in _blocks(data, path))
    return say_how_far(chain.from_iterable(lines), f"reading {path.name}", "lines")


def _parse_tsv(data: bytes, path: Path) -> tuple[Table, array]:
    return _table(*tsv_fields(_lines(data, path), path))


def _parse_csv(data: bytes, path: Path) -> tuple[Table, array]:
    lines = chain.from_iterable(io.StringIO(block, newline="") for block in _blocks(data, path))
    header, rows = csv_fields(lines, path, len(data))
    return _table(header, say_how_far(rows, f"reading {path.name}", "rows"))


def _parse_jsonl(data: bytes, path: Path) -> tuple[list[dict], array]:
    rows, lines = [], array("q")
    for line, row in jsonl_rows(_lines(data, path), path):
        rows.append({sys.intern(name): value for name, value in row.items()})
        lines.append(line)
    return rows, lines


def _table(header: list[str], rows: Iterator[tuple[int, list[str]]]) -> tuple[Table, array]:
    columns, lines = [[] for _ in header], array("q")
    for line, fields in rows:
        lines.append(line)
        for column, value in zip(columns, fields, strict=True):
            column.append(value)
    return Table(dict(zip(header, columns, strict=True))), lines


def tsv_fields(lines: Iterator[str], path: Path | str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header of a tsv, and its rows as (line from 1, fields).

    Raises:
        Refused: the file is malformed; the message names the line.
    """
    header = _header(_tsv_fields(next(lines)), path, "\t")
    return header, ((at, _check_width(header, _tsv_fields(line), path, at)) for at, line in enumerate(lines, start=2))


def _tsv_fields(line: str) -> list[str]:
    return line.removesuffix("\n").removesuffix("\r").split("\t")


def csv_fields(
    lines: Iterator[str], path: Path | str, most_characters: int
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header of a csv, and its rows as (line from 1 at which the row starts, fields).

    Args:
        lines: with their line ends, which a quoted field may contain.
        most_characters: of a field.
    Raises:
        Refused: the file is malformed; the message names the line.
    """
    # the limit is global to the process and only ever raised: the default refuses fields over 131,072 characters
    csv.field_size_limit(max(csv.field_size_limit(), most_characters))
    rows = _csv_fields(csv.reader(lines, strict=True), path)
    header = _header(next(rows)[1], path, ",")
    return header, ((line, _check_width(header, fields, path, line)) for line, fields in rows)


def _csv_fields(reader, path: Path | str) -> Iterator[tuple[int, list[str]]]:
    start = 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f"{path}: the row that starts on line {start} is not csv ({error}); correct its quotes") from None


def jsonl_rows(lines: Iterator[str], path: Path | str) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a jsonl file as (line from 1, row). Raises Refused, naming a malformed line."""
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except Refused as refusal:
            raise Refused(f"{path} line {number}: {refusal}") from None
        except (ValueError, RecursionError) as error:  # ValueError also for numbers with thousands of digits
            raise Refused(f"{path} line {number}: not JSON ({error}); wanted one object per line") from None
        if not isinstance(row, dict):
            raise Refused(f"{path} line {number}: {type(row).__name__}, wanted one JSON object per line")
        yield number, row


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of some pairs. Raises Refused if a key is there twice: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(f"the key {twice[:40]!r} appears twice; keep one of them")
    return found


def _parse_parquet(data: bytes, path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    with reading_parquet(path), say_when_slow(f"reading {path.name}"):
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        refuse_repeated(file.schema_arrow.names, str(path))
        return Table(file.read().to_pydict())


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Refuse a file that is not parquet, or has values that Python cannot represent."""
    import pyarrow

    try:
        yield
    except Refused:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also dates that Python cannot hold
        raise Refused(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from None


def _shown(names: list[str]) -> str:
    """Return column names for a message, shortened: in a file without a header they are whole sentences."""
    return ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:8])


def find_column(
    source, accepted: tuple[str, ...], role: str, way_out: str = "", of_others: tuple[str, ...] = ()
) -> str:
    """Return the first of the `accepted` columns that the source has.

    Args:
        role: what the column holds, for the message: "the texts".
        way_out: the end of the message.
        of_others: names that other roles accept, which are not suggested.
    Raises:
        Refused: the source has none of them.
    """
    columns = source.columns
    for name in accepted:
        if name in columns:
            return name
    others = [name for name in columns if name not in of_others]
    meant = next(filter(None, (did_you_mean(name, others) for name in accepted)), "")
    wanted = f"no column for {role}, {alternatives(accepted)}"
    raise Refused(f"{source.name}: wrong columns: {wanted}; found {_shown(columns)}{meant}{way_out}")


def alternatives(names: Sequence[str]) -> str:
    """Return "'text' (or 'review', 'sentence')"."""
    first, *others = map(repr, names)
    return f"{first} (or {', '.join(others)})" if others else first


def clean_text(value, where: str, way_out: str = CORRECT_ROW) -> str:
    """Return a text without surrounding white space. Raises Refused unless it is a non-empty, valid Unicode string.

    Args:
        way_out: for a value that is not a string.
    """
    if not isinstance(value, str | None):
        raise Refused(f"{where}: the text is {type(value).__name__}, wanted a string: {way_out}")
    text = (value or "").strip()
    if not text:
        raise Refused(f"{where}: empty text; remove the row or fill it in")
    if "\0" in text:
        raise Refused(f"{where}: the text holds a NUL character; wanted plain text")
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str, kind: str = "text") -> None:
    """Raise Refused for a string, of this kind, that cannot be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(
            f"{where}: the {kind} holds half of a surrogate pair, which is not Unicode; correct the row"
        ) from None
