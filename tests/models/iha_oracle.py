"""Interleaved Head Attention by the letter, in float64 and by index: what everything else is compared with."""

from __future__ import annotations

import math

import numpy as np


def visible(query: tuple[int, int], key: tuple[int, int], pseudo: int, mask: str, window: int | None) -> bool:
    """Whether pseudo query (token, pseudo head) sees a pseudo key (section 4 of the specification)."""
    (n, p), (m, r) = query, key
    if mask == "none":
        return True
    if mask == "flat":
        behind = (n * pseudo + p) - (m * pseudo + r)
        return behind >= 0 and (window is None or behind < window * pseudo)
    return m <= n and (window is None or n - m < window)


def position(n: int, p: int, pseudo: int, rope: str) -> float:
    return {"virtual": n * pseudo + p, "token": n, "scaled": n + p / pseudo, "none": 0}[rope]


def rotated(x: np.ndarray, at: float, theta: float) -> np.ndarray:
    """A vector rotated as at a position."""
    half = len(x) // 2
    angles = at * theta ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def pseudo_outputs(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    alpha_q: np.ndarray,
    alpha_k: np.ndarray,
    alpha_v: np.ndarray,
    *,
    mask: str,
    window: int | None,
    rope: str,
    theta: float = 10000.0,
) -> np.ndarray:
    """Outputs `[tokens, heads, pseudo, head_dim]` before the collapse, of one sequence.

    Args:
      q: `[tokens, heads, head_dim]`, not rotated.
      k, v: `[tokens, kv_heads, head_dim]`, not rotated.
      alpha_q, alpha_k, alpha_v: `[source, head, pseudo]`.
    """
    tokens, heads, head_dim = q.shape
    pseudo = alpha_q.shape[2]

    def mixed(x: np.ndarray, alpha: np.ndarray, n: int, h: int, p: int) -> np.ndarray:
        return sum(alpha[m, h, p] * x[n, m] for m in range(alpha.shape[0]))

    places = [(n, p) for n in range(tokens) for p in range(pseudo)]
    seen = np.array([[visible(query, key, pseudo, mask, window) for key in places] for query in places])
    out = np.zeros((tokens, heads, pseudo, head_dim))
    for h in range(heads):
        turned = [position(n, p, pseudo, rope) for n, p in places]
        queries = [rotated(mixed(q, alpha_q, n, h, p), at, theta) for (n, p), at in zip(places, turned, strict=True)]
        keys = [rotated(mixed(k, alpha_k, n, h, p), at, theta) for (n, p), at in zip(places, turned, strict=True)]
        values = np.array([mixed(v, alpha_v, n, h, p) for n, p in places])
        scores = np.where(seen, np.array(queries) @ np.array(keys).T / math.sqrt(head_dim), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = (weights / weights.sum(1, keepdims=True) @ values).reshape(tokens, pseudo, head_dim)
    return out


def collapsed(out: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One output of each head, `[tokens, heads, head_dim]`; `weights` `[out, head, pseudo]` or `[head, pseudo]`."""
    tokens, heads, pseudo, head_dim = out.shape
    whole = np.zeros((tokens, heads, head_dim))
    for o in range(heads):
        for g in range(heads):
            for p in range(pseudo):
                if weights.ndim == 3:
                    whole[:, o] += weights[o, g, p] * out[:, g, p]
                elif g == o:
                    whole[:, o] += weights[o, p] * out[:, o, p]
    return whole
