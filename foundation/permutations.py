"""Permutations that are functions of numbers, and stay what they are."""

import numpy as np


def permutation(n: int, *entropy: int) -> np.ndarray:
    """The numbers below n in an order that `entropy` alone decides, int64."""
    # Raw bits of a bit generator are guaranteed to stay the same across NumPy versions; `Generator.permutation` is not.
    return np.argsort(np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n), kind="stable")
