"""Test reading rows: every format gives the same rows, and unreadable input is refused by name and line."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from zerotune.errors import Refused
from zerotune.tasks import files
from zerotune.tasks.files import find_column, read_file, require_file_sha256

ROWS = [
    {"sentence": 'a "quoted start and no end', "label": "1"},
    {"sentence": "it 's dull , and long", "label": "0"},
    {"sentence": "naïve \u2028 but warm", "label": "1"},
]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def tsv(rows=ROWS) -> str:
    return "sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows)


def csv_text(rows=ROWS) -> str:
    quoted = ['"' + row["sentence"].replace('"', '""') + '"' for row in rows]
    return "sentence,label\n" + "".join(f"{text},{row['label']}\n" for text, row in zip(quoted, rows, strict=True))


def jsonl(rows=ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize(("kind", "form"), [("tsv", tsv), ("csv", csv_text), ("jsonl", jsonl)])
def test_formats_agree(tmp_path, kind, form, compressed):
    path = write(tmp_path, f"rows.{kind}{compressed}", form())
    source = read_file(path)
    assert source.rows == ROWS
    first_line = 1 if kind == "jsonl" else 2
    assert source.where(2) == f"{path} line {first_line + 2}"
    assert source.record == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 3,
    }


def test_parquet_rows_have_no_lines(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"sentence": "so good", "label": 1}]), path)
    source = read_file(path)
    assert source.rows == [{"sentence": "so good", "label": 1}]
    assert source.where(0) == f"{path} row 1"


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    columns = [pyarrow.array(["a", "b"]), pyarrow.array([0, 1])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(Refused, match="column 'label' appears twice; give each column its own name"):
        read_file(tmp_path / "a.parquet")


def test_a_parquet_date_that_python_cannot_hold_is_refused(tmp_path):
    column = pyarrow.array([10**15], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a"], "when": column}), tmp_path / "far.parquet")
    with pytest.raises(Refused, match="not a readable parquet file"):
        read_file(tmp_path / "far.parquet")


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path, "rows.tsv", b"\xef\xbb\xbfsentence\tlabel\r\nwarm\t1\r\n\r\n")
    assert read_file(path).rows == [{"sentence": "warm", "label": "1"}]


def test_csv_fields_may_hold_newlines_and_pass_the_default_limit(tmp_path):
    long_text = "long " * 40_000
    path = write(tmp_path, "rows.csv", f'text,label\n"one\ntwo ""three""",1\n"{long_text}",0\n')
    source = read_file(path)
    assert [row["text"] for row in source.rows] == ['one\ntwo "three"', long_text]
    assert list(source.lines) == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "x", "unknown file extension"),
        ("rows", "x", "unknown file extension"),
        ("rows.parquet.gz", "x", "unknown file extension"),
        ("rows.tsv", "", "is empty"),
        ("rows.tsv.gz", "", "is empty"),
        ("rows.tsv", "\n\n", "is empty"),
        ("rows.csv", "\ntext,label\na,b\n", "line 1 is blank, but must name the columns"),
        ("rows.csv", ",\na,b\n", "line 1 is blank, but must name the columns"),
        ("rows.tsv", "sentence\tlabel\n", "holds no rows"),
        ("rows.csv", "sentence,label\n", "holds no rows"),
        ("rows.tsv", "sentence\tlabel\na\t1\nb\n", "line 3: 1 fields, but the header has 2 ('sentence', 'label')"),
        ("rows.csv", "sentence,label\na,1\nb,c,0\n", "line 3: 3 fields, but the header has 2"),
        ("rows.csv", 'sentence,label\na,1\n"b,0\n', "the row that starts on line 3 is not csv"),
        ("rows.tsv", "label\tlabel\na\t1\n", "column 'label' appears twice"),
        ("rows.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}\n', "line 2: the key 'b' appears twice; keep one of them"),
        ("rows.tsv", b"sentence\tlabel\na\t1\nb\0\t0\n", "line 3: NUL byte at offset 20"),
        ("rows.tsv.gz", b"sentence\tlabel\na\t1\ncaf\xe9\t0\n", "line 3: byte 0xe9 at offset 22 is not UTF-8"),
        ("rows.csv", "text,label\na,1\n".encode("utf-16"), "is UTF-16"),
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', "line 2: list, wanted one JSON object per line"),
        ("rows.parquet", "PAR1 and nothing else", "not a readable parquet file"),
        ("rows.tsv", gzip.compress(b"text\na\n", mtime=0), "holds gzip data; name it rows.tsv.gz"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(Refused) as refusal:
        read_file(path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_too_much_text(tmp_path, monkeypatch, compressed):
    """A small .gz is unpacked only up to the limit."""
    monkeypatch.setattr(files, "MOST_BYTES", 2**16)
    content = tsv().encode()
    assert read_file(write(tmp_path, f"a.tsv{compressed}", content)).rows
    for data in (content + b"a text\t1\n" * 2**16, content + b"x" * 2**20):
        with pytest.raises(Refused, match=r"b.tsv.* holds more than 0 GiB of text; give a part of it"):
            read_file(write(tmp_path, f"b.tsv{compressed}", data))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 2**22)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(2**27)))
    tracemalloc.start()
    with pytest.raises(Refused, match="holds more than"):
        read_file(path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_a_line_that_is_too_long(tmp_path, monkeypatch, compressed):
    monkeypatch.setattr(files, "MOST_LINE_BYTES", 2**10)
    lines = [b"sentence\tlabel", *[b"%d\t1" % number for number in range(2000)], b"x" * 1022 + b"\t1"]
    with pytest.raises(Refused, match="line 2003: longer than the 0 MiB that a text may have"):
        read_file(write(tmp_path, f"b.tsv{compressed}", b"\n".join([*lines, b"x" * 1023 + b"\t1", b"a\t1"])))
    assert len(read_file(write(tmp_path, f"a.tsv{compressed}", b"\n".join(lines))).rows) == 2001


def test_a_file_that_does_not_fit_the_memory(tmp_path, monkeypatch):
    def no_memory(path):
        raise MemoryError

    monkeypatch.setattr(files, "read_bytes", no_memory)
    with pytest.raises(Refused, match="not enough memory"):
        read_file(write(tmp_path, "a.tsv", tsv().encode()))


@pytest.mark.parametrize(("kind", "form"), [("tsv", tsv), ("csv", csv_text), ("jsonl", jsonl)])
def test_text_is_decoded_in_pieces_that_change_nothing(tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr(files, "_BYTES_A_READ", 16)
    rows = [{"sentence": f"naive \u2028 {number}", "label": "1"} for number in range(40)]
    ends = form(rows).replace("\n", "\r\n")
    assert read_file(write(tmp_path, f"rows.{kind}", b"\xef\xbb\xbf" + ends.encode())).rows == rows
    lines = form(rows).encode().split(b"\n")
    lines[31] = lines[31].replace(b"naive", b"na\xffve")
    bad = b"\n".join(lines)
    for start in (b"", b"\xef\xbb\xbf"):
        path, place = write(tmp_path, f"bad.{kind}", start + bad), len(start) + bad.index(b"\xff")
        with pytest.raises(Refused, match=f"line 32: byte 0xff at offset {place} is not UTF-8"):
            read_file(path)


def test_quoted_newlines_at_the_ends_of_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BYTES_A_READ", 4)
    texts = [f"{'one' * number}\n\r\ntwo\r" for number in range(9)]
    path = write(tmp_path, "rows.csv", "text,label\n" + "".join(f'"{text}",1\r\n' for text in texts))
    source = read_file(path)
    assert [row["text"] for row in source.rows] == texts
    # each text has three kinds of line end, and its row ends with one more
    assert list(source.lines) == list(range(2, 2 + 4 * 9, 4))


def test_memory_of_a_file_is_a_few_times_its_size(tmp_path):
    """With one character beyond the basic plane, each str of the whole file would take four bytes per character."""
    content = tsv([{"sentence": f"{number} " + "word " * 60, "label": "1"} for number in range(10_000)]).encode()
    path = write(tmp_path, "rows.tsv", content + "\U0001f3ac\t1\n".encode())
    tracemalloc.start()
    source = read_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.rows[10_000] == {"sentence": "\U0001f3ac", "label": "1"}
    # the bytes twice (their end is cut) or once with a string per row, and a block of four bytes per character
    assert peak < 5 * len(content)


def test_a_table_is_a_list_of_rows():
    table = files.Table({"a": [1, 2], "b": [None, "x"]})
    rows = [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    assert table == rows and list(table) == rows and [table[0], table[-1]] == rows and len(table) == 2
    assert table != rows[:1]
    assert not files.Table({}) and not files.Table({"a": []})
    assert files.rows_sha256(table) == files.rows_sha256(rows)


def test_broken_gzip(tmp_path):
    whole = gzip.compress(tsv().encode() * 50)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # inside the CRC
    for data in (whole[:-9], whole[: len(whole) // 2], bytes(flipped), b"no gzip at all"):
        path = tmp_path / "rows.tsv.gz"
        path.write_bytes(data)
        with pytest.raises(Refused, match="broken gzip"):
            read_file(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(Refused, match=r"none\.tsv: no such file; check the path$"):
        read_file(tmp_path / "none.tsv")
    (tmp_path / "reviews.tsv").touch()
    with pytest.raises(
        Refused, match=r"reviws\.tsv: no such file \(did you mean '.*/reviews\.tsv'\?\); check the path$"
    ):
        read_file(tmp_path / "reviws.tsv")
    with pytest.raises(Refused, match=r"tests\.tsv: no such file; check the path$"):  # only the suffix is similar
        read_file(tmp_path / "tests.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(Refused, match="is a folder"):
        read_file(tmp_path / "folder.tsv")


def test_wrong_columns_name_both_sides(tmp_path):
    headless = "a very long first line that was meant to be a row of text\t1\nb\t0\n"
    source = read_file(write(tmp_path, "rows.tsv", headless))
    with pytest.raises(
        Refused, match=r"no column for the texts, 'sentence' \(or 'text'\); found 'a very long first line that was m"
    ):
        find_column(source, ("sentence", "text"), "the texts")
    source = read_file(write(tmp_path, "typo.tsv", "text\tLabel\na\t1\n"))
    with pytest.raises(Refused, match=r"for the labels, 'label'; found 'text', 'Label' \(did you mean 'Label'\?\)$"):
        find_column(source, ("label",), "the labels")


def test_another_separator_is_named(tmp_path):
    with pytest.raises(
        Refused, match=r"rows\.csv: this file seems to be separated by ';': .*'message;team'; save it with ','"
    ):
        read_file(write(tmp_path, "rows.csv", "message;team\na, b;c\n"))
    with pytest.raises(Refused, match=r"separated by a tab: .* or name it \.tsv$"):
        read_file(write(tmp_path, "rows.csv", "message\tteam\na\tc\n"))
    with pytest.raises(Refused, match=r"separated by ',': .*; save it with a tab between the columns, or name it"):
        read_file(write(tmp_path, "rows.tsv", "message,team\na,c\n"))


def test_changed_file_is_named(tmp_path):
    path = write(tmp_path, "rows.tsv", tsv())
    wanted = read_file(path).record["sha256"]
    require_file_sha256(path, wanted)
    path.write_text(tsv() + "more\t1\n")
    with pytest.raises(Refused, match=r"rows\.tsv has changed"):
        require_file_sha256(path, wanted)
