"""Gradients of mixing and collapse weights: against finite differences, and where copies of heads stay copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import pseudo_attention
from models.config import IHAConfig, ModelConfig
from models.iha import INIT_NOISE, collapse, initial_collapse, initial_mixing, num_mixing_parameters, phases
from models.iha import pseudo_queries as queries_of
from models.rope import angles_at, rotate
from pallas_kernels.pseudo_heads import PseudoHeads, mix

HEADS, KV_HEADS, HEAD_DIM, PSEUDO, TOKENS = 4, 2, 6, 3, 5


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Weights(NamedTuple):
    alpha_q: jax.Array
    alpha_k: jax.Array
    alpha_v: jax.Array
    collapse: jax.Array


def weights_of(form: str = "global", noise: float = 0.0) -> Weights:
    rng = np.random.default_rng(3)
    values = (
        initial_mixing(HEADS, HEADS, PSEUDO),
        initial_mixing(KV_HEADS, HEADS, PSEUDO),
        initial_mixing(KV_HEADS, HEADS, PSEUDO),
        initial_collapse(HEADS, PSEUDO, form),
    )
    return Weights(*(jnp.asarray(one + noise * rng.normal(size=one.shape), jnp.float64) for one in values))


def loss_of(mask: str, rope: str, window: int | None = None) -> Callable[[Weights], jax.Array]:
    """The square of a random projection of a layer's output, by the models' own functions."""
    iha = IHAConfig(pseudo_heads=PSEUDO, layers=(0,), mask=mask, rope=rope)  # type: ignore[arg-type]
    config = ModelConfig(
        family="jaxdual_iha",
        vocab_size=8,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=8,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        iha=iha,
    )
    rng = np.random.default_rng(0)
    q, direction = (jnp.asarray(x) for x in rng.normal(size=(2, TOKENS, HEADS, HEAD_DIM)))
    k, v = (jnp.asarray(x) for x in rng.normal(size=(2, TOKENS, KV_HEADS, HEAD_DIM)))
    places = np.arange(TOKENS) * {"virtual": PSEUDO, "none": 0}.get(rope, 1)
    own, phase = angles_at(config.rope, HEAD_DIM, places), phases(config, iha)

    def loss(weights: Weights) -> jax.Array:
        pseudo = PseudoHeads(weights.alpha_k, weights.alpha_v, phase.cos, phase.sin, mask=iha.mask, window=window)
        out = pseudo_attention(1, queries_of(q, weights.alpha_q, own, phase), rotate(k, own), v, pseudo)
        return jnp.sum(collapse(out, weights.collapse) * direction) ** 2

    return loss


@pytest.mark.parametrize(("mask", "window"), [("flat", None), ("flat", 2), ("token", 2)])
@pytest.mark.parametrize("form", ["global", "per_head"])
def test_gradients_are_finite_differences(mask: str, window: int | None, form: str) -> None:
    loss = jax.jit(loss_of(mask, "virtual", window))
    weights = weights_of(form, noise=0.3)
    gradient = jax.jit(jax.grad(loss))(weights)
    rng = np.random.default_rng(1)
    step = 1e-6
    for name, value in weights._asdict().items():
        for place in rng.choice(value.size, 6, replace=False):
            bump = jnp.zeros(value.size).at[place].set(step).reshape(value.shape)
            above, below = (loss(weights._replace(**{name: value + sign * bump})) for sign in (1, -1))
            slope = float((above - below) / (2 * step))
            assert float(getattr(gradient, name).ravel()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def spread(gradient: jax.Array) -> float:
    """The largest difference between pseudo heads, by the largest gradient."""
    return float((gradient.max(axis=-1) - gradient.min(axis=-1)).max() / jnp.abs(gradient).max())


@pytest.mark.parametrize("rope", ["token", "none"])
def test_copies_get_equal_gradients_under_the_token_mask(rope: str) -> None:
    gradient = jax.jit(jax.grad(loss_of("token", rope)))(weights_of("per_head"))
    assert max(map(spread, gradient)) < 1e-12
    # Under the flat mask the same weights come apart.
    apart = jax.jit(jax.grad(loss_of("flat", rope)))(weights_of("per_head"))
    assert min(map(spread, apart)) > 1e-2


@pytest.mark.parametrize("rope", ["virtual", "scaled"])
def test_positions_of_pseudo_heads_tell_copies_apart(rope: str) -> None:
    gradient = jax.jit(jax.grad(loss_of("token", rope)))(weights_of("per_head"))
    assert min(map(spread, gradient)) > 1e-2


def test_initial_noise_tells_copies_apart() -> None:
    gradient = jax.jit(jax.grad(loss_of("token", "token")))(weights_of("per_head", noise=INIT_NOISE))
    assert min(map(spread, gradient)) > 1e-3


def test_keys_and_values_stay_tied_where_the_collapse_takes_the_last() -> None:
    weights = weights_of()._replace(collapse=jnp.asarray(initial_collapse(HEADS, PSEUDO, "global", PSEUDO - 1)))
    gradient = jax.jit(jax.grad(loss_of("flat", "none")))(weights)
    assert max(spread(gradient.alpha_k), spread(gradient.alpha_v)) < 1e-12
    assert spread(gradient.alpha_q) > 1e-2


def test_per_head_collapse_is_a_block_diagonal_global_one() -> None:
    rng = np.random.default_rng(4)
    out, weights = rng.normal(size=(TOKENS, HEADS, PSEUDO, HEAD_DIM)), rng.normal(size=(HEADS, PSEUDO))
    block = np.zeros((HEADS, HEADS, PSEUDO))
    block[np.arange(HEADS), np.arange(HEADS)] = weights
    one, other = (collapse(jnp.asarray(out), jnp.asarray(form)) for form in (weights, block))
    np.testing.assert_allclose(one, other, atol=1e-14)


@pytest.mark.parametrize("form", ["global", "per_head"])
def test_mixing_folds_into_the_projections(form: str) -> None:
    rng = np.random.default_rng(5)
    width = HEADS * HEAD_DIM
    x, projection = rng.normal(size=(TOKENS, width)), rng.normal(size=(width, KV_HEADS, HEAD_DIM))
    alpha = rng.normal(size=(KV_HEADS, HEADS, PSEUDO))
    mixed = mix(jnp.einsum("tD,Dmd->tmd", x, projection), jnp.asarray(alpha))
    folded = np.einsum("mhp,Dmd->Dhpd", alpha, projection)
    np.testing.assert_allclose(mixed, np.einsum("tD,Dhpd->thpd", x, folded), atol=1e-12)

    out, last = rng.normal(size=(TOKENS, HEADS, PSEUDO, HEAD_DIM)), rng.normal(size=(HEADS, HEAD_DIM, width))
    weights = rng.normal(size=initial_collapse(HEADS, PSEUDO, form).shape)
    collapsed = jnp.einsum("thd,hdD->tD", collapse(jnp.asarray(out), jnp.asarray(weights)), last)
    folded = np.einsum("ogp,odD->gpdD" if form == "global" else "gp,gdD->gpdD", weights, last)
    np.testing.assert_allclose(collapsed, np.einsum("tgpd,gpdD->tD", out, folded), atol=1e-12)


def test_as_many_parameters_as_the_weights_have() -> None:
    weights = weights_of()
    config = ModelConfig(
        family="jaxdual_iha",
        vocab_size=8,
        hidden_size=24,
        intermediate_size=8,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        iha=IHAConfig(pseudo_heads=PSEUDO, layers=(0,)),
    )
    assert num_mixing_parameters(config) == sum(one.size for one in weights)
