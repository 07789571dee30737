"""Least squares for a matrix that loses inputs: what stays makes up for what goes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import ArrayLike

from jaxdual.pruning.moments import Moments

DAMPING = 0.01  # of the mean square of the inputs; spans the ridge


def refit(
    weights: ArrayLike,
    kept: Int[np.ndarray, " kept"],
    moments: Moments,
    *,
    shift: bool = False,
    damping: float = DAMPING,
) -> tuple[Float64[np.ndarray, "outputs kept"], Float64[np.ndarray, " outputs"]]:
    """The weights of the inputs that stay, and what is to be added to the outputs, which is zero without `shift`.

    With inputs h, products G = E[h h^T], kept inputs K and the others R, the new weights are

        W[:, K] + W[:, R] G[R, K] (G[K, K] + l I)^-1,   l = damping * mean(diag G)

    They minimise E|W h - W' h_K|^2 + l |W' - W[:, K]|^2. The ridge pulls to the weights that were there, and not to
    zero, so inputs that are never anything but zero change nothing when they go. With a shift, which is not damped, G
    is the covariance: the same as a further input that is always one.

    Args:
      weights: `[outputs, inputs]`, before.
      kept: inputs that stay.
      moments: of all inputs, with all products.
      shift: whether outputs may get a bias.
      damping: see above.
    """
    before = np.asarray(weights, np.float64)
    products, means = second_moments(moments, shift=shift)
    gone = np.setdiff1d(np.arange(before.shape[1]), kept)
    inner = products[np.ix_(kept, kept)]
    inner[np.diag_indices_from(inner)] += max(damping * np.mean(np.diagonal(products)), np.finfo(np.float64).tiny)
    after = before[:, kept] + np.linalg.solve(inner, products[np.ix_(kept, gone)] @ before[:, gone].T).T
    return after, (before @ means - after @ means[kept]) * shift


def relative_error(
    weights: ArrayLike,
    after: Float[np.ndarray, "outputs kept"],
    kept: Int[np.ndarray, " kept"],
    moments: Moments,
    *,
    shift: bool = False,
) -> float:
    """Mean square of the change of the outputs, relative to that of the outputs.

    Args:
      weights: `[outputs, inputs]`, before.
      after: of the inputs that stay.
      kept: which these are.
      moments: of all inputs, with all products.
      shift: whether a bias makes up for the mean of the change.
    """
    before = np.asarray(weights, np.float64)
    lost = before.copy()
    lost[:, kept] -= after
    changed = np.sum(lost @ second_moments(moments, shift=shift)[0] * lost)
    return float(changed / max(np.sum(before @ second_moments(moments)[0] * before), np.finfo(np.float64).tiny))


def second_moments(
    moments: Moments, *, shift: bool = False
) -> tuple[Float64[np.ndarray, "inputs inputs"], Float64[np.ndarray, " inputs"]]:
    """Mean products of each pair of inputs, about their means where a shift makes up for these, and the means."""
    tokens = max(float(moments.tokens), 1.0)
    products = np.asarray(moments.second, np.float64) / tokens
    means = np.asarray(moments.first, np.float64) / tokens
    return (products - np.outer(means, means) if shift else products), means
