"""Write predictions to standard output, or to a file that can be resumed and gets its name when complete.

Until OUTPUT is complete, OUTPUT.partial holds whole rows, and OUTPUT.partial.json their number and hashes of everything
they depend on. Rows of a parquet file are kept as Arrow streams, because parquet files cannot be appended to.
"""

import csv
import fcntl
import gzip
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from typing_extensions import TypedDict

from zerotune.errors import Refused, first_line
from zerotune.files import disk_error_number, read_json, sync_folder, why_not_writable, write_json
from zerotune.records import Count
from zerotune.tasks.files import file_kind
from zerotune.tasks.row_stream import TEXT_COLUMN, RowDigest, RowStream

# A kill loses the predictions of at most this time; more frequent records would be slow on a network disk.
SECONDS_BETWEEN_RECORDS = 2
MOST_SHOWN = 60  # characters of a text beside its prediction


class PartialRecord(TypedDict):
    """OUTPUT.partial.json: how many complete rows and bytes OUTPUT.partial has, and hashes of all they depend on.

    input_sha256 is the `RowDigest` of the input rows predicted so far. identity has a hash of everything else, by name;
    it is empty for standard input, which cannot be resumed.
    """

    rows: Count
    bytes: Count
    identity: dict[str, str]
    input_sha256: str


class Output(Protocol):
    """A place for predictions.

    Attributes:
        rows: how many it holds.
    """

    rows: int

    def add(self, rows: list[dict], source_rows: list[dict]) -> None:
        """Add whole rows, made from these rows of the input."""

    def save(self) -> None:
        """Make the added rows durable."""

    def finish(self) -> None:
        """Give the complete output its name."""


# --- rows as bytes ---


def check_columns(stream: RowStream, new: list[str]) -> None:
    """Refuse new columns whose names the input already has."""
    taken = [name for name in new if name in stream.columns]
    if taken:
        raise taken_column(stream.name, taken[0])


def taken_column(where: str, name: str) -> Refused:
    """Return the refusal of a new column whose name is taken."""
    return Refused(f"{where}: the input already has a column {name!r}: rename the new ones with --prefix")


class Format(Protocol):
    """How rows become bytes; the bytes of several calls can be joined."""

    def start(self) -> bytes:
        """Return what is written before the first row."""

    def encode(self, rows: list[dict]) -> bytes:
        """Return rows as bytes. Raises Refused for a row that the format cannot hold."""


class JsonLines:
    """One JSON object per line."""

    def start(self) -> bytes:
        """Return nothing."""
        return b""

    def encode(self, rows: list[dict]) -> bytes:
        """Return a line for each row; NaN, which JSON lacks, becomes null."""
        return b"".join(map(_json_line, rows))


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)


def _json_line(row: dict) -> bytes:
    try:
        line = _JSON.encode(row)
    except ValueError:
        line = _JSON.encode(_without_nan(row))
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in the input
        return json.dumps(_without_nan(row), default=str).encode() + b"\n"


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):  # tuples are the entries of a parquet file's map
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_known(rows: list[dict], columns: set[str]) -> None:
    """Refuse rows that have other columns than these."""
    for row in rows:
        if not row.keys() <= columns:
            name = next(name for name in row if name not in columns)
            raise Refused(f"the first rows have no column {name!r}: use an --output .jsonl")


class Table:
    """A csv, or a tsv in the form of GLUE: without quotes, so no value may hold a tab or a line end.

    Args:
        columns: of every row. A value that is not text is written as JSON, a missing one as an empty cell.
    """

    def __init__(self, columns: list[str], is_tsv: bool):
        self.columns, self.is_tsv = columns, is_tsv
        self._known = set(columns)

    def start(self) -> bytes:
        """Return the header."""
        return self._lines([self.columns])

    def encode(self, rows: list[dict]) -> bytes:
        """Return the rows. Raises Refused for a column that the first rows lack, or a value that a tsv cannot hold."""
        _check_known(rows, self._known)
        return self._lines([[_cell(row.get(name)) for name in self.columns] for row in rows])

    def _lines(self, rows: list[list[str]]) -> bytes:
        text = io.StringIO()
        if self.is_tsv:
            for row in rows:
                if any(mark in value for value in row for mark in "\t\n\r"):
                    found = next(value for value in row if any(mark in value for mark in "\t\n\r"))
                    raise Refused(f"a tsv cannot hold a tab or a line end, as in {found[:40]!r}: use an --output .csv")
                text.write("\t".join(row) + "\n")
        else:
            plain = csv.writer(text, lineterminator="\n")
            quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
            for row in rows:  # Python quotes a cell with \n, but before 3.13 not one with \r
                (quoted if any("\r" in value for value in row) else plain).writerow(row)
        try:
            return text.getvalue().encode()
        except UnicodeEncodeError as error:
            found = error.object[max(0, error.start - 20) : error.start]
            raise Refused(f"half of a surrogate pair after {found!r} is not text: use an --output .jsonl") from None


