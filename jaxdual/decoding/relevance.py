"""The relevance of a sequence's tokens, and which of them are raised by it: on the device, many sequences at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


def blend(
    relevance: Float32[Array, "seqs keys"],
    attention: Float32[Array, "seqs keys"],
    history: Float32[Array, " seqs"],
    is_first: Bool[Array, " seqs"],
) -> Float32[Array, "seqs keys"]:
    """Relevance after one more token.

    Args:
      relevance: before; zero for tokens that were not there yet.
      attention: of the new token, the mean over retrieval heads of their probabilities; zero beyond the token itself.
      history: weight of the relevance before.
      is_first: whether there was none before.
    """
    kept = jnp.where(is_first, 0.0, history)[:, None]
    return (1.0 - kept) * attention + kept * relevance


def select(
    relevance: Float32[Array, "seqs keys"],
    lengths: Int32[Array, " seqs"],
    top_p: Float32[Array, " seqs"],
    top_k: Int32[Array, " seqs"],
    most: int,
) -> Bool[Array, "seqs keys"]:
    """The most relevant tokens: as many as together have at most `top_p` of the relevance, one at least, and `top_k` at
    most; of equally relevant ones the first.

    Args:
      lengths: keys of each sequence; those beyond are never selected.
      top_p: 1 or more for no such limit.
      most: the greatest `top_k`, or as many as there are keys.
    """
    seqs, keys = relevance.shape
    real = jnp.arange(keys) < lengths[:, None]
    values, places = jax.lax.top_k(jnp.where(real, relevance, -1.0), min(most, keys))
    mass = jnp.cumsum(jnp.maximum(values, 0.0), axis=1)
    total = jnp.sum(jnp.where(real, relevance, 0.0), axis=1, keepdims=True)
    within = jnp.sum((mass <= top_p[:, None] * total) & (values >= 0.0), axis=1)
    within = jnp.where(top_p >= 1.0, lengths, within)  # a sum in another order may be a little more than all
    count = jnp.minimum(jnp.maximum(within, 1), jnp.minimum(top_k, lengths))
    chosen = jnp.arange(places.shape[1]) < count[:, None]
    none = jnp.zeros((seqs, keys), bool)
    return none.at[jnp.arange(seqs)[:, None], places].set(chosen)


def raised(
    selected: Bool[Array, "seqs keys"],
    template: Bool[Array, "seqs keys"],
    lengths: Int32[Array, " seqs"],
) -> Bool[Array, "seqs keys"]:
    """Tokens whose attention is raised: those selected that are no part of a template, and the newest itself."""
    newest = jnp.arange(selected.shape[1]) == lengths[:, None] - 1
    return (selected & ~template) | newest
