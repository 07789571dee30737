"""What a bias of some keys makes of the attention weights of every head: the closed form, through the operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.key_bias import KeyBias, pack
from pallas_kernels.prefill_attention import prefill_attention
from tests.pallas_kernels.paged_battery import SCALE, Case, case

LENGTHS, PAGE, TOKENS = [1, 7, 24, 40, 64], 8, 64
STRENGTHS = np.array([2.0, 1.0, 2.5, 0.5, 8.0], np.float32)
HEADS, KV_HEADS = 6, 2


def one_hot_values(c: Case) -> jax.Array:
    """Pages of values that are unit vectors, the token's own: an output is then the vector of the weights."""
    table, pages = np.asarray(c.arrays["v_page_table"]), np.zeros(c.arrays["v_pages"].shape, np.float32)
    for page in range(TOKENS // PAGE):
        for slot in range(PAGE):
            pages[table[:, page], slot, :, page * PAGE + slot] = 1
    return jnp.asarray(pages)


def by_decode(c: Case, q: jax.Array, implementation: str, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[seqs, heads, tokens]`, and the log of their sums."""
    run = jax.jit(decode_attention, static_argnames=("scale", "return_lse", "implementation"))
    arguments = c.arrays | {"v_pages": one_hot_values(c)} | more
    ends = jnp.asarray(LENGTHS, jnp.int32)
    found = run(q, lengths=ends, scale=SCALE, return_lse=True, implementation=implementation, **arguments)
    return np.asarray(found[0], np.float64), np.asarray(found[1], np.float64)


def by_prefill(c: Case, q: jax.Array, implementation: str, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same by chunks of one token."""
    run = jax.jit(prefill_attention, static_argnames=("scale", "return_lse", "implementation"))
    arguments = c.arrays | {"v_pages": one_hot_values(c)} | more
    starts, counts = jnp.asarray(LENGTHS, jnp.int32) - 1, jnp.ones(len(LENGTHS), jnp.int32)
    out, lse = run(
        q[:, None],
        starts=starts,
        counts=counts,
        scale=SCALE,
        return_lse=True,
        implementation=implementation,
        **arguments,
    )
    return np.asarray(out[:, 0], np.float64), np.asarray(lse[:, 0], np.float64)


@pytest.fixture(
    params=[partial(way, implementation=name) for way in (by_decode, by_prefill) for name in ("xla", "reference")],
    ids=["decode-xla", "decode-reference", "prefill-xla", "prefill-reference"],
)
def weights_of(request: pytest.FixtureRequest) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    found: Callable[..., tuple[np.ndarray, np.ndarray]] = request.param
    return found


def test_raised_weights_grow_by_the_published_factor_in_every_head(
    weights_of: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> None:
    """With M the mass of the raised keys, by strength / (1 + (strength - 1) M); the others by the same without the
    strength, and the sum of all by the denominator."""
    c = case(
        0, LENGTHS, kv_heads=KV_HEADS, head_dim=TOKENS, page_size=PAGE, dtype=jnp.float32, separate_values=True, spare=0
    )
    q = jnp.asarray(c.rng.normal(size=(len(LENGTHS), HEADS, TOKENS)), jnp.float32)
    raised = c.rng.random((len(LENGTHS), TOKENS)) < 0.3
    raised[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = True
    plain, plain_lse = weights_of(c, q)
    np.testing.assert_allclose(plain.sum(axis=-1), 1, atol=1e-6)
    bias = KeyBias(pack(jnp.asarray(raised)), jnp.log(jnp.asarray(STRENGTHS)))
    found, found_lse = weights_of(c, q, key_bias=bias)
    strength = STRENGTHS[:, None].astype(np.float64)
    mass = np.where(raised[:, None], plain, 0).sum(axis=-1)
    rest = 1 + (strength - 1) * mass
    want = np.where(raised[:, None], strength[..., None], 1) * plain / rest[..., None]
    np.testing.assert_allclose(found, want, atol=1e-6, rtol=0)
    np.testing.assert_allclose(found_lse - plain_lse, np.log(rest), atol=2e-6, rtol=0)
    assert mass[1:].min() < 0.1  # heads of many kinds were looked at
    assert mass[1:].max() > 0.9
