"""Test writing predictions: formats, and an output that is continued, refused or finished."""

import csv
import gzip
import io
import json
import math
import resource
from contextlib import suppress
from datetime import UTC, datetime

import pyarrow
import pyarrow.parquet
import pytest

from zerotune.errors import Refused
from zerotune.prediction import output
from zerotune.prediction.output import (
    FileOutput,
    JsonLines,
    Table,
    check_input,
    check_output,
    check_writable,
    output_format,
    readable_line,
)
from zerotune.tasks.row_stream import RowDigest, RowStream

IDENTITY = {"input": "1", "model": "2"}


def stream(kind="jsonl", columns=("text",), schema=None):
    return RowStream("rows", kind, list(columns), iter(()), lambda: None, schema)


# --- formats ---


def test_json_lines_hold_what_the_input_held():
    rows = [{"text": "ä\u2028", "n": [1.5, float("nan")], "t": datetime(2026, 1, 2, tzinfo=UTC)}, {"text": "\ud800"}]
    first, second = JsonLines().encode(rows).decode().split("\n")[:2]
    assert json.loads(first) == {"text": "ä\u2028", "n": [1.5, None], "t": "2026-01-02 00:00:00+00:00"}
    assert json.loads(second) == {"text": "\ud800"} and "ä" in first


def test_a_csv_quotes_and_writes_what_is_no_text_as_json():
    table = Table(["text", "n", "m"], is_tsv=False)
    data = table.start() + table.encode([{"text": 'a,"b"\n', "n": {"x": 1}}, {"text": "b", "n": True, "m": 0.5}])
    data += table.encode([{"text": "first\rsecond"}])
    rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
    assert rows == [
        ["text", "n", "m"],
        ['a,"b"\n', '{"x": 1}', ""],
        ["b", "true", "0.5"],
        ["first\rsecond", "", ""],
    ]
    with pytest.raises(Refused, match=r"the first rows have no column 'z': use an --output \.jsonl"):
        table.encode([{"z": 1}])


def test_infinity_stays_a_word_in_a_table():
    rows = [{"a": float(value)} for value in ("inf", "-inf", "nan")]
    assert Table(["a"], is_tsv=True).encode(rows) == b"inf\n-inf\n\n"


def test_a_tsv_takes_no_tab_and_no_line_end():
    table = Table(["text"], is_tsv=True)
    assert table.start() + table.encode([{"text": 'a "b"'}]) == b'text\na "b"\n'
    for text in ("a\tb", "a\nb"):
        with pytest.raises(Refused, match=r"use an --output \.csv"):
            table.encode([{"text": text}])


def test_a_parquet_output_has_the_types_of_its_input(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string()), ("when", pyarrow.date32()), ("n", pyarrow.int8())])
    names = ["prediction", "probability", "top_k"]
    made = output_format(tmp_path / "a.parquet", stream("parquet", schema.names, schema), [], names, False)
    assert (
        made.schema.field("when").type == pyarrow.date32()
        and made.schema.field("probability").type == pyarrow.float64()
    )
    made = output_format(tmp_path / "a.parquet", stream("csv", ["text", "n"]), [], names, True)
    assert (
        made.schema.field("n").type == pyarrow.string() and made.schema.field("top_k").type.value_type.num_fields == 3
    )
    made = output_format(tmp_path / "a.parquet", stream("jsonl", ["n"]), [{"n": 1}], names, False)
    with pytest.raises(Refused, match=r"has another type .* use an --output \.jsonl"):
        made.encode([{"n": "word"}])


def test_a_parquet_output_loses_no_key_of_an_object(tmp_path):
    rows = [{"meta": {"a": [{"b": 1}]}}]
    made = output_format(tmp_path / "a.parquet", stream("jsonl", ["meta"]), rows, [], False)
    made.encode(rows)
    for late in ({"a": [{"b": 1}], "c": 2}, {"a": [{"b": 1, "c": 2}]}):
        with pytest.raises(Refused, match=r"'meta' has a key 'c' that the first rows lack: use an --output \.jsonl"):
            made.encode([{"meta": late}])


def test_objects_without_a_key_are_refused_for_parquet(tmp_path):
    first = [{"text": "a", "meta": {}}, {"text": "b", "meta": {}}]
    rows = stream("jsonl", ["text", "meta"])
    with pytest.raises(Refused, match=r"a column that parquet cannot store \(.*meta.*\): use an --output .jsonl"):
        output_format(tmp_path / "a.parquet", rows, first, ["prediction"], False)


