"""Interleaved Head Attention over whole sequences in float64, written out by index, and cases to compare with it.

The oracle follows the paper's forward pass: pseudo keys are mixed from keys without a rotation and then rotated at
their place `n * P + p` in the virtual sequence, which also says what sees what. It knows neither `PseudoHeads` nor
bands.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.pseudo_heads import PseudoHeads
from tests.pallas_kernels.paged_battery import case

SCALE = 0.3  # sharper than usual: an error in a score shows
ATOL = {"bfloat16": 0.03, "float16": 0.006, "float32": 1e-5, "float64": 1e-10}


@dataclass(frozen=True)
class Mixing:
    """Random alphas `[kv_heads, q_heads, P]`, not symmetric, and what else a pseudo head is made of.

    Attributes:
      frequencies: radians by which each pair turns from one virtual place to the next; zeros for no rotation.
    """

    alpha_k: np.ndarray
    alpha_v: np.ndarray
    frequencies: np.ndarray
    mask: str
    window: int | None

    @property
    def count(self) -> int:
        return self.alpha_k.shape[2]

    def pseudo(self, dtype) -> PseudoHeads:
        """As the operations take it; the rotations at P times a token's position are in its cached keys."""
        angles = np.arange(self.count)[:, None] * self.frequencies
        arrays = (jnp.asarray(x, dtype) for x in (self.alpha_k, self.alpha_v, np.cos(angles), np.sin(angles)))
        return PseudoHeads(*arrays, mask=self.mask, window=self.window)

    def sees(self, token: int, p: int, key_token: int, key_p: int) -> bool:
        """By places in the virtual sequence, or by tokens."""
        if self.mask == "token":
            return key_token <= token and (self.window is None or token - key_token < self.window)
        distance = (token * self.count + p) - (key_token * self.count + key_p)
        return distance >= 0 and (self.window is None or distance < self.window * self.count)


def mixing(seed, kv_heads, q_heads, count, head_dim, *, mask="flat", window=None, rotated=True) -> Mixing:
    rng = np.random.default_rng(seed)
    alpha = rng.normal(size=(2, kv_heads, q_heads, count)) / np.sqrt(kv_heads)
    half = head_dim // 2
    frequencies = 0.7 ** np.arange(half) if rotated else np.zeros(half)
    return Mixing(*alpha.astype(np.float32).astype(np.float64), frequencies, mask, window)


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """A vector whose pairs `(x[i], x[i + half])` are turned."""
    turned = np.empty_like(x)
    half = len(x) // 2
    for i in range(half):
        cos, sin = np.cos(angles[i]), np.sin(angles[i])
        turned[i] = x[i] * cos - x[i + half] * sin
        turned[i + half] = x[i + half] * cos + x[i] * sin
    return turned


def attend(c, seq: int, q: np.ndarray, token: int, m: Mixing, scale: float) -> np.ndarray:
    """Pseudo outputs `[q_heads, P, head_dim]` of a token whose pseudo queries are rotated already."""
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        places = [(n, e) for n in range(token + 1) for e in range(m.count)]
        keys, values = {}, {}
        for n, e in places:
            if not any(m.sees(token, p, n, e) for p in range(m.count)):
                continue
            raw = [rotated(key, -n * m.count * m.frequencies) for key in c.keys[seq, n]]
            key = sum(m.alpha_k[s, head, e] * raw[s] for s in range(len(raw)))
            keys[n, e] = rotated(key, (n * m.count + e) * m.frequencies)
            values[n, e] = sum(m.alpha_v[s, head, e] * c.values[seq, n, s] for s in range(len(raw)))
        for p in range(m.count):
            seen = [place for place in keys if m.sees(token, p, *place)]
            scores = np.array([keys[place] @ q[head, p] * scale for place in seen])
            weights = np.exp(scores - scores.max())
            out[head, p] = sum(w * values[place] for w, place in zip(weights, seen, strict=True)) / weights.sum()
    return out


def first_seen(m: Mixing, token: int) -> int:
    """The first token with a pseudo key that some pseudo query of a token sees."""
    pairs = [(p, e) for p in range(m.count) for e in range(m.count)]
    return next(n for n in range(token + 1) if any(m.sees(token, p, n, e) for p, e in pairs))


def check_prefill(
    function,
    seed,
    starts,
    counts,
    *,
    chunk,
    group=2,
    pseudo_heads=2,
    mask="flat",
    window=None,
    rotated=True,
    kv_heads=2,
    head_dim=8,
    dtype=jnp.float32,
    scale=SCALE,
    **options,
) -> None:
    """Compares `function`, with the arguments of `iha_prefill`; `options` are those of `paged_battery.case`."""
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    q_heads = kv_heads * group
    m = mixing(seed, kv_heads, q_heads, pseudo_heads, head_dim, mask=mask, window=window, rotated=rotated)
    firsts = np.array([first_seen(m, max(start, 0)) for start in starts])
    c = case(seed, starts + counts, firsts, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, **options)
    q = c.rng.normal(size=(len(starts), chunk, q_heads, pseudo_heads, head_dim))
    q[np.arange(chunk) >= counts[:, None]] = np.nan  # queries that are not real may hold anything
    q = jnp.asarray(q, dtype)
    out = function(
        q=q,
        starts=jnp.asarray(starts - c.hidden),
        counts=jnp.asarray(counts),
        pseudo=m.pseudo(jnp.promote_types(dtype, jnp.float32)),
        scale=scale,
        **c.arrays,
    )
    used = head_dim**-0.5 if scale is None else scale
    expected = np.zeros(q.shape)
    for seq, i in np.argwhere(np.arange(chunk) < counts[:, None]):
        expected[seq, i] = attend(c, seq, np.asarray(q[seq, i], np.float64), starts[seq] + i, m, used)
    assert np.isfinite(expected).all()
    assert out.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1e-6, atol=ATOL[q.dtype.name])
    assert not np.asarray(out, np.float64)[np.arange(chunk) >= counts[:, None]].any()


def check_decode(function, seed, lengths, **options) -> None:
    """Compares `function`, with the arguments of `iha_decode`: chunks of one token, or of none."""

    def one_token(q, starts, counts, **others):
        return function(q=q[:, 0], lengths=starts + counts, **others)[:, None]

    starts, counts = [max(0, length - 1) for length in lengths], [min(1, length) for length in lengths]
    check_prefill(one_token, seed, starts, counts, chunk=1, **options)
