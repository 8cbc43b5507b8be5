"""Reading rows one by one gives the rows and messages of reading whole files, but reads no more than is asked for."""

import gzip
import io

import pyarrow
import pyarrow.parquet
import pytest

from zerotune.errors import Refused
from zerotune.tasks.files import read_file
from zerotune.tasks.row_stream import open_rows

CONTENTS = {
    "csv": 'id,text\n1,"a, ""b""\n\nc"\n2,\n\n\n',
    "tsv": 'id\ttext\r\n1\t"a\r\n2\t\r\n\n',
    "jsonl": '{"id": 1, "text": "a\\u2028b"}\n{"text": null, "more": [1]}\n\n',
}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
def test_rows_and_places_are_those_of_the_whole_file(tmp_path, kind, packs):
    path = tmp_path / f"rows.{kind}{'.gz' if packs else ''}"
    data = CONTENTS[kind].encode("utf-8-sig")
    path.write_bytes(gzip.compress(data, mtime=0) if packs else data)
    whole, stream = read_file(path), open_rows(str(path))
    rows = list(stream.rows)
    assert [row.fields for row in rows] == whole.rows and len(rows) == 2
    assert [row.where for row in rows] == [whole.where(number) for number in range(2)]
    assert stream.columns == whole.columns and stream.position() == 1


def test_rows_of_a_csv_may_end_in_a_lone_carriage_return(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\r1,"a\r\nb"\r2,c\r')
    assert [row.fields for row in open_rows(str(path)).rows] == read_file(path).rows
    assert len(read_file(path).rows) == 2


def test_every_line_of_a_txt_is_a_row(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\n two\u2028three\n\n".encode())
    assert [row.fields["text"] for row in open_rows(str(path)).rows] == ["one", "", " two\u2028three", ""]


def test_a_parquet_file_keeps_its_types(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", None, "c"], "n": [1.5, 2.5, None]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    stream = open_rows(str(path))
    assert [row.fields for row in stream.rows] == table.to_pylist() and stream.schema.equals(table.schema)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    """One of them would be lost."""
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(Refused, match="column 'text' appears twice"):
        open_rows(str(tmp_path / "a.parquet"))


def test_a_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(Refused, match="standard input is closed: name a file"):
        open_rows("-")


def test_standard_input_is_text_unless_it_is_said(monkeypatch):
    class Input:
        buffer = io.BytesIO(b"a,b\n1,2\n")

    monkeypatch.setattr("sys.stdin", Input)
    assert [row.fields for row in open_rows("-").rows] == [{"text": "a,b"}, {"text": "1,2"}]
    Input.buffer = io.BytesIO(b"a,b\n1,2\n")
    assert [tuple(row) for row in open_rows("-", "csv").rows] == [({"a": "1", "b": "2"}, "standard input line 2")]
    with pytest.raises(Refused, match="cannot be read from standard input"):
        open_rows("-", "parquet")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.csv", b"text\nx\ny,z\n", "line 3: 2 fields, but the header has 1"),
        ("a.csv", b'text\nx\n"y\n', "the row that starts on line 3 is not csv"),
        ("a.csv", b"text,text\n", "'text' appears twice"),
        ("a.csv", b"text\n\n", "holds no rows"),
        ("a.csv", b"\n\n", "blank lines only"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text\nx\ny\0z\n", "line 3: NUL byte at offset 8"),
        ("a.csv", b"text\nx\n\xffz\n", "line 3: byte 0xff at offset 7 is not UTF-8"),
        ("a.csv", b"\xff\xfet", "UTF-16"),
        ("a.csv", gzip.compress(b"text\nx\n", mtime=0), "holds gzip data; name it a.csv.gz"),
        ("a.csv.gz", gzip.compress(b"text\nx\n" * 99, mtime=0)[:-9], "broken gzip"),
        ("a.csv.gz", b"text\nx\n", "broken gzip"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: list, wanted one JSON object per line"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "x"}\n', "line 2: not JSON"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.doc", b"x", "unknown file extension; wanted .txt"),
        ("a", b"x", "name its format with --format"),
    ],
)
def test_a_broken_file_is_refused_where_it_breaks(tmp_path, monkeypatch, name, data, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Refused, match=reason.replace("(", r"\(")):
        list(open_rows(name).rows)


def test_a_line_of_more_bytes_than_any_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("zerotune.tasks.row_stream.MOST_LINE_BYTES", 1000)
    (tmp_path / "a.txt").write_text("a" * 999 + "\n" + "b" * 1001)
    with pytest.raises(Refused, match="line 2: longer than"):
        list(open_rows(str(tmp_path / "a.txt")).rows)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(Refused, match=r"no.csv: no such file; check the path$"):
        open_rows(str(tmp_path / "no.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(Refused, match="is a folder"):
        open_rows(str(tmp_path / "folder.csv"))


def test_no_more_is_read_than_is_asked(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word\n" * 1_000_000)
    stream = open_rows(str(path))
    assert next(stream.rows).fields == {"text": "word"}
    assert stream.position() < 0.05