def _cell(value) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return _JSON.encode(_without_nan(value)) if isinstance(value, bool | int | float | list | dict) else str(value)


class Arrow:
    """Arrow streams (pyarrow.ipc) one after the other, each of some rows, from which a parquet file is made.

    Args:
        schema: types of all columns (a pyarrow.Schema).
    """

    def __init__(self, schema):
        from pyarrow import types

        self.schema = schema
        self._known = set(schema.names)
        self._nested = {each.name: each.type for each in schema if types.is_nested(each.type)}

    def start(self) -> bytes:
        """Return nothing: each stream has the schema."""
        return b""

    def encode(self, rows: list[dict]) -> bytes:
        """Return a stream of rows. Raises Refused for a column or a type of value that the first rows lack."""
        import pyarrow
        import pyarrow.ipc

        _check_known(rows, self._known)
        for name, arrow_type in self._nested.items():
            for row in rows:
                _check_keys(row.get(name), arrow_type, name)
        try:
            batch = pyarrow.RecordBatch.from_pylist(rows, schema=self.schema)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise Refused(
                f"a value has another type than its column has in the first rows ({first_line(error)}): use an "
                "--output .jsonl"
            ) from None
        found = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(
            found, self.schema
        ) as writer:  # a record batch alone cannot carry the dictionaries of categories
            writer.write_batch(batch)
        return found.getvalue().to_pybytes()


def output_schema(stream: RowStream, first_rows: list[dict], new: list[str], asks: bool):
    """Return the schema of a parquet output: the input's columns and the new ones.

    A parquet input's columns keep their types, those of jsonl have the types in the first rows, all others are strings.
    Raises Refused if a column of jsonl has mixed types.

    Args:
        first_rows: of the input.
        new: the new columns' names, including the prefix.
        asks: whether the predictions are answers to questions.
    """
    import pyarrow

    if stream.schema is not None:
        fields = [*stream.schema]
    elif stream.kind == "jsonl":
        rows = [{name: row.get(name) for name in stream.columns} for row in first_rows]
        try:
            found = pyarrow.Table.from_pylist(rows).schema
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            problem = f"{stream.name} has columns of mixed types ({first_line(error)})"
            raise Refused(f"{problem}: use an --output .jsonl") from None
        string = pyarrow.string()
        fields = [pyarrow.field(each.name, string if each.type == pyarrow.null() else each.type) for each in found]
    else:
        fields = [pyarrow.field(name, pyarrow.string()) for name in stream.columns]
    return pyarrow.schema([*fields, *(pyarrow.field(name, _new_type(name, asks)) for name in new)])


def _check_parquet(schema, name: str) -> None:
    """Refuse columns that parquet cannot store, such as objects without a key, before anything is predicted."""
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.ParquetWriter(pyarrow.BufferOutputStream(), schema).close()
    except pyarrow.ArrowException as error:
        raise Refused(
            f"{name} has a column that parquet cannot store ({first_line(error)}): use an --output .jsonl"
        ) from None


def _check_keys(value, arrow_type, column: str) -> None:
    """Refuse an object in a column with a key that its type lacks; Arrow would drop it."""
    from pyarrow import types

    if isinstance(value, dict) and types.is_struct(arrow_type):
        parts = {part.name: part.type for part in arrow_type}
        for key, inner in value.items():
            if key not in parts:
                raise Refused(
                    f"an object in the column {column!r} has a key {key!r} that the first rows lack: use an "
                    "--output .jsonl"
                )
            _check_keys(inner, parts[key], column)
    elif isinstance(value, list) and types.is_list(arrow_type):
        for inner in value:
            _check_keys(inner, arrow_type.value_type, column)


def _new_type(name: str, asks: bool):
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    if name.endswith("top_k"):
        answer = [("answer", text), ("start", pyarrow.int64())] if asks else [("label", text)]
        return pyarrow.list_(pyarrow.struct([*answer, ("probability", number)]))
    return number if name.endswith("probability") else text


# --- a file ---


