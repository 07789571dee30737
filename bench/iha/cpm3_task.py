"""Count Permutation Match-3: how many ordered pairs of tokens make `x_i + G x_j1 + x_j2` a multiple of M."""

from __future__ import annotations

import itertools

import numpy as np


def check_coefficients(modulus: int, coefficient: int) -> None:
    """Raises `ValueError` for coefficients whose predicate doesn't tell the order of a pair, or is no pair's at all.

    The paper asks for G > 2M only; with `G mod M = 1`, as in its example, both orders of a pair count alike, and with
    `G mod M = 0` the first of a pair does not count.
    """
    if coefficient <= 2 * modulus or coefficient % modulus in (0, 1):
        raise ValueError(
            f"G is {coefficient}, which is {coefficient % modulus} modulo M = {modulus}; it must be above "
            f"{2 * modulus}, and neither 0 nor 1 modulo M"
        )


def is_symmetric(modulus: int, coefficient: int) -> bool:
    """Whether each pair counts as much as the one in the other order, for all numbers below M."""
    return all(
        ((x + coefficient * a + b) % modulus == 0) == ((x + coefficient * b + a) % modulus == 0)
        for x, a, b in itertools.product(range(modulus), repeat=3)
    )


def brute_force(x: np.ndarray, modulus: int, coefficient: int) -> np.ndarray:
    """Counts `[N]` of one sequence `[N]`, by loops."""
    return np.array(
        [
            sum((int(own) + coefficient * int(first) + int(second)) % modulus == 0 for first in x for second in x)
            for own in x
        ]
    )


def counts_of(x: np.ndarray, modulus: int, coefficient: int) -> np.ndarray:
    """Counts `[examples, N]` of sequences `[examples, N]`."""
    z = x[:, :, None, None] + coefficient * x[:, None, :, None] + x[:, None, None, :]
    return (z % modulus == 0).sum(axis=(2, 3))
