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
    """Random sequences whose pages are dealt at random, with NaN wherever no key or value is.

    Attributes:
      arrays: keyword arguments of the operations, but for queries and positions.
      keys, values: `[seqs, tokens, kv_heads, head_dim]` in token order, as the pages hold them.
      bias: `[seqs, tokens]`, or None.
      hidden: tokens at the start of each sequence whose pages the tables leave out.
    """

    arrays: dict[str, jax.Array | KeyBias]
    keys: np.ndarray
    values: np.ndarray
    bias: np.ndarray | None
    hidden: int
    rng: np.random.Generator


def case(
    seed,
    lengths,
    firsts=0,
    *,
    kv_heads=1,
    head_dim=64,
    page_size=64,
    dtype=jnp.bfloat16,
    fp8=False,
    biased=False,
    separate_values=False,
    one_table=False,
    spare=1,
    left_out=0,
) -> Case:
    """Keys and values of sequences of `lengths` tokens.

    Args:
      firsts: the first key of each sequence that a query sees.
      fp8: pages of 8 bits with a scale of each token.
      biased: a bias of some keys of each sequence.
      separate_values: values in an array of their own, not in one arena with the keys.
      one_table: values in the same rows of their own array as the keys, and no table of the values.
      spare: entries of the tables past the last page of the longest sequence.
      left_out: pages at the start of each sequence that the tables leave out.
    """
    rng = np.random.default_rng(seed)
    hidden = left_out * page_size
    seqs, width = len(lengths), -(-max(*lengths, 1) // page_size) + spare
    rows, tokens = 2 * seqs * width + 1, width * page_size
    ids = rng.permutation(rows)[: 2 * seqs * width].reshape(2, seqs, width).astype(np.int32)
    if one_table:
        ids[1] = ids[0]
    arenas = 2 if separate_values or one_table else 1
    place = np.arange(2)[:, None, None] % arenas, ids  # of keys and of values
    kv = rng.normal(size=(2, seqs, tokens, kv_heads, head_dim))
    at = np.arange(tokens)
    kv[:, (at >= np.asarray(lengths)[:, None]) | (at < np.reshape(firsts, (-1, 1)))] = np.nan
    arena = np.full((arenas, rows, page_size, kv_heads, head_dim), np.nan)
    arena[place] = kv.reshape(2, seqs, width, page_size, kv_heads, head_dim)
    arrays = {"page_table": jnp.asarray(ids[0, :, left_out:])}
    if not one_table:
        arrays["v_page_table"] = jnp.asarray(ids[1, :, left_out:])
    by_token = 1
    if fp8:
        # From just enough for the largest number of a token to twice that; NaN with the tokens that are not there.
        room = 1 + rng.random((arenas, rows, kv_heads, page_size))
        scales = (np.abs(arena).max(axis=-1).swapaxes(2, 3) / 448 * room).astype(np.float32)
        by_token = scales.swapaxes(2, 3)[..., None]
        held = [jnp.asarray(x) for x in scales]
        arrays |= {"k_scales": held[0], "v_scales": held[-1]}
    pages = [jnp.asarray(x, jnp.float8_e4m3fn if fp8 else dtype) for x in arena / by_token]
    arrays |= {"k_pages": pages[0], "v_pages": pages[-1]}
    keys, values = (np.asarray(pages, np.float64) * by_token)[place].reshape(kv.shape)
    bias = None
    if biased:
        chosen, value = rng.random((seqs, tokens)) < 0.3, rng.normal(size=seqs).astype(np.float32)
        arrays["key_bias"] = KeyBias(pack(jnp.asarray(chosen[:, hidden:])), jnp.asarray(value))
        bias = chosen * value[:, None]
    return Case(arrays, keys, values, bias, hidden, rng)


def attend(
    case: Case, seq: int, q: np.ndarray, position: int, window: int | None, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of one query `[q_heads, head_dim]` at a position of a sequence."""
    seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
    group = q.shape[0] // case.keys.shape[2]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[0])
    for head in range(q.shape[0]):
        scores = case.keys[seq, seen, head // group] @ q[head] * scale
        if case.bias is not None:
            scores = scores + case.bias[seq, seen]
        weights = np.exp(scores - scores.max())
        out[head] = weights @ case.values[seq, seen, head // group] / weights.sum()
        lse[head] = np.log(weights.sum()) + scores.max()
    return out, lse


def check_decode(function, seed, lengths, *, group=8, **options) -> None:
    """Compares `function`, with the arguments of `decode_attention`: chunks of one token, or of none."""

    def one_token(q, starts, counts, **others):
        out, lse = function(q=q[:, 0], lengths=starts + counts, **others)
        return out[:, None], lse[:, None]

    starts, counts = [max(0, length - 1) for length in lengths], [min(1, length) for length in lengths]
    check_prefill(one_token, seed, starts, counts, chunk=1, group=group, **options)


def check_prefill(
    function,
    seed,
    starts,
    counts,
    *,
    chunk=128,
    group=2,
    dtype=jnp.bfloat16,
    window=None,
    scale=SCALE,
    **options,
) -> None:
    """Compares `function`, with the arguments of `prefill_attention`; `options` are those of `case`."""
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    firsts = np.maximum(0, starts + 1 - window) if window else 0
    c = case(seed, starts + counts, firsts, dtype=dtype, **options)
    kv_heads, head_dim = c.keys.shape[2:]
    q = c.rng.normal(size=(len(starts), chunk, kv_heads * group, head_dim))
    q[np.arange(chunk) >= counts[:, None]] = np.nan  # queries that are not real may hold anything
    q = jnp.asarray(q, dtype)
    out, lse = function(
        q=q,
        starts=jnp.asarray(starts - c.hidden),
        counts=jnp.asarray(counts),
        scale=scale,
        window=window,
        return_lse=True,
        **c.arrays,
    )
    used = head_dim**-0.5 if scale is None else scale
    expected, expected_lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for seq, i in np.argwhere(np.arange(chunk) < counts[:, None]):
        query = np.asarray(q[seq, i], np.float64)
        expected[seq, i], expected_lse[seq, i] = attend(c, seq, query, starts[seq] + i, window, used)
    assert np.isfinite(expected).all()
    assert out.dtype == q.dtype
    atol, lse_atol = {"bfloat16": (0.02, 0.004), "float16": (0.004, 0.004), "float32": (2e-6, 2e-6)}[q.dtype.name]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=lse_atol)


def check_scores(
    function, seed, lengths, *, group=4, dtype=jnp.bfloat16, scale=SCALE, looked_at=0.4, **options
) -> None:
    """Compares `function`, with the arguments of `retrieval_scores`; `options` are those of `case`.

    Args:
      looked_at: the share of heads that have a weight; whatever the others have is NaN, and so are keys that only they
        would see.
    """
    c = case(seed, lengths, dtype=dtype, **options)
    seqs, tokens, kv_heads, head_dim = c.keys.shape
    q = jnp.asarray(c.rng.normal(size=(seqs, kv_heads * group, head_dim)), dtype)
    weights = np.where(c.rng.random(q.shape[:2]) < looked_at, c.rng.random(q.shape[:2]), 0).astype(np.float32)
    used = head_dim**-0.5 if scale is None else scale
    expected, lse = np.zeros((seqs, tokens)), np.full(q.shape[:2], np.nan, np.float32)
    for seq, head in np.argwhere(weights):
        query = np.asarray(q[seq, head], np.float64)
        scores = c.keys[seq, : lengths[seq], head // group] @ query * used
        lse[seq, head] = np.logaddexp.reduce(scores, initial=-np.inf)
        expected[seq, : lengths[seq]] += weights[seq, head] * np.exp(scores - lse[seq, head].astype(np.float64))
    unseen = ~(weights != 0).reshape(seqs, kv_heads, group).any(axis=2)
    pages = {name: array for name, array in c.arrays.items() if name in ("k_pages", "page_table", "k_scales")}
    for seq, head in np.argwhere(unseen):
        pages["k_pages"] = pages["k_pages"].at[pages["page_table"][seq], :, head].set(jnp.nan)
    found = function(
        q=jnp.where(weights[..., None] != 0, q, jnp.nan),
        lengths=jnp.asarray(lengths, jnp.int32),
        lse=jnp.asarray(lse),
        weights=jnp.asarray(weights),
        scale=scale,
        **pages,
    )
    assert found.dtype == jnp.float32
    assert np.isfinite(expected).all()
    # Products of 16 bits are exact, but a GPU may cut off the last bits of their sums.
    np.testing.assert_allclose(found, expected, rtol=2e-5 if dtype == jnp.float32 else 1e-4, atol=1e-7)
    assert not np.asarray(found)[np.arange(tokens) >= np.asarray(lengths)[:, None]].any()
