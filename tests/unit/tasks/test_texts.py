"""Test turning rows into examples: stripped, numbered, and refused with their line."""

import pytest

from zerotune.errors import Refused
from zerotune.tasks.files import Source
from zerotune.tasks.splits import Example
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import make_examples


def source_of(*rows):
    return Source("rows.tsv", list(rows), list(range(2, len(rows) + 2)), {})


def test_examples_are_stripped_and_numbered_from_zero():
    rows = source_of({"text": " warm ", "label": "1"}, {"text": "dull", "label": "0"})
    assert make_examples(SST2, rows, "train", needs_labels=True) == [
        Example("train-0", "warm", 1),
        Example("train-1", "dull", 0),
    ]
    unlabelled = source_of({"text": "warm"}, {"text": "dull"})
    assert [row.label for row in make_examples(SST2, unlabelled, "test", needs_labels=False)] == [None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \t", "line 3: empty text"),
        (None, "line 3: empty text"),
        (5, "line 3: the text is int, wanted a string: correct the row$"),
        ("a\0b", "line 3: the text holds a NUL"),
        ("a\ud800", "line 3: the text holds half of a surrogate pair"),
    ],
)
def test_bad_texts_are_refused_with_their_line(text, message):
    rows = source_of({"text": "warm", "label": 1}, {"text": text, "label": 0})
    with pytest.raises(Refused, match=message):
        make_examples(SST2, rows, "train", needs_labels=True)


def test_partly_labelled_source_is_refused():
    rows = source_of({"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": "c"})
    with pytest.raises(Refused, match="line 3: no label, as in 2 of 3 rows"):
        make_examples(SST2, rows, "train", needs_labels=True)


@pytest.mark.parametrize("column", ["index", "idx"])
def test_an_unlabelled_row_keeps_its_own_index(column):
    rows = source_of({"text": "warm", column: " 7"}, {"text": "dull", column: 3}, {"text": "long", column: 5.0})
    examples = make_examples(SST2, rows, "test", needs_labels=False)
    assert [(one.id, one.index) for one in examples] == [("test-0", "7"), ("test-1", "3"), ("test-2", "5")]


def test_a_labelled_row_needs_no_index():
    rows = source_of({"text": "warm", "label": 1, "index": ""}, {"text": "dull", "label": 0, "index": ""})
    assert [one.index for one in make_examples(SST2, rows, "test", needs_labels=True)] == [None, None]


@pytest.mark.parametrize(
    ("value", "words"),
    [(7, "the index 7 occurs twice"), ("", "line 3: the index is '', wanted"), (None, "line 3: the index is None"),
     ("8\t9", "line 3: the index is")],
)  # fmt: skip
def test_an_index_that_no_submission_could_have(value, words):
    rows = source_of({"text": "warm", "index": 7}, {"text": "dull", "index": value})
    with pytest.raises(Refused, match=words):
        make_examples(SST2, rows, "test", needs_labels=False)