def output_format(path: Path, stream: RowStream, first_rows: list[dict], new: list[str], asks: bool) -> Format:
    """Return how rows are written into a file of this name.

    Args: as for `output_schema`.

    Raises:
        Refused: its extension is of no supported format, or the rows do not fit the format.
    """
    kind = file_kind(path)
    if kind == "jsonl":
        return JsonLines()
    if kind == "parquet":
        schema = output_schema(stream, first_rows, new, asks)
        _check_parquet(schema, stream.name)
        return Arrow(schema)
    return Table([*stream.columns, *new], kind == "tsv")


def check_output(path: Path) -> None:
    """Refuse an output that exists already, or whose name is too long or of an unknown kind."""
    file_kind(path)
    try:
        is_there = path.exists()
        _record_of(path).exists()
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    if is_there:
        raise Refused(f"--output {path} already exists: delete it, or name another file")


def check_writable(path: Path, identity: dict[str, str] | None) -> PartialRecord | None:
    """Refuse an output that `FileOutput` would refuse, and create nothing.

    Returns:
        The record of the rows that can be resumed; None if there are none.
    """
    if _partial(path).exists():
        output = FileOutput(path, identity)
        output.close()
        return output.record
    if reason := why_not_writable(path.parent):
        raise _unwritable(path, reason)
    return None


def check_input(path: Path, record: PartialRecord, digest: RowDigest) -> None:
    """Refuse to resume if the rows of the input that are predicted already have changed.

    Args:
        digest: of as many rows of the input as the record has.
    """
    if digest.hexdigest() != record["input_sha256"]:
        raise _made_by_another(path, ["input"])


def _unwritable(path: Path, reason: str) -> Refused:
    return Refused(f"--output {path} cannot be written ({reason}): name another file")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.json")


def _way_out(path: Path) -> str:
    return f"delete {_partial(path)} to start again, or name another --output"


def _made_by_another(path: Path, differing: list[str]) -> Refused:
    return Refused(f"{_partial(path)} was made by a command with different {' and '.join(differing)}: {_way_out(path)}")


def _resumable(path: Path, identity: dict[str, str] | None) -> PartialRecord | None:
    """Return the record of an interrupted command's output; None if there is nothing to resume.

    Args:
        identity: as for `FileOutput`.
    Raises:
        Refused: the partial file belongs to other predictions, or to the user, or is damaged.
    """
    partial, record_path, way_out = _partial(path), _record_of(path), _way_out(path)
    if not (partial.exists() and partial.stat().st_size):
        return None
    if not record_path.exists():
        raise Refused(f"{partial} has no {record_path.name} beside it, so it may be a file of your own: {way_out}")
    record = read_json(record_path, PartialRecord, way_out)
    if record["rows"] == 0 or not record["identity"]:
        return None
    if identity is None:
        raise Refused(f"{partial} holds {record['rows']:,} rows of a command that can be resumed: {way_out}")
    names = identity.keys() | record["identity"].keys()
    differing = sorted(name for name in names if identity.get(name) != record["identity"].get(name))
    if differing:
        raise _made_by_another(path, differing)
    if partial.stat().st_size < record["bytes"]:
        raise Refused(f"{partial} is damaged ({partial.stat().st_size:,} bytes, wanted {record['bytes']:,}): {way_out}")
    return record


