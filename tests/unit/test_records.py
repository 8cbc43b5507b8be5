"""Test reading records back: an error is one line with the file, the key, and the values found and wanted."""

import json
from typing import Literal, NotRequired

import pytest
from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.files import parse_json, read_json, read_json_lines
from zerotune.records import Count, check_record, record_problem


class Part(TypedDict, closed=True):
    name: str


class Record(TypedDict):
    step: Count
    state: Literal["running", "finished"]
    best: NotRequired[float | None]
    parts: NotRequired[list[Part]]
    label: NotRequired[int | list[str] | None]


WHOLE = {"step": 3, "state": "running", "best": 1, "parts": [{"name": "a"}], "of_a_later_version": [None]}


def test_a_whole_record_is_returned_as_it_is():
    assert check_record(WHOLE, Record, "x.json") is WHOLE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "3"}, r"\(step is '3', wanted a valid integer\)"),
        ({"step": True}, r"\(step is True, wanted a valid integer\)"),
        ({"step": -1}, r"\(step is -1, wanted greater than or equal to 0\)"),
        ({"step": 10**30}, r"\(step is 10+, wanted less than or equal to 9223372036854775807\)"),
        ({"state": "lost"}, r"\(state is 'lost', wanted 'running' or 'finished'\)"),
        ({"best": True}, r"\(best is True, wanted a valid number\)"),
        ({"parts": {"name": "a"}}, r"\(parts is {'name': 'a'}, wanted a valid list\)"),
        ({"parts": [{"name": "a"}, {"name": 7}]}, r"\(parts.1.name is 7, wanted a valid string\)"),
        ({"label": "a"}, r"\(label is 'a', wanted a valid integer or a valid list\)"),
        ({"label": [7]}, r"\(label is \[7\], wanted a valid integer\)"),
        ({"parts": [{"name": "a", "size": 1}]}, r"\(parts.0.size is not known\)"),
        ({"parts": [{}]}, r"\(parts.0.name is missing\)"),
    ],
)
def test_the_key_that_is_wrong_is_named_with_its_value(changes, words):
    with pytest.raises(Refused, match=f"x.json is damaged {words}: restore it"):
        check_record(WHOLE | changes, Record, "x.json")


def test_a_long_value_is_shown_in_part():
    assert len(record_problem(WHOLE | {"step": "7" * 10_000}, Record)) < 150


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": NaN}', "NaN is not a JSON number"),
        ('{"step": -Infinity}', "-Infinity is not a JSON number"),
        ('{"step": 1e400}', "1e400 is not a JSON number"),
        ('{"step": ' + "9" * 400 + "}", "is not a JSON number"),
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 60 + "1" + "}" * 60, "nested more than"),
        (r'{"step": "\ud800"}', "surrogates not allowed"),
        ('{"step": 1', "Expecting"),
        ("[]", r"it is \[\], wanted a valid dictionary"),
    ],
)
def test_json_of_ours_is_finite_flat_and_unicode(tmp_path, text, words):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(Refused, match=words) as refusal:
        read_json(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    path.write_text(f"{json.dumps(WHOLE)}\n{text}\n")
    with pytest.raises(Refused, match=f"record.json line 2 is damaged .*{words}"):
        read_json_lines(path)


def test_json_that_is_unusual_and_right():
    wide = [[each] for each in range(1000)]
    assert parse_json(json.dumps(wide)) == wide
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600" and parse_json("1e300") == 1e300
