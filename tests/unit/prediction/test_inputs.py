"""Chunks of rows are bounded in rows and characters, are the same wherever reading begins, and are not kept."""

import weakref
from itertools import chain

import pytest

from zerotune.errors import Refused
from zerotune.prediction.inputs import CHUNK_CHARACTERS, Reader, cut_chunks, find_columns, open_source, skip
from zerotune.prediction.settings import InputSettings
from zerotune.tasks.row_stream import Row, RowDigest, RowStream


class Fields(dict):
    """A row that tests can watch with weak references."""


READER = Reader(("text",), (str.strip,))


def rows(num_rows, text="a word", living=None):
    for number in range(num_rows):
        fields = Fields(text=text, id=number)
        if living is not None:
            living.add(fields)
        yield Row(fields, f"row {number}")


def test_a_chunk_is_bounded_in_rows_and_in_characters():
    assert [len(chunk.items) for chunk in cut_chunks(rows(5000), READER, 4000)] == [2000, 2000, 1000]
    assert [len(chunk.items) for chunk in cut_chunks(rows(2), READER, 1)] == [1, 1]
    long = "x" * (CHUNK_CHARACTERS * 5 + 1)
    assert [len(chunk.items) for chunk in cut_chunks(rows(5, long), READER, 10)] == [2, 2, 1]


def test_a_file_of_any_size_holds_the_rows_of_two_chunks_at_most():
    living, most, seen = weakref.WeakSet(), 0, 0
    for chunk in cut_chunks(rows(20_000, living=_Ids(living)), READER, 2000):
        most, seen = max(most, len(living)), seen + len(chunk.rows)
    assert seen == 20_000 and 1000 <= most <= 2000


class _Ids:
    """A set of the dictionaries that are still alive; dictionaries are not hashable."""

    def __init__(self, living):
        self.living = living

    def add(self, fields):
        mark = _Mark()
        fields["mark"] = mark
        self.living.add(mark)


class _Mark:
    pass


def test_a_row_without_a_text_has_no_item():
    for text in ("", "  \n", None):
        assert READER.item(Row({"text": text}, "here")) is None
    assert READER.item(Row({}, "here")) is None
    assert READER.item(Row({"text": " a "}, "here")).texts == ("a",)
    without_markup = Reader(("text",), (lambda text: text.replace("<br />", "").strip(),))
    assert without_markup.item(Row({"text": "<br />"}, "here")) is None
    for value, reason in ((3, "the text is int"), ("a\0", "NUL"), ("\ud800", "surrogate")):
        with pytest.raises(Refused, match=f"here: .*{reason}"):
            READER.item(Row({"text": value}, "here"))


def test_the_command_line_is_rows_too():
    stream = open_source(InputSettings(texts=("a", "b")), asks=False)
    assert [row.fields for row in stream.rows] == [{"text": "a"}, {"text": "b"}]
    assert find_columns(stream, (("sentence", "body"),)) == ("text",)
    asked = open_source(InputSettings(question="q", context="c"), asks=True)
    assert find_columns(asked, (("question",), ("context",))) == ("question", "context")


def test_a_text_per_line_has_no_columns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("subject,body\none,two\n")
    with pytest.raises(Refused, match=r"--text-column body: .*a\.txt is read as txt, .* name its format with --format"):
        open_source(InputSettings(file=str(path), columns=("body",)), asks=False)
    stream = open_source(InputSettings(file=str(path), kind="csv", columns=("body",)), asks=False)
    assert find_columns(stream, (("body",),)) == ("body",)
    for one in (InputSettings(texts=("a",)), InputSettings(file=str(path))):
        with pytest.raises(Refused, match=r"reads two texts a row, .* give a --file with two columns"):
            find_columns(open_source(one, asks=False), (("premise",), ("hypothesis",)))


def test_rows_that_are_predicted_are_passed_over():
    blank = Row({"text": ""}, "")
    stream = RowStream("rows", "csv", ["text"], chain(rows(1), [blank, blank], rows(2)), lambda: None)
    digest, same = RowDigest(), RowDigest()
    assert skip(stream, READER, 3, digest) == (2, 2)
    same.add([next(rows(1)).fields, blank.fields, blank.fields])
    assert digest.hexdigest() == same.hexdigest()
    assert [row.fields["id"] for row in stream.rows] == [0, 1]
    with pytest.raises(Refused, match="rows has 0 rows, and 2 are predicted already"):
        skip(stream, READER, 2, digest)
