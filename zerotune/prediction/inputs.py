"""Read the input of predictions: rows of a file or of the command line, in chunks that fit in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from zerotune.errors import Refused
from zerotune.prediction.settings import InputSettings
from zerotune.tasks.files import OTHER_COLUMN, clean_text, find_column
from zerotune.tasks.row_stream import TEXT_COLUMN, Row, RowDigest, RowStream, open_rows

# A chunk's limits in rows and characters per token of a batch: about 10 batches, enough to sort rows by length.
CHUNK_ROWS, CHUNK_CHARACTERS = 0.5, 128


class Item(NamedTuple):
    """A row's text, or its two texts (a pair, or question and context), and where the row is."""

    texts: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Chunk:
    """Rows in the order of their file.

    Attributes:
        items: None for a row without a text, which gets no prediction.
    """

    rows: list[dict]
    items: list[Item | None]


@dataclass(frozen=True)
class Reader:
    """How the texts of a row are found.

    Attributes:
        columns: those of the one or two texts.
        clean: the text of each column -> the text as the model reads it.
    """

    columns: tuple[str, ...]
    clean: tuple[Callable[[str], str], ...]

    def item(self, row: Row) -> Item | None:
        """Return the texts of a row, None if one is missing or blank. Raises Refused if one is not text."""
        texts = []
        for column, clean in zip(self.columns, self.clean, strict=True):
            value = row.fields.get(column)
            if value is None or (isinstance(value, str) and not value.strip()):
                return None
            clean_text(value, row.where, OTHER_COLUMN)
            texts.append(clean(value))
        return Item(tuple(texts), row.where) if all(texts) else None


def open_source(source: InputSettings, asks: bool) -> RowStream:
    """Open the user's input as rows.

    Args:
        asks: whether the model answers questions.
    Raises:
        Refused: it cannot be read, or the model does not answer input of its kind.
    """
    if source.file is not None:
        stream = open_rows(source.file, source.kind)
        if stream.kind == "txt" and source.columns:
            raise Refused(
                f"--text-column {','.join(source.columns)}: {stream.name} is read as txt, a text per line without "
                "columns: name its format with --format, such as csv, or leave --text-column out"
            )
        return stream
    if asks and source.question is None:
        raise Refused("the model answers questions: give --question and --context, or a --file of both")
    if not asks and source.question is not None:
        raise Refused(
            "--question is for models that answer questions, and this one gives labels: give texts, or --file"
        )
    if asks:
        fields = [{"question": source.question, "context": source.context}]
    else:
        fields = [{TEXT_COLUMN: text} for text in source.texts]
    rows = [Row(each, f"text {number}" if not asks else "the question") for number, each in enumerate(fields, start=1)]
    for row in rows:
        for text in row.fields.values():
            clean_text(text, row.where)
    return RowStream("the command line", "txt", list(fields[0]), iter(rows), lambda: None)


def find_columns(stream: RowStream, wanted: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Return the columns that hold the texts.

    Args:
        wanted: for each text, the accepted names; the first one that the file has is read.
    Raises:
        Refused: the file has none of a text's names.
    """
    if stream.kind == "txt" and len(wanted) == 1:
        return (stream.columns[0],)
    if stream.columns == [TEXT_COLUMN] and stream.kind == "txt":
        raise Refused(
            f"{stream.name}: the model reads two texts a row, a pair or a question and its context, and this has one: "
            "give a --file with two columns, such as csv"
        )
    roles = ("the texts",) if len(wanted) == 1 else ("the first text", "the second text")
    way_out = ": name the columns with --text-column"
    return tuple(find_column(stream, names, role, way_out) for names, role in zip(wanted, roles, strict=True))


def cut_chunks(rows: Iterator[Row], reader: Reader, tokens_per_device: int) -> Iterator[Chunk]:
    """Cut rows into chunks, which depend only on the rows and the token budget.

    Raises:
        Refused: a row cannot be read.
    """
    fields, items, characters = [], [], 0
    for row in rows:
        item = reader.item(row)
        fields.append(row.fields)
        items.append(item)
        characters += sum(map(len, item.texts)) if item else 0
        if len(items) >= CHUNK_ROWS * tokens_per_device or characters >= CHUNK_CHARACTERS * tokens_per_device:
            yield Chunk(fields, items)
            fields, items, characters = [], [], 0
    if items:
        yield Chunk(fields, items)


def skip(stream: RowStream, reader: Reader, num_rows: int, digest: RowDigest) -> tuple[int, int | None]:
    """Skip the first rows, which are predicted already, and add them to a digest.

    Returns:
        How many of them have no text, and the number of the first of these, from 1; None if all have one.
    Raises:
        Refused: there are fewer rows.
    """
    num_found, num_blank, first_blank = 0, 0, None
    for num_found, row in enumerate(islice(stream.rows, num_rows), start=1):
        digest.add([row.fields])
        if reader.item(row) is None:
            num_blank, first_blank = num_blank + 1, first_blank or num_found
    if num_found < num_rows:
        raise Refused(f"{stream.name} has {num_found:,} rows, and {num_rows:,} are predicted already: restore it")
    return num_blank, first_blank
