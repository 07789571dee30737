"""Keys and values of pseudo heads, which Interleaved Head Attention mixes from all key/value heads of a token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.checks import check_array
from pallas_kernels.paged import checked_window

type Mask = Literal["flat", "token"]

MASKS: tuple[Mask, ...] = ("flat", "token")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PseudoHeads:
    """How the P pseudo keys and values of each token and query head come from its cached keys and values.

    With the raw keys `k[n, m]` and values `v[n, m]` of token n and key/value head m, those of query head h are

        key(n, h, p) = rotation(p) * sum_m alpha_k[m, h, p] k[n, m]
        value(n, h, p) = sum_m alpha_v[m, h, p] v[n, m]

    where `rotation(p)` turns the pair `(x[i], x[i + head_dim / 2])` by the angle of `cos[p, i]`, `sin[p, i]`. One
    softmax runs over all pseudo keys in sight.

    Attributes:
      alpha_k, alpha_v: `[key/value heads, query heads, pseudo heads]`: source head, destination head, pseudo index.
      cos, sin: `[pseudo heads, head_dim / 2]`: the part of a pseudo key's rotary position that its token's cached key
        lacks. Cosines 1 and sines 0 for none.
      mask: what pseudo query p of token t sees of pseudo key p' of token n. "flat": those before it or at its place in
        the order of tokens and, within a token, of pseudo heads: n < t, or n = t and p' <= p; static. "token": all of
        its own token and of those before.
      window: sliding window in tokens, static; None for all. "flat": each pseudo query sees `window * pseudo heads`
        pseudo keys, so the pair (p, p') sees token n iff `s <= t - n <= window - 1 + s`, where s is 1 if p' > p and 0
        otherwise. "token": `t - n < window`.
    """

    alpha_k: Float[Array, "kv_heads q_heads pseudo"]
    alpha_v: Float[Array, "kv_heads q_heads pseudo"]
    cos: Float[Array, "pseudo half"]
    sin: Float[Array, "pseudo half"]
    mask: Mask = field(default="flat", metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})

    @property
    def count(self) -> int:
        """Pseudo heads of each query head."""
        return int(self.alpha_k.shape[2])

    @property
    def tokens_in_sight(self) -> int | None:
        """Tokens, its own included, that some pseudo query of a token sees; None for all before it."""
        return tokens_in_sight(self.window, self.count, self.mask)

    def sees(self, behind: Int[Array, "*shape"]) -> Bool[Array, "*shape pseudo pseudo"]:
        """Whether pseudo query p sees pseudo key p' of the token that lies `behind` tokens before its own."""
        index = jnp.arange(self.count, dtype=behind.dtype)
        later = index[None, :] > index[:, None]
        shift = later.astype(behind.dtype) if self.mask == "flat" else jnp.zeros_like(later, behind.dtype)
        behind = behind[..., None, None]
        return (behind >= shift) if self.window is None else (behind >= shift) & (behind - shift < self.window)

    def keys(self, k: Float[Array, "*tokens kv_heads head_dim"]) -> Float[Array, "*tokens q_heads pseudo head_dim"]:
        """Pseudo keys of tokens from their raw ones."""
        mixed = mix(k, self.alpha_k)
        half = k.shape[-1] // 2
        wide = jnp.promote_types(mixed.dtype, jnp.float32)
        first, second = mixed[..., :half].astype(wide), mixed[..., half:].astype(wide)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return jnp.concatenate(turned, axis=-1).astype(k.dtype)

    def values(self, v: Float[Array, "*tokens kv_heads head_dim"]) -> Float[Array, "*tokens q_heads pseudo head_dim"]:
        """Pseudo values of tokens from their raw ones."""
        return mix(v, self.alpha_v)


def tokens_in_sight(window: int | None, count: int, mask: str) -> int | None:
    """Tokens, its own included, that some of a token's `count` pseudo queries sees: what a cache must keep."""
    return window if window is None or count == 1 or mask != "flat" else window + 1


def mix(
    x: Float[Array, "*tokens sources head_dim"], alpha: Float[Array, "sources heads pseudo"]
) -> Float[Array, "*tokens heads pseudo head_dim"]:
    """`sum_m alpha[m, h, p] x[..., m, :]`, in float32 or wider; the result has the type of `x`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mixed = jnp.einsum("...md,mhp->...hpd", x.astype(wide), alpha.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return mixed.astype(x.dtype)


def check_pseudo_heads(pseudo: Any, q_heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises `ValueError` unless it is a `PseudoHeads` for these sizes."""
    if not isinstance(pseudo, PseudoHeads):
        raise ValueError(f"pseudo must be a PseudoHeads, not a {type(pseudo).__name__}")
    check_array("alpha_k", pseudo.alpha_k, jnp.floating, (kv_heads, q_heads, "pseudo"))
    check_array("alpha_v", pseudo.alpha_v, jnp.floating, pseudo.alpha_k.shape)
    if head_dim % 2:
        raise ValueError(f"{head_dim=} must be even: rotations turn pairs")
    if pseudo.count < 1:
        raise ValueError("alpha_k has no pseudo heads")
    check_array("cos", pseudo.cos, jnp.floating, (pseudo.count, head_dim // 2))
    check_array("sin", pseudo.sin, jnp.floating, (pseudo.count, head_dim // 2))
    if pseudo.mask not in MASKS:
        raise ValueError(f"mask is {pseudo.mask!r}; known: {', '.join(MASKS)}")
    checked_window(pseudo.window)