def test_infinity_in_a_map_becomes_null():
    """pyarrow reads a parquet file's map as a list of pairs."""
    assert JsonLines().encode([{"map": [("k", math.inf), ("l", 1.0)]}]) == b'{"map": [["k", null], ["l", 1.0]]}\n'


def test_an_unknown_extension_is_refused_before_anything_else(tmp_path):
    with pytest.raises(Refused, match="unknown file extension"):
        check_output(tmp_path / "a.txt")


# --- a file ---


def write(path, rows, stop_after=None):
    """Write rows one by one to an output, up to `stop_after`; return it."""
    out = FileOutput(path, IDENTITY)
    out.open(output_format(path, stream(columns=["text"]), [{"text": "a"}], ["prediction"], False))
    for row in rows[out.rows : stop_after]:
        out.add([row], [row])
    out.save()
    return out


ROWS = [{"text": text, "prediction": "x"} for text in "abcdef"]


@pytest.mark.parametrize("extension", ["csv", "tsv.gz", "jsonl", "parquet"])
def test_an_output_in_two_parts_is_the_same_as_in_one(tmp_path, extension):
    whole, parts = tmp_path / f"whole.{extension}", tmp_path / f"parts.{extension}"
    write(whole, ROWS).finish()
    first = write(parts, ROWS, 4)
    with first._file as file:
        file.write(b"torn")
    second = write(parts, ROWS)
    assert second.rows == 6
    second.finish()
    unpack = gzip.decompress if extension.endswith("gz") else bytes
    assert unpack(parts.read_bytes()) == unpack(whole.read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([parts.name, whole.name])


def test_a_part_of_another_input_or_model_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    write(path, ROWS, 2).close()
    check_writable(path, IDENTITY)
    with pytest.raises(Refused, match=r"a.csv.partial was made by a command with different model: delete"):
        check_writable(path, IDENTITY | {"model": "3"})
    (tmp_path / "a.csv.partial").write_bytes(b"t")
    with pytest.raises(Refused, match="is damaged"):
        check_writable(path, IDENTITY)


def test_standard_input_does_not_overwrite_rows_that_can_be_resumed(tmp_path):
    path = tmp_path / "a.csv"
    write(path, ROWS, 2).close()
    before = (tmp_path / "a.csv.partial").read_bytes()
    for refuse in (check_writable, FileOutput):
        with pytest.raises(Refused, match=r"a.csv.partial holds 2 rows of a command that can be resumed: delete"):
            refuse(path, None)
    assert (tmp_path / "a.csv.partial").read_bytes() == before
    write(path, ROWS).finish()
    assert len(path.read_text().splitlines()) == 7


@pytest.mark.parametrize("identity", [None, {"input": "other"}])
def test_who_deletes_the_partial_file_starts_anew(tmp_path, identity):
    """As the refusals advise; the record beside it says nothing then."""
    path = tmp_path / "a.jsonl"
    write(path, ROWS, 2).close()
    (tmp_path / "a.jsonl.partial").unlink()
    check_writable(path, identity)
    out = FileOutput(path, identity)
    out.open(JsonLines())
    out.add(ROWS[:1], ROWS[:1])
    out.close()
    assert (tmp_path / "a.jsonl.partial.json").exists()
    check_writable(path, identity)


def test_standard_input_begins_anew(tmp_path):
    path = tmp_path / "a.csv"
    out = FileOutput(path, None)
    out.open(JsonLines())
    out.add(ROWS[:2], ROWS[:2])
    out.close()
    check_writable(path, None)
    assert FileOutput(path, None).rows == 0 and (tmp_path / "a.csv.partial").stat().st_size == 0


def test_a_file_of_the_users_own_is_not_emptied(tmp_path):
    path, own = tmp_path / "a.csv", tmp_path / "a.csv.partial"
    own.write_text("text\nmine\n")
    for refuse in (check_writable, FileOutput):
        for identity in (None, IDENTITY):
            with pytest.raises(Refused, match=r"a.csv.partial has no a.csv.partial.json beside it, so it may"):
                refuse(path, identity)
    assert own.read_text() == "text\nmine\n"


def test_rows_that_are_predicted_already_must_be_the_same(tmp_path):
    """Later rows may have changed: a bad one has been corrected."""
    path = tmp_path / "a.jsonl"
    out = FileOutput(path, IDENTITY)
    out.open(JsonLines())
    out.add(ROWS[:2], [{"text": "a"}, {"text": "b"}])
    out.save()
    out.close()
    record, same, changed = check_writable(path, IDENTITY), RowDigest(), RowDigest()
    same.add([{"text": "a"}, {"text": "b"}])
    changed.add([{"text": "a"}, {"text": "c"}])
    check_input(path, record, same)
    with pytest.raises(Refused, match=r"a.jsonl.partial was made by a command with different input: delete"):
        check_input(path, record, changed)


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "a.csv"
    out = write(path, ROWS, 2)
    for refuse in (check_writable, FileOutput):
        with pytest.raises(Refused, match="another process is writing"):
            refuse(path, IDENTITY)
    out.close()
    assert FileOutput(path, IDENTITY).rows == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for refuse in (check_writable, FileOutput):
        with pytest.raises(Refused, match="cannot be written"):
            refuse(tmp_path / "file" / "a.csv", IDENTITY)
    with pytest.raises(Refused, match=r"cannot be written \(File name too long\)"):
        check_output(tmp_path / f"{'x' * 250}.csv")
    check_writable(tmp_path / "new" / "deeper" / "a.csv", IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_takes_no_more_is_named_and_the_whole_rows_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    out = write(path, ROWS, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.bytes + 10, limits[1]))
    try:
        out.add([ROWS[1]], [ROWS[1]])
        with pytest.raises(OSError, match="File too large") as failure:
            out.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.filename == str(path)
    with suppress(OSError):
        out.close()
    write(path, ROWS).finish()
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS


def test_categories_are_written_as_categories(tmp_path):
    queue = pyarrow.array(["x", None]).dictionary_encode()
    offsets = pyarrow.array([0, 2, 2])
    nested = {
        "list": pyarrow.ListArray.from_arrays(offsets, queue),
        "large": pyarrow.LargeListArray.from_arrays(offsets.cast("int64"), queue),
        "pair": pyarrow.FixedSizeListArray.from_arrays(pyarrow.concat_arrays([queue, queue]), 2),
        "struct": pyarrow.StructArray.from_arrays([queue], ["of"]),
        "map": pyarrow.MapArray.from_arrays(pyarrow.array([0, 1, 2]), pyarrow.array(["k", "l"]), queue),
    }
    table = pyarrow.table({"text": ["a", "b"], "queue": queue, **nested})
    path = tmp_path / "a.parquet"
    out = FileOutput(path, IDENTITY)
    out.open(output_format(path, stream("parquet", table.schema.names, table.schema), [], ["prediction"], False))
    for row in table.to_pylist():
        out.add([row | {"prediction": "p"}], [row])
    out.finish()
    found = pyarrow.parquet.read_table(path)
    assert found.to_pylist() == [row | {"prediction": "p"} for row in table.to_pylist()]
    assert pyarrow.types.is_dictionary(found.schema.field("queue").type)


def test_the_record_is_written_at_most_every_so_often(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(output, "write_json", lambda path, value: written.append(value["rows"]))
    out = FileOutput(tmp_path / "a.jsonl", IDENTITY)
    out.open(JsonLines())
    for row in ROWS:
        out.add([row], [row])
    assert written == [0, 1]  # SECONDS_BETWEEN_RECORDS have not yet passed
    out.save()
    assert written == [0, 1, 6]


# --- one text ---


def test_a_person_reads_a_line():
    top = [{"label": "good", "probability": 0.75}, {"label": "bad", "probability": 0.25}]
    row = {"text": "a\n film", "prediction": "good", "probability": 0.75}
    assert readable_line(row, "") == "good 0.7500  a film"
    assert readable_line(row | {"top_k": top}, "") == "good 0.7500, bad 0.2500  a film"
    assert readable_line(row | {"prediction": ""}, "") == "(no label) 0.7500  a film"
    assert readable_line({"text": "<br />", "prediction": None, "probability": None}, "") == "(no text)  <br />"
    row = {"question": "q", "z_prediction": "", "z_probability": 0.9, "z_no_answer_probability": 0.9}
    row["z_top_k"] = [{"answer": "in 1240", "start": 3, "probability": 0.1}]
    assert readable_line(row, "z_") == "(no answer) 0.9000, in 1240 0.1000  no answer 0.9000"
