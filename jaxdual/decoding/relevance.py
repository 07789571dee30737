"""The relevance of a sequence's tokens, and which of them are raised by it: on the device, many sequences at a time."""

from __future__ import annotations

from typing import Any

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
) -> Bool[Array, "seqs keys"]:
    """The most relevant tokens: as many as together have at most `top_p` of the relevance, one at least, and `top_k` at
    most; of equally relevant ones the first.

    It is what `select_by_sort` gives, found without sorting, at the same cost for any `top_k`. Relevance is summed in
    another order: where the sum up to a token is within rounding of `top_p` of all, the cut may be before or behind it.

    Args:
      relevance: 0 or more, and finite.
      lengths: keys of each sequence; those beyond are never selected.
      top_p: 1 or more for no such limit.
      top_k: as many as there are keys, or more, for no such limit.
    """

    # A GPU reads quickly, but each pass costs it the launch of some kernels; a CPU computes one threshold at a time.
    def on_cpu(*arguments: Array) -> Bool[Array, "seqs keys"]:
        return select_above_cut(*arguments, digit_bits=1)

    def elsewhere(*arguments: Array) -> Bool[Array, "seqs keys"]:
        return select_above_cut(*arguments, digit_bits=4)

    selected: Bool[Array, "seqs keys"] = jax.lax.platform_dependent(
        relevance, lengths, top_p, top_k, cpu=on_cpu, default=elsewhere
    )
    return selected


def select_above_cut(
    relevance: Float32[Array, "seqs keys"],
    lengths: Int32[Array, " seqs"],
    top_p: Float32[Array, " seqs"],
    top_k: Int32[Array, " seqs"],
    *,
    digit_bits: int,
) -> Bool[Array, "seqs keys"]:
    """`select` by a search for the cut: the greatest relevance whose tokens are not all within the limits.

    Floats that are not negative are in the order of their bits, so the cut is found digit by digit, the highest first;
    each takes a pass over all keys that counts and sums what is beyond every threshold that the digit may stand for.

    Args:
      digit_bits: of a digit: 31 / `digit_bits` passes, each with `2**digit_bits - 1` thresholds.
    """
    real = jnp.arange(relevance.shape[1]) < lengths[:, None]
    level = jnp.where(real, jax.lax.bitcast_convert_type(relevance, jnp.int32), -1)
    most_mass = jnp.where(top_p >= 1.0, jnp.inf, top_p * jnp.sum(jnp.where(real, relevance, 0.0), axis=1))
    most = jnp.minimum(top_k, lengths)

    def from_level(
        thresholds: Int32[Array, "seqs some"],
    ) -> tuple[Int32[Array, "seqs some"], Float32[Array, "seqs some"]]:
        """Tokens at or above each threshold, and their relevance."""
        over = level[:, None, :] >= thresholds[:, :, None]
        each = jax.lax.bitcast_convert_type(level, jnp.float32)[:, None, :]
        return jnp.sum(over, axis=2, dtype=jnp.int32), jnp.sum(jnp.where(over, each, 0.0), axis=2)

    def with_digit(cut: Int32[Array, " seqs"], shift: Any, bits: int) -> Int32[Array, " seqs"]:
        count, mass = from_level(cut[:, None] + (jnp.arange(1, 2**bits, dtype=jnp.int32) << shift))
        too_many = (count > most[:, None]) | (mass > most_mass[:, None])
        higher: Int32[Array, " seqs"] = cut + (jnp.sum(too_many, axis=1, dtype=jnp.int32) << shift)
        return higher

    digits, first_bits = divmod(31, digit_bits)  # the sign is none of them
    cut = jnp.zeros_like(lengths)
    if first_bits:
        cut = with_digit(cut, 31 - first_bits, first_bits)
    cut = jax.lax.fori_loop(
        0, digits, lambda i, cut: with_digit(cut, digit_bits * (digits - 1 - i), digit_bits), cut, unroll=digit_bits > 1
    )
    # All above the cut are selected, and the first of those at it, as far as the limits allow.
    above, at_cut = level > cut[:, None], level == cut[:, None]
    count, mass = from_level(cut[:, None] + 1)
    number = jnp.cumsum(at_cut, axis=1, dtype=jnp.int32)
    of_each = jax.lax.bitcast_convert_type(cut, jnp.float32)[:, None]
    allowed = (mass + number * of_each <= most_mass[:, None]) | (count + number == 1)
    selected: Bool[Array, "seqs keys"] = above | (at_cut & allowed & (count + number <= most[:, None]))
    return selected


def select_by_sort(
    relevance: Float32[Array, "seqs keys"],
    lengths: Int32[Array, " seqs"],
    top_p: Float32[Array, " seqs"],
    top_k: Int32[Array, " seqs"],
) -> Bool[Array, "seqs keys"]:
    """`select` as it is specified: all tokens in the order of their relevance, summed up from the first."""
    seqs, keys = relevance.shape
    real = jnp.arange(keys) < lengths[:, None]
    values, places = jax.lax.top_k(jnp.where(real, relevance, -1.0), keys)
    mass = jnp.cumsum(jnp.maximum(values, 0.0), axis=1)
    total = jnp.sum(jnp.where(real, relevance, 0.0), axis=1, keepdims=True)
    within = jnp.sum((mass <= top_p[:, None] * total) & (values >= 0.0), axis=1)
    within = jnp.where(top_p >= 1.0, lengths, within)  # a sum in another order may be a little more than all
    count = jnp.minimum(jnp.maximum(within, 1), jnp.minimum(top_k, lengths))
    chosen = jnp.arange(keys) < count[:, None]
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
