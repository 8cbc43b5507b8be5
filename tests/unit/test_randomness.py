"""Seeds and orders are always the same, on every machine."""

from zerotune.randomness import derive_seed, random_order


def test_seeds_are_golden_and_apart():
    """A change to these numbers changes every run with dropout."""
    assert derive_seed(0, 1, 0, 0) == 5836529245451711556
    seeds = {
        derive_seed(seed, step, rank, micro)
        for seed in range(3)
        for step in range(5)
        for rank in range(4)
        for micro in range(4)
    }
    assert len(seeds) == 240 and all(0 <= seed < 2**63 for seed in seeds)


def test_orders_are_golden_and_apart():
    """A change to these numbers changes every split and every run."""
    assert random_order(8, 0, "order").tolist() == [5, 0, 4, 3, 6, 1, 2, 7]
    assert sorted(random_order(1000, 1, "order")) == list(range(1000))
    orders = {tuple(random_order(30, seed, purpose)) for seed in range(5) for purpose in ("order", "shots", "ab", "ba")}
    assert len(orders) == 20
