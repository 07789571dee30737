"""Masks with gradients: which weights stay is a step of their scores, and a soft step on the way back."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdual.pruning.pattern import Pattern, Scope

# Halvings of the range of scores that find a threshold: fine enough to tell neighbours of float32 logarithms.
_HALVINGS = 28


def straight_through(
    scores: Float[Array, "outputs inputs"], pattern: Pattern, scope: Scope, columns: int | None, temperature: float
) -> Float[Array, "outputs inputs"]:
    """1 where a weight stays and 0 where it goes; backwards `sigmoid((score - threshold) / temperature)`.

    Args:
      scores: logarithms of the scores that `Pattern.kept` compares.
      pattern, scope: as of the pruner.
      columns: inputs that are compared with each other, of a share; None for all.
      temperature: width of the soft step in units of the logarithm.
    """
    thresholds = jax.lax.stop_gradient(_thresholds(scores, pattern, scope, columns))
    hard = (scores > thresholds).astype(scores.dtype)
    soft = jax.nn.sigmoid((scores - thresholds) / temperature)
    return jax.lax.stop_gradient(hard - soft) + soft


def _thresholds(
    scores: Float[Array, "outputs inputs"], pattern: Pattern, scope: Scope, columns: int | None
) -> Float[Array, "#outputs inputs"]:
    """The highest score that goes, for every weight."""
    outputs, inputs = scores.shape
    if pattern.share is None:
        return jnp.repeat(_of_groups(scores.reshape(outputs, -1, pattern.of), pattern.of - pattern.keep), pattern.of, 1)
    if scope == "row":
        return jnp.broadcast_to(_kth(scores, int(inputs * pattern.share))[:, None], scores.shape)
    width = inputs if columns is None else columns
    parts = [scores[:, start : start + width] for start in range(0, inputs, width)]
    found = [jnp.full(part.shape[1], _kth(part.reshape(-1), int(part.size * pattern.share))) for part in parts]
    return jnp.concatenate(found)[None, :]


def _of_groups(groups: Float[Array, "outputs groups M"], removed: int) -> Float[Array, "outputs groups"]:
    """Of few scores each: counted, which is quicker than sorting them."""
    later = jnp.arange(groups.shape[-1])
    below = (groups[..., None, :] < groups[..., :, None]) | (
        (groups[..., None, :] == groups[..., :, None]) & (later[None, :] < later[:, None])
    )
    return jnp.max(jnp.where(jnp.sum(below, -1) < removed, groups, -jnp.inf), -1)


@partial(jax.jit, static_argnames="k")
def _kth(scores: Float[Array, "*rows n"], k: int) -> Float[Array, "*rows"]:
    """The k-th lowest score of each row, by halving the range that it lies in; below all for k = 0."""
    if k == 0:
        return jnp.full(scores.shape[:-1], -jnp.inf)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(scores <= middle[..., None], axis=-1) >= k
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    bounds = jnp.min(scores, axis=-1), jnp.max(scores, axis=-1)
    found: Array = jax.lax.fori_loop(0, _HALVINGS, halve, bounds)[1]
    return found
