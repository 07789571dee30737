"""Attention over paged keys and values in float64, key by key as the docstrings say, and cases to compare with it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.key_bias import KeyBias, pack

SCALE = 0.3  # sharper than usual: an error in a score shows


@dataclass(frozen=True)
class Case:
    """Random sequences in one arena whose pages are dealt at random, with NaN wherever no key or value is.

    Attributes:
      arrays: keyword arguments of the operations, but for queries and positions.
      keys, values: `[seqs, tokens, kv_heads, head_dim]` in token order, as the pages hold them.
      bias: `[seqs, tokens]`, or None.
    """

    arrays: dict[str, jax.Array | KeyBias]
    keys: np.ndarray
    values: np.ndarray
    bias: np.ndarray | None
    rng: np.random.Generator


def case(seed, lengths, firsts, *, kv_heads, head_dim, page_size, dtype, fp8=False, biased=False) -> Case:
    """`firsts`: the first key of each sequence that a query sees; `fp8`: pages of 8 bits with a scale of each token;
    `biased`: a bias of some keys of each sequence.
    """
    rng = np.random.default_rng(seed)
    seqs, width = len(lengths), -(-max(*lengths, 1) // page_size) + 1
    rows, tokens = 2 * seqs * width + 1, width * page_size
    ids = rng.permutation(rows)[: 2 * seqs * width].reshape(2, seqs, width).astype(np.int32)
    kv = rng.normal(size=(2, seqs, tokens, kv_heads, head_dim))
    at = np.arange(tokens)
    kv[:, (at >= np.asarray(lengths)[:, None]) | (at < np.asarray(firsts)[:, None])] = np.nan
    arena = np.full((rows, page_size, kv_heads, head_dim), np.nan)
    arena[ids] = kv.reshape(2, seqs, width, page_size, kv_heads, head_dim)
    arrays = {"page_table": jnp.asarray(ids[0]), "v_page_table": jnp.asarray(ids[1])}
    by_token = 1
    if fp8:
        # From just enough for the largest number of a token to twice that; NaN with the tokens that are not there.
        scales = np.abs(arena).max(axis=-1).swapaxes(1, 2) / 448 * (1 + rng.random((rows, kv_heads, page_size)))
        scales = scales.astype(np.float32)
        by_token = scales.swapaxes(1, 2)[..., None]
        arrays["k_scales"] = arrays["v_scales"] = jnp.asarray(scales)
    pages = jnp.asarray(arena / by_token, jnp.float8_e4m3fn if fp8 else dtype)
    arrays["k_pages"] = arrays["v_pages"] = pages
    keys, values = (np.asarray(pages, np.float64) * by_token)[ids].reshape(kv.shape)
    bias = None
    if biased:
        chosen, value = rng.random((seqs, tokens)) < 0.3, rng.normal(size=seqs).astype(np.float32)
        arrays["key_bias"] = KeyBias(pack(jnp.asarray(chosen)), jnp.asarray(value))
        bias = chosen * value[:, None]
    return Case(arrays, keys, values, bias, rng)


def attend(case: Case, seq: int, q: np.ndarray, position: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of one query `[q_heads, head_dim]` at a position of a sequence."""
    seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
    group = q.shape[0] // case.keys.shape[2]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[0])
    for head in range(q.shape[0]):
        scores = case.keys[seq, seen, head // group] @ q[head] * SCALE
        if case.bias is not None:
            scores = scores + case.bias[seq, seen]
        weights = np.exp(scores - scores.max())
        out[head] = weights @ case.values[seq, seen, head // group] / weights.sum()
        lse[head] = np.log(weights.sum()) + scores.max()
    return out, lse


def compare(out, lse, expected, expected_lse, dtype) -> None:
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(
        np.asarray(out, np.float64),
        expected,
        atol={"bfloat16": 0.02, "float16": 0.004}.get(jnp.dtype(dtype).name, 1e-5),
    )
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5 if dtype == jnp.float32 else 0.004)


def check_decode(
    function,
    seed,
    lengths,
    *,
    kv_heads=1,
    group=8,
    head_dim=64,
    page_size=64,
    dtype=jnp.bfloat16,
    fp8=False,
    biased=False,
    window=None,
) -> None:
    """Compares `function`, with the arguments of `decode_attention`."""
    firsts = [max(0, length - window) if window else 0 for length in lengths]
    c = case(
        seed,
        lengths,
        firsts,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        fp8=fp8,
        biased=biased,
    )
    q = jnp.asarray(c.rng.normal(size=(len(lengths), kv_heads * group, head_dim)), dtype)
    out, lse = function(
        q=q, lengths=jnp.asarray(lengths, jnp.int32), scale=SCALE, window=window, return_lse=True, **c.arrays
    )
    expected, expected_lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for seq, length in enumerate(lengths):
        if length:
            query = np.asarray(q[seq], np.float64)
            expected[seq], expected_lse[seq] = attend(c, seq, query, length - 1, window)
    compare(out, lse, expected, expected_lse, dtype)


def check_prefill(
    function,
    seed,
    starts,
    counts,
    *,
    chunk=128,
    kv_heads=1,
    group=2,
    head_dim=64,
    page_size=64,
    dtype=jnp.bfloat16,
    fp8=False,
    biased=False,
    window=None,
) -> None:
    """Compares `function`, with the arguments of `prefill_attention`."""
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    firsts = [max(0, start + 1 - window) if window else 0 for start in starts]
    c = case(
        seed,
        lengths,
        firsts,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        fp8=fp8,
        biased=biased,
    )
    q = jnp.asarray(c.rng.normal(size=(len(starts), chunk, kv_heads * group, head_dim)), dtype)
    out, lse = function(
        q=q,
        starts=jnp.asarray(starts, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        scale=SCALE,
        window=window,
        return_lse=True,
        **c.arrays,
    )
    expected, expected_lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for seq, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for i in range(count):
            query = np.asarray(q[seq, i], np.float64)
            expected[seq, i], expected_lse[seq, i] = attend(c, seq, query, start + i, window)
    compare(out, lse, expected, expected_lse, dtype)
