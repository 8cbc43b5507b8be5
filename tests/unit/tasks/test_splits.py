"""Test the split functions: golden draws, stratification, repeats, and slices of whole sentences."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerotune.errors import Refused
from zerotune.tasks.phrases import PhraseIndex
from zerotune.tasks.splits import (
    Example,
    balanced_subset,
    count_repeats,
    describe,
    draw_validation_sentences,
    ids_sha256,
    normalise_text,
    sentence_slice_size,
    stratified_split,
    stratified_subset,
    whole_sentences,
    without_phrases_of,
    without_texts_of,
)

LABELS = ("negative", "positive")


def examples(texts, labels=None):
    labels = labels or [position % 2 for position in range(len(texts))]
    return [Example(f"train-{row}", text, label) for row, (text, label) in enumerate(zip(texts, labels, strict=True))]


def ids(rows):
    return [row.id for row in rows]


def test_repeats_and_removal_by_normalised_text():
    rows = examples(["So  Good", "so good", "so good", "café", "cafe\u0301", "bad"], [1, 1, 0, 0, 0, 0])
    assert count_repeats(rows) == {"duplicates": 2, "conflicting_texts": 1}
    assert ids(without_texts_of(rows, examples(["SO GOOD", "Bad"]))) == ["train-3", "train-4"]


def test_an_example_does_not_hold_its_text_twice():
    text = "a warm film"
    same = Example("train-0", text, 1)
    assert same.text is text and same.normalised is text
    assert Example("train-0", "A warm  film", 1).normalised == text
    assert not hasattr(same, "__dict__")


def test_repeats_with_several_labels_are_counted_once_a_text():
    rows = examples(["a", "a", "A", "a", "b", "b", "b"], [0, 1, 2, 1, 3, 3, 3])
    assert count_repeats(rows) == {"duplicates": 3, "conflicting_texts": 1}


def test_draws_are_pinned():
    """Golden values recorded from this code: a change here changes every user's splits."""
    rows = examples([f"text {number}" for number in range(10)])
    assert ids(stratified_subset(rows, 4, 0, "test")) == ["train-1", "train-4", "train-5", "train-6"]
    assert ids(balanced_subset(rows, 3, 7, "--train-size")) == ["train-1", "train-2", "train-8"]


def test_ids_hash_is_that_of_sorted_lines():
    """Golden: printf 'train-0\\ntrain-1' | sha256sum."""
    golden = "6c65eb6a552041e84f90235d94be3a176d244f1a3dcc5e628f9b8617bb4a0dd7"
    assert ids_sha256(examples(["a", "b"])) == ids_sha256(examples(["a", "b"])[::-1]) == golden


@settings(max_examples=60, deadline=None)
@given(
    num_negative=st.integers(1, 40), num_positive=st.integers(1, 40), share=st.floats(0.05, 0.9), seed=st.integers(0, 9)
)
def test_stratified_split_is_a_partition_with_the_shares_of_the_whole(num_negative, num_positive, share, seed):
    labels = [0] * num_negative + [1] * num_positive
    rows = examples([str(number) for number in range(len(labels))], labels)
    rest, drawn = stratified_split(rows, share, seed, "test")
    assert sorted(ids(rest) + ids(drawn)) == sorted(ids(rows))
    assert len(drawn) == min(round(len(rows) * share), len(rows) - 2)  # at least one of each label stays
    assert {row.label for row in rest} == {0, 1}
    assert [row for row in rows if row in drawn] == drawn
    found = Counter(row.label for row in drawn)
    for label, count in ((0, num_negative), (1, num_positive)):
        # rounding keeps it within 1 of proportional; it is at least 1 if two or more rows are drawn
        assert abs(found[label] - count * len(drawn) / len(rows)) <= 1
        assert found[label] >= 1 or len(drawn) < 2 or count == 1


def test_seeds_and_purposes_draw_differently():
    rows = examples([str(number) for number in range(200)])
    draws = [(seed, purpose) for seed in (0, 1) for purpose in ("test", "choose")]
    assert len({tuple(ids(stratified_subset(rows, 20, *draw))) for draw in draws}) == 4


def test_balanced_subset_refuses_a_rare_label():
    rows = examples(list("abcdef"), [0, 0, 0, 0, 1, 1])
    assert Counter(row.label for row in balanced_subset(rows, 4, 0, "--test-size")) == {0: 2, 1: 2}
    with pytest.raises(Refused, match=r"--test-size 6: .* needs 3 rows of each label, but the rarest has 2; .* most 4"):
        balanced_subset(rows, 6, 0, "--test-size")


def test_whole_sentences_count_repeats_once_and_leave_conflicts_out():
    rows = examples(["A warm film", "warm film", "a warm film", "so dull", "so dull"], [1, 1, 1, 0, 1])
    index = PhraseIndex(row.normalised for row in rows)
    assert ids(whole_sentences(rows, index)) == ["train-0"]
    assert ids(without_phrases_of(rows, rows[:1], index)) == ["train-3", "train-4"]


def test_a_slice_of_whole_sentences_takes_its_phrases_along():
    generator = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    sentences = [" ".join(generator.choices(words, k=8)) for _ in range(100)]
    phrases = [" ".join(sentence.split()[2:5]) for sentence in sentences]
    rows = examples(sentences + phrases, [number % 2 for number in range(100)] * 2)
    train, chosen, note = draw_validation_sentences(rows, 0)
    assert note == "20 of the 100 whole sentences of train are set aside for validation"
    assert len(chosen) == sentence_slice_size(200, 100) == 20
    assert len(train) == 160
    assert not any(f" {row.text} " in f" {sentence.text} " for row in train for sentence in chosen)
    _, balanced, _ = draw_validation_sentences(rows, 0, balanced_size=6)
    assert Counter(row.label for row in balanced) == {0: 3, 1: 3}


@pytest.mark.parametrize(
    ("num_rows", "num_whole", "size"), [(67349, 6885, 872), (2000, 2000, 200), (10, 10, 2), (500, 40, 10)]
)
def test_sentence_slice_size(num_rows, num_whole, size):
    assert sentence_slice_size(num_rows, num_whole) == size


def test_describe_counts_unlabelled_rows_apart():
    assert describe(examples(["a", "b", "c"], [1, 1, 0]), LABELS)["labels"] == {"negative": 1, "positive": 2}
    assert describe(examples(["a"], [None]), LABELS)["labels"] == {"unlabelled": 1}


def test_normalise_text():
    assert normalise_text(" Warm\t\u00a0FILM\n") == "warm film"
