"""Test labels: the ways to write one, and rows that lack one."""

import math

import pytest

from zerotune.errors import Refused
from zerotune.tasks.labels import count_line, parse_label, parse_own_label, require_labels
from zerotune.tasks.splits import Example

LABELS = ("negative", "positive")


def examples(labels):
    return [Example(f"train-{row}", "text", label) for row, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *[(0, 0), (1, 1), ("0", 0), (" 1 ", 1), ("Positive", 1), ("neg", 0)],
        *[(None, None), ("", None), (-1, None), ("-1", None)],
    ],
)
def test_labels(value, label):
    assert parse_label(value, LABELS, "here") == label


@pytest.mark.parametrize("value", [2, "2", -2, "good", 1.0, True, math.nan, [1]])
def test_unknown_labels_are_refused_with_place_and_value(value):
    with pytest.raises(Refused, match=r"rows\.tsv line 7: unknown label .*wanted 0 \(negative\) or 1 \(positive\)"):
        parse_label(value, LABELS, "rows.tsv line 7")


def test_half_of_a_surrogate_pair_is_no_label():
    with pytest.raises(Refused, match=r"line 3: the label holds half of a surrogate pair"):
        parse_own_label("x\ud83d", ("x",), "line 3")


def test_a_mistyped_label_gets_the_nearest_one():
    with pytest.raises(Refused, match=r"unknown label 'postive' \(did you mean 'positive'\?\); wanted"):
        parse_label("postive", LABELS, "here")
    with pytest.raises(Refused, match=r"unknown label 'Biling' \(did you mean 'billing'\?\); the 2 labels are"):
        parse_own_label("Biling", ("billing", "returns"), "here")


def test_one_class_only_and_no_labels_are_refused():
    one_class = examples([1, 1])
    with pytest.raises(Refused, match="train: none of 2 rows is 'negative'; do this"):
        require_labels(one_class, "train", LABELS, "do this")
    require_labels(one_class, "validation", LABELS, "do this", every=False)
    with pytest.raises(Refused, match="no labels"):
        require_labels(examples([None]), "train", LABELS, "do this")
    with pytest.raises(Refused, match="no rows"):
        require_labels([], "train", LABELS, "do this")


def test_a_label_with_a_comma_is_one_in_a_list():
    line = count_line({"access": 1158, "hardware": 151, "question, other": 162})
    assert line == '3 labels, with their training rows: access (1,158), hardware (151), "question, other" (162)'
