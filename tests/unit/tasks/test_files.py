"""Reading rows: every format gives the same rows, and what cannot be read is refused by name and line."""

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
    assert source.where(0) == f"{path} row 0"


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
        ("rows.tsv", "sentence\tlabel\n", "holds no rows"),
        ("rows.csv", "sentence,label\n", "holds no rows"),
        ("rows.tsv", "sentence\tlabel\na\t1\nb\n", "line 3: 1 fields, but the header has 2 ('sentence', 'label')"),
        ("rows.csv", "sentence,label\na,1\nb,c,0\n", "line 3: 3 fields, but the header has 2"),
        ("rows.csv", 'sentence,label\na,1\n"b,0\n', "the row that starts on line 3 is not csv"),
        ("rows.tsv", "label\tlabel\na\t1\n", "column 'label' appears twice"),
        ("rows.tsv", b"sentence\tlabel\na\t1\nb\0\t0\n", "line 3: NUL byte at offset 20"),
        ("rows.tsv.gz", b"sentence\tlabel\na\t1\ncaf\xe9\t0\n", "line 3: byte 0xe9 at offset 22 is not UTF-8"),
        ("rows.csv", "text,label\na,1\n".encode("utf-16"), "is UTF-16"),
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', "line 2: list, wanted one JSON object per line"),
        ("rows.parquet", "PAR1 and nothing else", "not a readable parquet file"),
        ("rows.tsv", gzip.compress(b"text\na\n"), "holds gzip data; name it rows.tsv.gz"),
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
    """A small .gz is unpacked no further than the limit."""
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
    with pytest.raises(Refused, match="line 2003: longer than 0 MiB, which no text is"):
        read_file(write(tmp_path, f"b.tsv{compressed}", b"\n".join([*lines, b"x" * 1023 + b"\t1", b"a\t1"])))
    assert len(read_file(write(tmp_path, f"a.tsv{compressed}", b"\n".join(lines))).rows) == 2001


def test_a_file_that_does_not_fit_the_memory(tmp_path, monkeypatch):
    def no_memory(path):
        raise MemoryError

    monkeypatch.setattr(files, "read_bytes", no_memory)
    with pytest.raises(Refused, match="not enough memory"):
        read_file(write(tmp_path, "a.tsv", tsv().encode()))


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
    with pytest.raises(Refused, match="no such file"):
        read_file(tmp_path / "none.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(Refused, match="is a folder"):
        read_file(tmp_path / "folder.tsv")


def test_wrong_columns_name_both_sides(tmp_path):
    headless = "a very long first line that was meant to be a row of text\t1\nb\t0\n"
    source = read_file(write(tmp_path, "rows.tsv", headless))
    with pytest.raises(Refused, match=r"found 'a very long first line that was meant\.\.\.', '1'; wanted sentence"):
        find_column(source, ("sentence", "text"), "sentence and label")


def test_changed_file_is_named(tmp_path):
    path = write(tmp_path, "rows.tsv", tsv())
    wanted = read_file(path).record["sha256"]
    require_file_sha256(path, wanted)
    path.write_text(tsv() + "more\t1\n")
    with pytest.raises(Refused, match=r"rows\.tsv has changed"):
        require_file_sha256(path, wanted)
