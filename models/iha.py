"""Interleaved Head Attention (Duvvuri et al. 2026, arXiv 2602.21371): pseudo heads that are mixed from all heads.

Every query head forms P pseudo queries, keys and values of each token, each a learned mixture over all heads. The
pseudo tokens of a token lie next to each other in a virtual sequence P times as long, on which plain attention runs; a
learned collapse makes the P outputs of a head one again. What is cached are the keys and values before they are mixed,
with the key rotated for its token: a model of this kind needs no more cache than its base. (On several devices that
share the heads of a model, each keeps those of all heads.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.config import IHAConfig, ModelConfig
from models.layers import Attention
from models.rope import Rope, angles_at, rotate, turned
from pallas_kernels.pseudo_heads import PseudoHeads, mix

# Smallest initial noise that separates pseudo heads which start as copies, where positions don't (section 6).
INIT_NOISE = 0.02


def schedule(
    num_layers: int, context: int, pseudo_heads: int, *, iha_global: bool = False
) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Windows of layers, and which have IHA, in the paper's proportion: four local IHA layers, then a global one.

    A layer is global if its number, counted from 1, divides by 5, and the last one is. Local windows have
    `context / (2 P^2)` tokens, which costs half of what global attention does (section 5 and appendix C of the paper).

    Args:
      num_layers: of the model.
      context: tokens that it is trained for.
      pseudo_heads: P.
      iha_global: global layers have IHA, too, at P^2 times the cost of plain attention; the paper's count of operations
        only holds without.

    Returns:
      `ModelConfig.layer_windows` and `IHAConfig.layers`.
    """
    window = max(1, context // (2 * pseudo_heads**2))
    is_global = [(layer + 1) % 5 == 0 or layer == num_layers - 1 for layer in range(num_layers)]
    windows = tuple(None if one else window for one in is_global)
    return windows, tuple(layer for layer in range(num_layers) if iha_global or not is_global[layer])


def phases(config: ModelConfig, iha: IHAConfig) -> Rope:
    """What the rotary position of each pseudo head adds to that of its token, `[P, head_dim / 2]`."""
    steps = {"virtual": 1.0, "scaled": 1 / iha.pseudo_heads}.get(iha.rope, 0.0)
    return angles_at(config.rope, config.head_dim, np.arange(iha.pseudo_heads) * steps)


def initial_mixing(sources: int, heads: int, pseudo_heads: int) -> Float[np.ndarray, "sources heads pseudo"]:
    """Mixing weights that make each pseudo head a copy of its own head, or of the key/value head that it shares."""
    own = np.arange(heads) // (heads // sources)
    return np.repeat((np.arange(sources)[:, None] == own)[:, :, None], pseudo_heads, axis=2).astype(np.float32)


def initial_collapse(heads: int, pseudo_heads: int, form: str, select: int | None = None) -> Float[np.ndarray, "*form"]:
    """Weights of the collapse that look at each head's own pseudo heads only.

    Args:
      form: "global", `[out, heads, pseudo]`, or "per_head", `[heads, pseudo]`.
      select: the one pseudo head that counts; None for the mean of all.
    """
    row = np.full(pseudo_heads, 1 / pseudo_heads, np.float32) if select is None else np.eye(pseudo_heads)[select]
    if form == "per_head":
        return np.tile(row, (heads, 1)).astype(np.float32)
    return (np.eye(heads)[:, :, None] * row).astype(np.float32)


def pseudo_queries(
    q: Float[Array, "T H d"], alpha: Float[Array, "H H P"], rope: Rope, phase: Rope
) -> Float[Array, "T H P d"]:
    """Pseudo queries of each token, rotated at their own positions.

    Args:
      q: raw queries.
      alpha: `[source head, head, pseudo head]`.
      rope: of the tokens.
      phase: of the pseudo heads, see `phases`.
    """
    # Rounded once, when they are rotated.
    mixed = mix(q.astype(jnp.promote_types(q.dtype, jnp.float32)), alpha)
    tokens, heads, pseudo, head_dim = mixed.shape
    of_pseudo = turned(Rope(rope.cos[:, None], rope.sin[:, None]), Rope(phase.cos[None], phase.sin[None]))
    rows = mixed.transpose(0, 2, 1, 3).reshape(tokens * pseudo, heads, head_dim)
    of_rows = Rope(of_pseudo.cos.reshape(len(rows), -1), of_pseudo.sin.reshape(len(rows), -1))
    rotated = rotate(rows, of_rows).reshape(tokens, pseudo, heads, head_dim).transpose(0, 2, 1, 3)
    return rotated.astype(q.dtype)


def collapse(out: Float[Array, "T H P d"], weights: Float[Array, "*form"]) -> Float[Array, "T H d"]:
    """One output of each head again, from `weights` of `initial_collapse`'s shapes."""
    wide = jnp.promote_types(out.dtype, jnp.float32)
    form = "thpd,hp->thd" if weights.ndim == 2 else "tgpd,ogp->tod"
    collapsed: jax.Array = jnp.einsum(form, out.astype(wide), weights.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return collapsed.astype(out.dtype)


class InterleavedAttention(Attention):
    """Projections, mixing and collapse of IHA; the attention over cached keys and values is the caller's.

    With `qk_norm`, queries and keys are normalised before they are mixed: keys that are normalised afterwards could not
    be cached unmixed. The mixing weights stay in float32 in a model of any type.

    Attributes:
      alpha_q: `[heads, heads, P]`: source head, head, pseudo head.
      alpha_k, alpha_v: `[key/value heads, heads, P]`.
      collapse_weights: `[heads out, heads, P]`, or `[heads, P]`.
    """

    def __init__(self, config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        if config.iha is None:
            raise ValueError("the configuration has no iha")
        iha, heads = config.iha, config.num_heads
        self._iha, self._window, self._config = iha, config.window_of(index), config

        def noisy(values: np.ndarray) -> nnx.Param:
            noise = INIT_NOISE * jax.random.normal(rngs.params(), values.shape, jnp.float32)
            return nnx.Param(jnp.asarray(values) + noise)

        self.alpha_q = noisy(initial_mixing(heads, heads, iha.pseudo_heads))
        self.alpha_k = noisy(initial_mixing(config.num_kv_heads, heads, iha.pseudo_heads))
        self.alpha_v = noisy(initial_mixing(config.num_kv_heads, heads, iha.pseudo_heads))
        self.collapse_weights = nnx.Param(jnp.asarray(initial_collapse(heads, iha.pseudo_heads, iha.collapse)))

    def project(
        self, x: Float[Array, "T D"], rope: Rope
    ) -> tuple[Float[Array, "T H P d"], Float[Array, "T Hkv d"], Float[Array, "T Hkv d"]]:
        """Rotated pseudo queries, and of every token the raw keys, rotated for the token, and the raw values."""
        q, k, v = self._heads(x)
        rope = rope if rope.virtual is None else rope.virtual
        if self._iha.rope == "none":
            rope = Rope(jnp.ones_like(rope.cos), jnp.zeros_like(rope.sin))
        return pseudo_queries(q, self.alpha_q[...], rope, phases(self._config, self._iha)), rotate(k, rope), v

    def pseudo_heads(self) -> PseudoHeads:
        phase = phases(self._config, self._iha)
        pseudo = PseudoHeads(
            self.alpha_k[...], self.alpha_v[...], phase.cos, phase.sin, mask=self._iha.mask, window=self._window
        )
        return pseudo.within(self._config.max_position_embeddings)

    def output(self, out: Float[Array, "T H P d"]) -> Float[Array, "T D"]:
        """Collapse and output projection."""
        collapsed = collapse(out, self.collapse_weights[...])
        return self.o(collapsed.reshape(collapsed.shape[0], -1))


def is_mixing(path: str) -> bool:
    """Whether a parameter (dotted path) is one of the mixing or collapse weights of IHA."""
    return path.rpartition(".")[2] in ("alpha_q", "alpha_k", "alpha_v", "collapse_weights")


def num_mixing_parameters(config: ModelConfig) -> int:
    """Parameters that IHA adds to a model: in each layer, with as many key/value heads, `4 H^2 P` (global)."""
    if config.iha is None:
        return 0
    heads, pseudo = config.num_heads, config.iha.pseudo_heads
    mixing = heads * pseudo * (heads + 2 * config.num_kv_heads)
    collapsing = heads * pseudo * (heads if config.iha.collapse == "global" else 1)
    return len(config.iha.layers) * (mixing + collapsing)


def virtual_window(pseudo: PseudoHeads) -> tuple[int | None, int]:
    """The mask on the virtual sequence as a causal one: its window, and how many neighbouring places count as one.

    Under the flat mask a window reaches over pseudo keys, under the other one over tokens.
    """
    if pseudo.mask == "token":
        return pseudo.window, pseudo.count
    return (None if pseudo.window is None else pseudo.window * pseudo.count), 1


def virtual_heads(
    q: Float[Array, "T H P d"], k: Float[Array, "T Hkv d"], v: Float[Array, "T Hkv d"], pseudo: PseudoHeads
) -> tuple[Float[Array, "TP H d"], Float[Array, "TP H d"], Float[Array, "TP H d"]]:
    """Queries, keys and values of the virtual sequence, token-major and pseudo-minor."""

    def interleaved(x: Float[Array, "T H P d"]) -> Float[Array, "TP H d"]:
        tokens, heads, count, head_dim = x.shape
        return x.swapaxes(1, 2).reshape(tokens * count, heads, head_dim)

    return interleaved(q), interleaved(pseudo.keys(k)), interleaved(pseudo.values(v))
