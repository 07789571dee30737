"""Training of models with Interleaved Head Attention: blocked attention and the group of the mixing weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.attention import dense_attend
from models.config import IHAConfig
from models.iha import is_mixing
from models.shapes import parameters_of
from models.training.attention import blocked_attend, seen
from models.training.recipes import Recipe
from models.training.step import losses, optimizer
from pallas_kernels.pseudo_heads import PseudoHeads

type Attention = Callable[..., tuple[jax.Array, Any]]

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 66, 4, 2, 8


def out_and_gradients(attention: Attention, *arrays: jax.Array) -> list[jax.Array]:
    """Of all arrays, through a function of the output that is not linear."""

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, _ = attention(*arrays)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(total, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    return [out, *gradients]


def agree(*makers: Callable[..., Attention], arrays: list[jax.Array], of: Callable[[Attention], Attention]) -> None:
    ours, expected = (out_and_gradients(of(make(BATCH, LENGTH)), *arrays) for make in makers)
    for one, other in zip(ours, expected, strict=True):
        assert jnp.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


def random(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(number), shape) for number, shape in enumerate(shapes)]


@pytest.mark.parametrize("window", [1, 30])
def test_blocked_attention_in_a_window_is_the_dense_one(window: int) -> None:
    tokens = BATCH * LENGTH
    arrays = random((tokens, HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM))
    windows = (None, window)

    def second_layer(attend: Attention) -> Attention:
        return lambda q, k, v: attend(1, q, k, v, None)

    agree(
        lambda batch, length: blocked_attend(batch, length, windows),
        lambda batch, length: dense_attend(batch, length, windows),
        arrays=arrays,
        of=second_layer,
    )


@pytest.mark.parametrize(
    ("mask", "pseudo", "window"),
    [("flat", 2, None), ("flat", 3, 5), ("token", 3, None), ("token", 3, 21)],
)
def test_blocked_attention_of_pseudo_heads_is_the_dense_one(mask: str, pseudo: int, window: int | None) -> None:
    """Values, and gradients of queries, raw keys and values, and mixing weights; blocks end within tokens at P = 3."""
    tokens = BATCH * LENGTH
    arrays = random(
        (tokens, HEADS, pseudo, HEAD_DIM),
        (tokens, KV_HEADS, HEAD_DIM),
        (tokens, KV_HEADS, HEAD_DIM),
        (KV_HEADS, HEADS, pseudo),
        (KV_HEADS, HEADS, pseudo),
    )
    angles = np.arange(pseudo)[:, None] * np.array([1.0, 0.3, 0.1, 0.03])

    def of_mixing(attend: Attention) -> Attention:
        def attention(
            q: jax.Array, k: jax.Array, v: jax.Array, alpha_k: jax.Array, alpha_v: jax.Array
        ) -> tuple[jax.Array, Any]:
            turn = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
            heads = PseudoHeads(alpha_k, alpha_v, *turn, mask=mask, window=window)  # type: ignore[arg-type]
            return attend(0, q, k, v, None, heads)

        return attention

    agree(blocked_attend, dense_attend, arrays=arrays, of=of_mixing)


def test_blocks_compute_only_keys_in_sight() -> None:
    assert seen(128, 192, None) == (0, 192)
    assert seen(128, 192, 16) == (113, 192)
    assert seen(0, 64, 16) == (0, 64)
    # Whole tokens of three pseudo heads: that of query 128 is token 42, that of query 191 is token 63.
    assert seen(128, 192, 2, 3) == (123, 192)
    assert seen(128, 191, None, 3) == (0, 192)


# The optimiser


RECIPE = Recipe(tokens_per_step=32, length=16, long_length=16, weight_decay=0.5, mixing_rate=3.0)
OTHERS = {"embedding": (8, 4), "layers.0.attention.q.kernel": (4, 8), "layers.0.attention_norm.scale": (4,)}


def mixing_shapes(collapse: str) -> dict[str, tuple[int, ...]]:
    shapes = {"alpha_q": (4, 4, 2), "alpha_k": (2, 4, 2), "alpha_v": (2, 4, 2)}
    shapes["collapse_weights"] = (4, 4, 2) if collapse == "global" else (4, 2)
    return {f"layers.0.attention.{name}": shape for name, shape in shapes.items()}


def updates(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Any]:
    """Gradients of weights that are all one, the first updates of them, and the optimiser's state before."""
    weights = {name: jnp.ones(shape, jnp.float32) for name, shape in shapes.items()}
    # Smaller than what is clipped.
    drawn = {name: np.random.default_rng(len(name)).normal(size=shape) for name, shape in shapes.items()}
    gradients = {name: jnp.asarray(1e-2 * value, jnp.float32) for name, value in drawn.items()}
    rule = optimizer(RECIPE, weights)
    state = rule.init(weights)
    return gradients, jax.jit(rule.update)(gradients, state, weights)[0], state


@pytest.mark.parametrize("collapse", ["global", "per_head"])
def test_mixing_weights_are_a_group_of_their_own_without_decay(collapse: str) -> None:
    mixing = mixing_shapes(collapse)
    gradients, found, _ = updates(OTHERS | mixing)
    for name in mixing:
        # Adam's first step is the sign of the gradient; decay would take half of the weight itself.
        np.testing.assert_allclose(found[name], -3.0 * jnp.sign(gradients[name]), rtol=1e-3)
    _, without, state = updates(OTHERS)
    for name in OTHERS:
        np.testing.assert_array_equal(found[name], without[name])
    # Runs of models without mixing that were begun before find the state that they left.
    (groups,) = [part.inner_states for part in state if hasattr(part, "inner_states")]
    assert groups.keys() == {"muon", "adam"}


def test_a_step_trains_every_weight_of_a_model_with_pseudo_heads_and_windows() -> None:
    config = models.ModelConfig(
        family="jaxdual_iha",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        qk_norm=True,
        layer_windows=(3, 5),
        iha=IHAConfig(pseudo_heads=2, layers=(0,)),
    )
    model = models.init(config, seed=0)
    parameters = parameters_of(model)
    assert {name for name in parameters if is_mixing(name)} == mixing_shapes("global").keys()
    windows = np.random.default_rng(0).integers(0, 64, (2, 17)).astype(np.int32)
    logits = np.asarray(model.logits(windows[:, :-1]), np.float64)
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], 2)[..., 0])
    gradient = jax.jit(jax.grad(losses, argnums=2, has_aux=True), static_argnums=(0, 1))
    gradients, cross_entropy = gradient(config, RECIPE, parameters, jnp.asarray(windows))
    assert float(cross_entropy) == pytest.approx(expected, rel=1e-5)
    assert all(jnp.abs(value).max() > 0 for value in gradients.values())
