"""Test the batch plan: every id once, within the budget, the same steps at any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerotune.training import batches as batching

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(np.array)


@given(lengths=LENGTHS, batch_size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_id_exactly_once_an_epoch(lengths, batch_size, seed, epoch):
    steps = batching.epoch_steps(lengths, batch_size, seed, epoch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert len(steps) == batching.num_steps_per_epoch(len(lengths), batch_size)
    sizes = sorted(len(step) for step in steps)
    assert all(size == batch_size for size in sizes[1:])


@settings(max_examples=200)
@given(lengths=LENGTHS, budget=st.integers(1, 2000), batch_size=st.integers(1, 64), packs=st.booleans())
def test_same_step_at_any_world_size_and_budget_kept(lengths, budget, batch_size, packs):
    step = batching.epoch_steps(lengths, batch_size, seed=0, epoch=0)[0]
    for world_size in (1, 2, 4, 8):
        ranks = batching.micro_batches(step, lengths, budget, world_size, packs)
        assert len(ranks) == world_size
        assert len({len(rank) for rank in ranks}) == 1, "every rank makes the same number of passes"
        batches = [batch for rank in ranks for batch in rank if len(batch)]
        assert sorted(np.concatenate(batches).tolist()) == sorted(step.tolist())
        sizes = [lengths[batch].sum() if packs else lengths[batch].max() * len(batch) for batch in batches]
        assert all(len(batch) == 1 or size <= budget for batch, size in zip(batches, sizes, strict=True))


@given(lengths=LENGTHS, budget=st.integers(1, 2000))
def test_a_cut_is_no_longer_than_needed(lengths, budget):
    batches = batching.micro_batches(np.arange(len(lengths)), lengths, budget, 1)[0]
    falling = np.sort(lengths)[::-1]
    assert len(batches) <= len(batching.cut_by_budget(falling, budget))


@given(lengths=LENGTHS, budget=st.integers(1, 2000))
def test_evaluation_covers_every_item_once(lengths, budget):
    batches = batching.evaluation_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= budget for batch in batches)


def test_padding_does_not_count_where_a_batch_is_one_row():
    lengths = np.array([10, 2, 2, 2, 2, 2])
    assert batching.cut_by_budget(lengths, 20, packs=True) == [slice(0, 6)]
    assert batching.cut_by_budget(lengths, 20) == [slice(0, 2), slice(2, 6)]


def test_golden_cut():
    lengths = np.array([5, 9, 3, 3, 8, 2])
    ranks = batching.micro_batches(np.arange(6), lengths, budget=20, world_size=1)
    assert [batch.tolist() for batch in ranks[0]] == [[0, 2, 3, 5], [1, 4]]
    two = batching.micro_batches(np.arange(6), lengths, budget=20, world_size=2)
    assert [[batch.tolist() for batch in rank] for rank in two] == [[[0, 2, 3, 5]], [[1, 4]]]


def test_other_seeds_and_epochs_give_other_orders():
    lengths = np.arange(1, 101)
    first = [batching.epoch_steps(lengths, 10, seed, epoch)[0].tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert first[0] != first[1] != first[2] != first[0]
    assert first[0] == batching.epoch_steps(lengths, 10, 0, 0)[0].tolist()


def test_length_grouping_pads_little():
    """Lengths are drawn like SST-2's: random steps of 32 pad about 3 ×, grouped ones about 1.05 × (field notes)."""
    lengths = np.random.default_rng(0).geometric(1 / 11, size=6400) + 2
    order = np.random.default_rng(1).permutation(6400)
    ways = batching.epoch_steps(lengths, 32, 0, 0), np.split(order, 200)
    grouped, random = (sum(lengths[batch].max() * len(batch) for batch in way) / lengths.sum() for way in ways)
    assert grouped < 1.1 < 2 < random


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_more_ranks_than_examples_leaves_empty_work(world_size):
    ranks = batching.micro_batches(np.array([0]), np.array([7]), 100, world_size)
    assert sum(len(batch) for rank in ranks for batch in rank) == 1
    assert all(len(rank) == 1 for rank in ranks)


@pytest.mark.parametrize(("world_size", "sizes"), [(1, [[3, 2]]), (2, [[3], [2]])])
def test_micro_batches_are_as_even_as_they_can_be(world_size, sizes):
    """Five rows of ten tokens need two batches under a budget of four rows: three and two, not four and one."""
    ranks = batching.micro_batches(np.arange(5), np.full(5, 10), 40, world_size)
    assert [[len(batch) for batch in rank] for rank in ranks] == sizes
