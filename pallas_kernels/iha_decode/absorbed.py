"""The form of Interleaved Head Attention that never makes a pseudo key: queries take over what keys lack.

The score of pseudo key p' is `sum_m alpha_k[m, h, p'] <r, k[m]>`, where r is the pseudo query turned back by the phase
of p', and its value is `sum_m alpha_v[m, h, p'] v[m]`: raw keys and values are all that is read.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pseudo_heads import PseudoHeads


def turned_back(
    q: Float[Array, "batch q_heads pseudo head_dim"], pseudo: PseudoHeads
) -> Float[Array, "batch q_heads pseudo pseudo head_dim"]:
    """Each pseudo query turned back by the phase of each pseudo key, in float32 or wider."""
    half = q.shape[-1] // 2
    wide = jnp.promote_types(q.dtype, jnp.float32)
    first, second = q[..., None, :half].astype(wide), q[..., None, half:].astype(wide)
    turned = [first * pseudo.cos + second * pseudo.sin, second * pseudo.cos - first * pseudo.sin]
    return jnp.concatenate(turned, axis=-1).astype(wide)


_OPERATIONS_A_BYTE = 100  # that an H200 can do while it reads: half of 989 TFLOP/s over 4.8 TB/s


def absorbed_is_faster(q_heads: int, kv_heads: int, count: int) -> bool:
    """Whether a Hopper should read raw keys and values rather than make pseudo ones first and read those.

    By a model, not by measurements. Both in units of reading the raw ones once: absorbed, `q_heads * count**2` queries
    multiply all of them, an operation a byte each; made, pseudo keys and values of `count` pseudo heads are written and
    read.
    """
    absorbed = max(1.0, q_heads * count**2 / _OPERATIONS_A_BYTE)
    return absorbed <= 1 + 2 * count * q_heads / kv_heads


def absorbed_is_cheaper(kv_heads: int, count: int) -> bool:
    """Whether XLA has less to multiply for a decoded token by reading raw keys and values than by mixing them.

    Both in units of `2 * q_heads * count * head_dim` operations a cached token, for `count` pseudo heads: absorbed,
    `count` products with the keys of each source head and one with its values; mixed, a pseudo key and value of all
    source heads, and `count` products with each.
    """
    return kv_heads * (count + 1) < 2 * (kv_heads + count)
