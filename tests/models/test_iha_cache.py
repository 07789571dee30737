"""Decoding and chunked prefill over cached raw keys and values, against the whole forward pass, in float64."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.iha_decode import iha_decode
from pallas_kernels.iha_prefill import iha_prefill
from tests.models.test_iha import MASKS, WINDOWS, Layer, float64

__all__ = ["float64"]  # the fixture of this module, too

TOKENS = 9
COMBINATIONS = list(itertools.product(MASKS, WINDOWS, ("virtual", "token", "scaled")))


def pages(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An arena of pages of one token, keys and values in turns."""
    return jnp.asarray(np.stack([keys, values], axis=1).reshape(-1, 1, *keys.shape[1:]))


def decoded(layer: Layer, ring: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of every token when its step finds the last `ring` tokens in the cache; and those of the oracle."""
    q, k, v = layer.tokens(TOKENS)
    queries, keys = layer.projected(q, k)
    arena = pages(np.asarray(keys), v)
    found = []
    for token in range(TOKENS):
        first = 0 if ring is None else max(0, token + 1 - ring)
        rows = jnp.arange(first, token + 1, dtype=jnp.int32)[None] * 2
        lengths = jnp.asarray([token + 1 - first], jnp.int32)
        out = iha_decode(
            queries[token][None], arena, arena, rows, lengths, layer.pseudo_heads, v_page_table=rows + 1,
            implementation="reference",
        )  # fmt: skip
        found.append(np.asarray(out)[0])
    return np.array(found), layer.oracle(q, k, v)


@pytest.mark.parametrize(("mask", "window", "rope"), COMBINATIONS)
@pytest.mark.parametrize("pseudo", [2, 3])
def test_decoding_over_the_tokens_in_sight_is_the_whole_forward_pass(
    mask: str, window: int | None, rope: str, pseudo: int
) -> None:
    layer = Layer(mask, window, rope, pseudo=pseudo)
    ring = layer.pseudo_heads.tokens_in_sight
    assert ring == (None if window is None else window + (mask == "flat"))
    np.testing.assert_allclose(*decoded(layer, ring), atol=1e-10)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_cache_of_one_token_less_is_not_enough(window: int) -> None:
    flat = np.abs(np.subtract(*decoded(Layer("flat", window, "virtual"), window))).max()
    token = np.abs(np.subtract(*decoded(Layer("token", window + 1, "virtual"), window))).max()
    assert min(flat, token) > 1e-2


@pytest.mark.parametrize(("mask", "window", "rope"), COMBINATIONS)
def test_prefill_in_chunks_is_the_whole_forward_pass(mask: str, window: int | None, rope: str) -> None:
    layer = Layer(mask, window, rope, pseudo=3)
    q, k, v = layer.tokens(TOKENS)
    queries, keys = layer.projected(q, k)
    arena = pages(np.asarray(keys), v)
    rows = jnp.arange(TOKENS, dtype=jnp.int32)[None] * 2
    found, chunk = [], 4
    for start in range(0, TOKENS, chunk):
        count = min(chunk, TOKENS - start)
        part = np.zeros((1, chunk, *queries.shape[1:]))
        part[0, :count] = queries[start : start + count]
        out = iha_prefill(
            jnp.asarray(part), arena, arena, rows, jnp.asarray([start], jnp.int32), jnp.asarray([count], jnp.int32),
            layer.pseudo_heads, v_page_table=rows + 1, implementation="reference",
        )  # fmt: skip
        found.append(np.asarray(out)[0, :count])
    np.testing.assert_allclose(np.concatenate(found), layer.oracle(q, k, v), atol=1e-10)


def test_the_raw_cache_is_a_pseudo_heads_th_of_pseudo_keys_and_values() -> None:
    layer = Layer("flat", None, "virtual", pseudo=3, heads=4, kv_heads=4)
    _, k, v = layer.tokens(2)
    pseudo = layer.pseudo_heads
    assert pseudo.keys(jnp.asarray(k)).size == 3 * k.size
    assert pseudo.values(jnp.asarray(v)).size == 3 * v.size
