"""The best spans against every span there is."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerotune.squad.span_selection import ABSENT, null_scores, question_spans, window_spans


def every_span(logits, column, count, longest):
    """(score, first, last) of all spans of one window, best first."""
    start, end = logits[:, 0], logits[:, 1]
    pairs = itertools.product(range(column, column + count), repeat=2)
    spans = [((start[i] + end[j]).item(), i, j) for i, j in pairs if i <= j < i + longest]
    return sorted(spans, key=lambda span: -span[0])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 12), st.integers(1, 20))
def test_the_best_spans_of_windows_are_those_of_all_spans(seed, num_columns, longest, num_best):
    generator = np.random.RandomState(seed)
    logits = torch.from_numpy(generator.permutation(6 * num_columns).reshape(3, num_columns, 2) ** 1.5).float()
    columns = generator.randint(0, num_columns, 3)
    counts = np.array([generator.randint(0, num_columns - column + 1) for column in columns])
    places = torch.from_numpy(columns), torch.from_numpy(counts)
    scores, first, last = window_spans(logits, *places, num_best, longest)
    assert scores.shape == first.shape == last.shape == (3, num_best)
    for window in range(3):
        expected = every_span(logits[window], columns[window], counts[window], longest)
        exists = scores[window] > ABSENT
        assert exists.sum() == min(num_best, len(expected))
        assert scores[window][exists].tolist() == [span[0] for span in expected[:num_best]]
        for score, i, j in zip(*(each[window][exists].tolist() for each in (scores, first, last)), strict=True):
            assert (score, i, j) in expected
        assert (scores[window][~exists] == ABSENT).all()


def test_padding_question_and_no_answer_are_never_chosen():
    logits = torch.zeros(1, 8, 2)
    logits[0, [0, 1, 6, 7]] = 100.0
    logits[0, 4] = 1.0
    scores, first, last = window_spans(logits, torch.tensor([2]), torch.tensor([4]), 1, 3)
    assert (scores.item(), first.item(), last.item()) == (2.0, 4, 4)


def test_a_span_ends_no_earlier_than_it_begins_and_is_no_longer_than_asked():
    logits = torch.zeros(1, 8, 2)
    logits[0, 4, 0], logits[0, 1, 1], logits[0, 0, 0], logits[0, 7, 1] = 9.0, 8.0, 5.0, 5.5
    for longest, expected in ((1, (9, 4, 4)), (2, (13, 0, 1)), (4, (14.5, 4, 7)), (99, (14.5, 4, 7))):
        found = window_spans(logits, torch.tensor([0]), torch.tensor([8]), 1, longest)
        assert tuple(each.item() for each in found) == expected, "never from 4 back to 1, which would score 17"


def test_spans_of_a_question_are_merged_over_its_windows():
    scores = np.array([[5, 3, 1], [4, 2, ABSENT], [7, ABSENT, ABSENT]], np.float32)
    chars = np.array([[[0, 4], [5, 9], [0, 9]], [[5, 9], [10, 12], [9, 9]], [[3, 4], [0, 0], [0, 0]]])
    best, found = question_spans(np.array([0, 0, 2]), scores, chars, 3)
    assert best.tolist() == [[5, 4, 2], [np.float32(ABSENT)] * 3, [7, np.float32(ABSENT), np.float32(ABSENT)]]
    assert found[0].tolist() == [[0, 4], [5, 9], [10, 12]], "5 … 9 once, with the better of its scores"
    assert found[2].tolist() == [[3, 4], [-1, -1], [-1, -1]] and (found[1] == -1).all()


def test_of_equal_spans_the_earlier_and_the_shorter_come_first():
    chars = np.array([[[5, 9], [0, 8], [0, 4]]])
    _, found = question_spans(np.array([0]), np.ones((1, 3), np.float32), chars, 1)
    assert found[0].tolist() == [[0, 4], [0, 8], [5, 9]]


def test_the_null_score_is_that_of_the_window_surest_of_an_answer():
    assert null_scores(np.array([0, 0, 1, 2, 2]), np.array([3.0, -1.0, 2.0, 0.0, 5.0])).tolist() == [-1, 2, 0]
