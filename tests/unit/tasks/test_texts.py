"""Rows to examples: stripped, numbered, and refused with their line."""

import pytest

from zerotune.errors import Refused
from zerotune.tasks.files import Source
from zerotune.tasks.splits import Example
from zerotune.tasks.texts import make_examples

LABELS = ("negative", "positive")


def source_of(*rows):
    return Source("rows.tsv", list(rows), list(range(2, len(rows) + 2)), {})


def test_examples_are_stripped_and_numbered_from_zero():
    rows = source_of({"text": " warm ", "label": "1"}, {"text": "dull", "label": "0"})
    assert make_examples(rows, "train", "text", "label", LABELS) == [
        Example("train-0", "warm", 1),
        Example("train-1", "dull", 0),
    ]
    assert [row.label for row in make_examples(rows, "test", "text", None, LABELS)] == [None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \t", "line 3: empty text"),
        (None, "line 3: the text is NoneType"),
        (5, "line 3: the text is int"),
        ("a\0b", "line 3: the text holds a NUL"),
        ("a\ud800", "line 3: the text holds half of a surrogate pair"),
    ],
)
def test_bad_texts_are_refused_with_their_line(text, message):
    rows = source_of({"text": "warm", "label": 1}, {"text": text, "label": 0})
    with pytest.raises(Refused, match=message):
        make_examples(rows, "train", "text", "label", LABELS)


def test_partly_labelled_source_is_refused():
    rows = source_of({"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": "c"})
    with pytest.raises(Refused, match="line 3: no label, as in 2 of 3 rows"):
        make_examples(rows, "train", "text", "label", LABELS)