class FileOutput:
    """A file that is written under another name, resumed after an interruption, and renamed once complete.

    Args:
        path: of the complete file; it is compressed if the name ends with .gz.
        identity: hashes of everything the predictions depend on except the input, by name; None if the input cannot be
            read again, so that nothing can be resumed.
        digest: of the input's rows that are predicted already, as `record` has them.
    Attributes:
        record: of the rows that the file has; None if it has none.
    Raises:
        Refused: the file cannot be written, another process is writing it, or a partial file is damaged or of another
            command.
    """

    def __init__(self, path: Path, identity: dict[str, str] | None, digest: RowDigest | None = None):
        self.path, self.identity, self._digest = path, identity, digest or RowDigest()
        self.rows = self.bytes = 0
        self._packs, self._format, self._next_record = path.name.lower().endswith(".gz"), None, 0.0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _partial(path).open("ab")
        except OSError as error:
            if disk_error_number(error) is not None:
                raise
            raise _unwritable(path, error.strerror) from None
        self._lock()
        self.record = _resumable(path, identity)
        if self.record is not None:
            self.rows, self.bytes = self.record["rows"], self.record["bytes"]
        self._file.truncate(self.bytes)  # first: a partial file with rows needs its record
        if self.record is None:  # or the record of a partial file that the user deleted
            _record_of(path).unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"another process is writing {_partial(self.path)}: wait for it, or name another --output"
            ) from None
        except OSError:
            pass  # a file system without locks

    def open(self, output_format: Format) -> None:
        """Start to write in a format."""
        self._format = output_format
        if not self.bytes:
            self._save_record()  # marks the partial file as ours
            self._write(output_format.start())

    def add(self, rows: list[dict], source_rows: list[dict]) -> None:
        """Add whole rows. Raises Refused as the format does, after removing the file if it has no rows yet."""
        try:
            data = self._format.encode(rows)
        except Refused:
            if not self.rows:
                _partial(self.path).unlink()
                _record_of(self.path).unlink(missing_ok=True)
            raise
        self._write(data)
        self.rows += len(rows)
        self._digest.add(source_rows)
        if time.monotonic() >= self._next_record:
            self.save()

    def _write(self, data: bytes) -> None:
        if data:
            packed = gzip.compress(data, mtime=0) if self._packs else data  # compressed pieces can be joined
            with self._named():
                self._file.write(packed)
            self.bytes += len(packed)

    @contextmanager
    def _named(self):
        """Add the file name to an OSError: a failed write leaves it out."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    def save(self) -> None:
        """Make the added rows durable, and record their number."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._save_record()
        self._next_record = time.monotonic() + SECONDS_BETWEEN_RECORDS

    def _save_record(self) -> None:
        described = {"identity": self.identity or {}, "input_sha256": self._digest.hexdigest()}
        write_json(_record_of(self.path), {"rows": self.rows, "bytes": self.bytes, **described})

    def close(self) -> None:
        """Close the file and release its lock; what was added since the last `save` may be lost."""
        self._file.close()

    def finish(self) -> None:
        """Give the complete file its name."""
        self.save()
        if isinstance(self._format, Arrow):
            with self._named():
                _write_parquet(_partial(self.path), self.path, self._format.schema)
            _partial(self.path).unlink()
        else:
            _partial(self.path).replace(self.path)
        self.close()
        with suppress(FileNotFoundError):
            _record_of(self.path).unlink()
        sync_folder(self.path.parent)


def _write_parquet(streams: Path, path: Path, schema) -> None:
    """Make a parquet file from a file of Arrow streams, batch by batch."""
    import pyarrow.ipc
    import pyarrow.parquet

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pyarrow.OSFile(str(streams)) as source, pyarrow.parquet.ParquetWriter(aside, schema) as writer:
            while source.tell() < source.size():
                for batch in pyarrow.ipc.open_stream(source):
                    writer.write_batch(batch)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# --- standard output ---


def take_standard_output() -> io.BufferedWriter:
    """Return standard output as a stream of bytes for results only; all later prints go to standard error.

    Raises:
        Refused: it is closed.
    """
    try:
        stream = os.fdopen(os.dup(1), "wb")
    except OSError:
        raise Refused("standard output is closed: give an --output file") from None
    sys.stdout.flush()
    sys.stdout = sys.stderr
    return stream


class PrintedOutput:
    """Standard output.

    Args:
        stream: from `take_standard_output`.
        encode: rows -> bytes.
    """

    def __init__(self, stream, encode: Callable[[list[dict]], bytes]):
        self.rows, self._stream, self._encode = 0, stream, encode

    def add(self, rows: list[dict], source_rows: list[dict]) -> None:
        """Print rows. Raises Refused if the pipe has been closed."""
        try:
            self._stream.write(self._encode(rows))
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # the buffer goes there
            raise Refused(f"standard output was closed after {self.rows:,} rows: give an --output file") from None
        self.rows += len(rows)

    def save(self) -> None:
        """Do nothing: rows are flushed as they are added."""

    def finish(self) -> None:
        """Do nothing."""


def readable_line(row: dict, prefix: str) -> str:
    """Return a readable line: the likeliest answers or labels, then the text or the probability of "no answer"."""
    found = {name: row.get(prefix + name) for name in ("prediction", "probability", "no_answer_probability", "top_k")}
    if found["probability"] is None:
        return f"(no text)  {' '.join(row[TEXT_COLUMN].split())[:MOST_SHOWN]}"
    answers = [(found["prediction"], found["probability"])]
    ranked = [(each.get("label", each.get("answer")), each["probability"]) for each in found["top_k"] or []]
    answers += [each for each in ranked if each[0] != found["prediction"]]
    asks = found["no_answer_probability"] is not None
    none = "(no answer)" if asks else "(no label)"
    shown = ", ".join(f"{answer or none} {probability:.4f}" for answer, probability in answers)
    if asks:
        return f"{shown}  no answer {found['no_answer_probability']:.4f}"
    text = " ".join(row[TEXT_COLUMN].split())
    return f"{shown}  {text if len(text) <= MOST_SHOWN else f'{text[: MOST_SHOWN - 1]}…'}"
