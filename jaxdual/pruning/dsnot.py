"""DSnoT (Zhang et al. 2023): weights change places with others of their row, without new values."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern

_SWAPS = 50
# Of a variance, beside the square of the mean: inputs that never change would come first without it.
_LEAST_VARIANCE = 1e-6


def dsnot(
    weights: Float[Array, "outputs inputs"],
    kept: Bool[Array, "outputs inputs"],
    moments: Moments,
    pattern: Pattern,
    *,
    swaps: int = _SWAPS,
) -> tuple[Float32[Array, "outputs inputs"], Bool[Array, "outputs inputs"]]:
    """Weights with another choice of as many in every row, and the choice.

    With e the expected error of an output, the sum of `w E[x]` over what is gone: what comes back has the largest
    `sign(e) w E[x] / Var[x]` of what is gone; what goes for it has the smallest `|w| ||x||` of what would not bring the
    error back up, in the same group of M where the pattern has groups. A row ends where a swap would not make |e|
    smaller.

    Args:
      weights: before anything was pruned.
      kept: which of them a pruner left.
      moments: of the inputs.
      pattern: of the choice.
      swaps: at most, of each row.
    """
    squares = moments.squares / jnp.maximum(moments.tokens, 1)
    variances = jnp.maximum(squares - moments.means**2, _LEAST_VARIANCE * (squares + 1e-30))
    wide = weights.astype(jnp.float32)
    kept = _swapped(wide, kept, moments.means, variances, jnp.sqrt(moments.squares), pattern, swaps)
    return jnp.where(kept, wide, 0.0), kept


@partial(jax.jit, static_argnames=("pattern", "swaps"))
def _swapped(
    weights: Float32[Array, "outputs inputs"],
    kept: Bool[Array, "outputs inputs"],
    means: Float32[Array, " inputs"],
    variances: Float32[Array, " inputs"],
    norms: Float32[Array, " inputs"],
    pattern: Pattern,
    swaps: int,
) -> Bool[Array, "outputs inputs"]:
    expected, sizes = weights * means, jnp.abs(weights) * norms
    places = jnp.arange(weights.shape[1])

    def of_row(expected: Array, sizes: Array, kept: Array) -> Array:
        def swap(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            kept, error, going = state
            toward = jnp.sign(error) * expected
            back = jnp.argmax(jnp.where(kept, -jnp.inf, toward / variances))
            may_go = kept & (toward <= 0)
            if pattern.share is None:
                may_go &= places // pattern.of == back // pattern.of
            gone = jnp.argmin(jnp.where(may_go, sizes, jnp.inf))
            after = error - expected[back] + expected[gone]
            going &= may_go[gone] & ~kept[back] & (jnp.abs(after) < jnp.abs(error))
            swapped = kept.at[back].set(True).at[gone].set(False)
            return jnp.where(going, swapped, kept), jnp.where(going, after, error), going

        error = jnp.sum(jnp.where(kept, 0.0, expected))
        swapped: Array = jax.lax.fori_loop(0, swaps, swap, (kept, error, jnp.bool_(True)))[0]
        return swapped

    return jax.vmap(of_row)(expected, sizes, kept)
