"""Test drawing rows with any number of labels: the size, the labels' shares, and that nothing else affects the draw."""

from collections import Counter

import numpy as np
import pytest

from zerotune.tasks.splits import Example, draw_validation, stratified_split, stratified_subset
from zerotune.tasks.stratification import draw_iteratively


def drawn_sets(label_sets, size):
    return [label_sets[position] for position in draw_iteratively(label_sets, size, range(len(label_sets)))]


def random_sets(num_rows, probabilities, seed):
    held = np.random.default_rng(seed).random((num_rows, len(probabilities))) < probabilities
    return [tuple(np.flatnonzero(row).tolist()) for row in held]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_each_label_has_its_share_and_the_size_is_exact(share):
    """In a random draw, the rarest of these labels would miss its share by more than 1 four times out of ten."""
    for seed in range(10):
        sets = random_sets(1000, [0.3, 0.1, 0.05, 0.03], seed)
        drawn = drawn_sets(sets, round(1000 * share))
        assert len(drawn) == round(1000 * share)
        wanted, found = (Counter(label for each in part for label in each) for part in (sets, drawn))
        assert all(abs(found[label] - share * wanted[label]) <= 1.5 for label in range(4)), (wanted, found)


def test_by_hand():
    """Label 1 is the rarer: its first row goes to the larger part, its second to the other. Both parts then lack
    equally much of it; its third goes to the rest, which needs more rows. Label 0's rows alternate, the drawn first."""
    sets = [(0, 1), (1,), (1,), (0,), (0,), (0,), (0,)]
    assert draw_iteratively(sets, 3, range(7)) == [1, 3, 5]
    assert draw_iteratively(sets, 3, reversed(range(7))) == [1, 4, 6]


def test_all_rows_or_none_and_rows_without_a_label():
    sets = [(0,), (1,), (), ()]
    assert draw_iteratively(sets, 0, range(4)) == [] and draw_iteratively(sets, 4, range(4)) == [0, 1, 2, 3]
    assert len(draw_iteratively([()] * 10, 3, range(10))) == 3


def examples_of(sets):
    return [Example(f"train-{number}", f"text {number}", labels) for number, labels in enumerate(sets)]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_leaves_a_row_of_each_label(seed):
    """Labels 2, 3 and 4 are in one row each, which stays. These rows fill label 0's share of the rest, so its two other
    rows, the only ones with label 1, would both be drawn."""
    examples = examples_of([(0, 2), (0, 3), (0, 4), (0, 1), (0, 1), *[(5,)] * 15])
    as_drawn = stratified_subset(examples, 8, seed, "test")
    assert sum(1 in row.labels for row in as_drawn) == 2
    rest, drawn = stratified_split(examples, 0.4, seed, "test")
    assert {label for row in rest for label in row.labels} == set(range(6))
    assert sum(1 in row.labels for row in rest) == 1 and len(drawn) == 7
    assert sorted(row.id for row in (*rest, *drawn)) == sorted(row.id for row in examples)
    rest, drawn, _ = draw_validation(examples, seed, None, 0.4)
    assert {label for row in rest for label in row.labels} == set(range(6)) and len(drawn) == 7


def test_a_draw_depends_on_seed_and_purpose_alone():
    examples = examples_of(random_sets(200, [0.4, 0.2, 0.1], 3))
    ids = [
        [row.id for row in stratified_subset(examples, 50, seed, purpose)]
        for seed, purpose in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert ids[0] == ids[1] and len({tuple(each) for each in ids}) == 3
