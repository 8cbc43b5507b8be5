"""Derive randomness from a few numbers, so that nothing must be stored and no numpy release changes it."""

import numpy as np


def random_order(num_items: int, seed: int, purpose: str) -> np.ndarray:
    """Return a permutation of 0 … num_items-1, independent for each purpose.

    Uses the raw output of PCG64, which numpy promises not to change, unlike that of Generator's methods.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, *purpose.encode()]))
    return np.argsort(bits.random_raw(num_items), kind="stable")


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed from a few numbers."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return (int(high) << 32 | int(low)) & (2**63 - 1)
