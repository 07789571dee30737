"""First weights of the retrieval model: heads that look back and heads that match, set by hand; training goes on there.

From random weights, such heads form late, after more tokens than a small budget has. Here the first layer's heads see
the tokens one, two and three places back and write each into a part of the residual stream of its own.
Two heads of the second layer look for where one part equals another: the token behind the same key as now. They copy
it. All the rest is random, and nothing is held fixed.
"""

import numpy as np

from models import ModelConfig
from models.training.step import Parameters

_OFFSETS = (1, 2, 3)
_SLOT = 24  # numbers that an earlier token is written in
_MATCHED = ((1, 2), (2, 3))  # the offset now, and the offset there, of each pair of heads of the second layer
_PAIRS = (0.4, 0.3, 0.15, 0.1, 0.05)  # weight of each rotated pair in a head that looks back, fastest first
_EMBEDDING, _CONSTANT = 0.1, 0.3  # standard deviation, and the first number of every token
_SLOT_GAIN, _COPY_GAIN = 0.14, 0.3
_BACK_SCALE, _MATCH_SCALE, _FINAL_SCALE = 2.5, 2.5, 3.0


def planted(config: ModelConfig, parameters: Parameters, seed: int) -> Parameters:
    """Parameters with those heads in the first two layers.

    Args:
      config: of the model: two layers or more, four heads of which two share keys and values, `qk_norm`.
      parameters: random ones, by dotted path.
      seed: of embedding and projections.

    Raises:
      ValueError: a configuration that these heads don't fit.
    """
    identity = config.hidden_size - 1 - len(_OFFSETS) * _SLOT
    fits = config.num_layers >= 2 and (config.num_heads, config.num_kv_heads) == (4, 2) and config.qk_norm
    if not fits or identity < config.head_dim or config.head_dim < _SLOT:
        raise ValueError(
            f"config {config}: must have two layers or more, 4 heads, 2 KV heads, qk_norm, and a hidden size of at "
            f"least {1 + len(_OFFSETS) * _SLOT} more than its head size, which must be at least {_SLOT}"
        )
    rng = np.random.default_rng(seed)
    arrays = {name: np.array(value) for name, value in parameters.items()}
    tokens = slice(1, 1 + identity)
    slots = {
        offset: slice(1 + identity + place * _SLOT, 1 + identity + (place + 1) * _SLOT)
        for place, offset in enumerate(_OFFSETS)
    }
    embedding = np.zeros_like(arrays["embedding"])
    embedding[:, 0] = _CONSTANT
    embedding[:, tokens] = rng.normal(0, _EMBEDDING, (len(embedding), identity))
    arrays["embedding"] = embedding
    arrays["norm.scale"][:] = _FINAL_SCALE
    _look_back(config, arrays, _orthonormal(rng, identity, _SLOT), tokens, slots)
    _match(config, arrays, _orthonormal(rng, identity, config.head_dim), tokens, slots)
    return {name: parameters[name].at[...].set(value) for name, value in arrays.items()}


def _look_back(
    config: ModelConfig, arrays: dict[str, np.ndarray], projection: np.ndarray, tokens: slice, slots: dict[int, slice]
) -> None:
    """The first layer: queries that are keys turned by some positions, whatever the tokens are."""
    head, half = config.head_dim, config.head_dim // 2
    q, k, v, o = (arrays[f"layers.0.attention.{name}.kernel"] for name in "qkvo")
    turns = config.rope.theta ** (-np.arange(half) / half)
    weights = np.zeros(half)
    weights[: len(_PAIRS)] = np.sqrt(_PAIRS)

    def turned(offset: int) -> np.ndarray:
        return np.concatenate([weights * np.cos(turns * offset), -weights * np.sin(turns * offset)])

    k[:], v[:] = 0, 0
    for group in range(config.num_kv_heads):
        k[0, group * head : (group + 1) * head] = turned(0)
        v[tokens, group * head : group * head + _SLOT] = projection
    for place, offset in enumerate(_OFFSETS):
        columns = slice(place * head, (place + 1) * head)
        q[:, columns] = 0
        q[0, columns] = turned(offset)
        o[columns] = 0
        o[place * head : place * head + _SLOT, slots[offset]] = _SLOT_GAIN * np.eye(_SLOT)
    for name in ("q_norm", "k_norm"):
        arrays[f"layers.0.attention.{name}.scale"][:] = _BACK_SCALE


def _match(
    config: ModelConfig, arrays: dict[str, np.ndarray], projection: np.ndarray, tokens: slice, slots: dict[int, slice]
) -> None:
    """The second layer: the first head of each two that share keys asks with one slot for another, and copies."""
    head = config.head_dim
    q, k, v, o = (arrays[f"layers.1.attention.{name}.kernel"] for name in "qkvo")
    for group, (now, there) in enumerate(_MATCHED):
        asks, shared = 2 * group * head, group * head
        q[:, asks : asks + head] = 0
        q[slots[now], asks : asks + _SLOT] = np.eye(_SLOT)
        k[:, shared : shared + head] = 0
        k[slots[there], shared : shared + _SLOT] = np.eye(_SLOT)
        v[:, shared : shared + head] = 0
        v[tokens, shared : shared + head] = projection
        o[asks : asks + head] = 0
        o[asks : asks + head, tokens] = _COPY_GAIN * projection.T
    for name in ("q_norm", "k_norm"):
        arrays[f"layers.1.attention.{name}.scale"][:] = _MATCH_SCALE


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """`[rows, columns]` with orthonormal columns."""
    q, _ = np.linalg.qr(rng.normal(size=(rows, columns)))
    return q
