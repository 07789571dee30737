"""A layer with scales in it is the same function: every family, in float64 and float32, and what would not be."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from jaxdual.pruning.induction.absorb import QUERIES, absorb, input_scales, scale_sizes
from jaxdual.pruning.layer_state import write_layer
from jaxdual.pruning.linears import ATTENTION, ATTENTION_OUT, MLP, MLP_OUT, inputs_of, linears_of
from jaxdual.pruning.methods import METHODS
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from models.attention import dense_attend
from models.shapes import parameters_of
from tests.engine.models import load

# Grouped and single key-value heads, biases, norms of queries and keys, tied embeddings, experts in all or some layers,
# windows, stretched rotary positions.
FAMILIES = [
    "llama", "llama_biases", "llama3_rope", "qwen2", "qwen3", "qwen3_yarn", "mixtral", "qwen3_moe", "qwen3_moe_mixed",
    "mistral_mixed",
]  # fmt: skip
LENGTH = 40


def wide(name: str, dtype: Any = jnp.float64) -> models.Decoder:
    """A model with biases and norms that are not zeros and ones, in another type."""
    graph, state = nnx.split(load(name))
    draw = np.random.default_rng(3)

    def value(path: Any, leaf: jax.Array) -> jax.Array:
        plain = path[-1].key if hasattr(path[-1], "key") else ""
        found = np.asarray(leaf, np.float64)
        if plain in ("bias", "scale"):
            found = found + 0.1 * draw.normal(size=leaf.shape)
        return jnp.asarray(found, dtype)

    model: models.Decoder = nnx.merge(graph, jax.tree_util.tree_map_with_path(value, state))
    return model


def outputs(model: models.Decoder) -> np.ndarray:
    """Logits, with the output head's product in float64."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 90, LENGTH))
    attend = dense_attend(1, LENGTH, model.config.layer_windows)
    x, _ = model(tokens, jnp.arange(LENGTH), attend, None)
    head = model.embedding[...].T if model.lm_head is None else model.lm_head.kernel[...]
    return np.asarray(model.final_norm(x), np.float64) @ np.asarray(head, np.float64)


def random_scales(model: models.Decoder, index: int, spread: float = 0.7) -> dict[str, jax.Array]:
    draw, parameters = np.random.default_rng(index), parameters_of(model.layers[index])
    dtype = next(iter(parameters.values())).dtype
    return {
        key: jnp.asarray(np.exp(spread * draw.normal(size=shape)), dtype)
        for key, shape in scale_sizes(model.config, parameters).items()
    }


def absorb_everywhere(model: models.Decoder, *, inverse: bool = False) -> None:
    for index, layer in enumerate(model.layers):
        scales = random_scales(model, index)
        if inverse:
            scales = {key: 1 / scale for key, scale in scales.items()}
        write_layer(layer, absorb(model.config, parameters_of(layer), scales))


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_in_all_pairs_leave_the_logits_as_they_were(name: str) -> None:
    with jax.enable_x64(True):
        model = wide(name)
        before = outputs(model)
        first = {path: np.asarray(value) for path, value in parameters_of(model.layers[0]).items()}
        absorb_everywhere(model)
        assert np.abs(outputs(model) - before).max() < 1e-9
        changed = [
            path for path, value in parameters_of(model.layers[0]).items() if not np.allclose(value, first[path])
        ]
        kernels = {"attention.v.kernel", "attention.o.kernel", "attention.q.kernel", "attention.k.kernel"}
        assert kernels | {"attention_norm.scale", "mlp_norm.scale"} <= set(changed)
        absorb_everywhere(model, inverse=True)
        for path, value in parameters_of(model.layers[0]).items():
            np.testing.assert_allclose(value, first[path], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_float32_too(name: str) -> None:
    model = wide(name, jnp.float32)
    before = outputs(model)
    absorb_everywhere(model)
    assert np.abs(outputs(model) - before).max() < 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_all_scales_that_it_can(name: str) -> None:
    model = load(name)
    for index, layer in enumerate(model.layers):
        sizes = scale_sizes(model.config, parameters_of(layer))
        assert (QUERIES in sizes) == (not model.config.qk_norm)
        assert set(sizes) - {QUERIES} == {ATTENTION, ATTENTION_OUT, MLP, MLP_OUT}
        experts = model.config.moe.num_experts if model.config.is_sparse(index) and model.config.moe else 1
        assert sizes[MLP_OUT][0] == experts


def test_a_scale_that_tears_a_rotary_pair_changes_the_logits() -> None:
    with jax.enable_x64(True):
        model = wide("llama")
        before = outputs(model)
        layer, config = model.layers[0], model.config
        scale = jnp.exp(0.7 * jnp.asarray(np.random.default_rng(1).normal(size=(config.num_kv_heads, config.head_dim))))
        of_queries = jnp.repeat(scale, config.num_heads // config.num_kv_heads, axis=0).reshape(-1)
        layer.attention.q.kernel[...] = layer.attention.q.kernel[...] * of_queries
        layer.attention.k.kernel[...] = layer.attention.k.kernel[...] / scale.reshape(-1)
        assert np.abs(outputs(model) - before).max() > 1e-3


def test_scales_behind_a_norm_of_queries_are_refused() -> None:
    model = load("qwen3")
    with pytest.raises(ValueError, match="'queries'"):
        absorb(model.config, parameters_of(model.layers[0]), {QUERIES: jnp.ones((1, 8))})


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_moments_of_a_folded_layer_are_those_before_by_the_scales(name: str) -> None:
    """Equation 10 of the paper, with each group of matrices; Wanda's choice is then the same in every row."""
    with jax.enable_x64(True):
        model = wide(name)
        x = model.embed(jnp.asarray(np.random.default_rng(0).integers(0, 90, LENGTH)))
        rope, layer, config = model.rope(jnp.arange(LENGTH)), model.layers[0], model.config
        linears = linears_of(config, 0)

        def inputs() -> dict[str, tuple[np.ndarray, Any]]:
            found = inputs_of(layer, x, rope, lambda *args: dense_attend(1, LENGTH)(0, *args))
            return {group: (np.asarray(values), counts) for group, values, counts in found}

        def masks(seen: dict[str, tuple[np.ndarray, Any]]) -> dict[str, np.ndarray]:
            pattern, method = Pattern.parse("2:4"), METHODS["wanda"]
            return {
                one.name: np.asarray(
                    pattern.kept(method.score(one.read(layer), moments_of(*seen[one.group])).astype(jnp.float32), "row")
                )
                for one in linears
            }

        before, chosen = inputs(), masks(inputs())
        scales = random_scales(model, 0)
        write_layer(layer, absorb(config, parameters_of(layer), scales))
        after, divided = inputs(), input_scales(config, scales)
        for one in linears:
            scale = divided[one.kind][one.expert if one.expert is not None and len(divided[one.kind]) > 1 else 0]
            np.testing.assert_allclose(after[one.group][0] * np.asarray(scale), before[one.group][0], rtol=1e-9)
            refreshed = moments_of(*before[one.group]).divided(scale.astype(jnp.float32))
            for found, wanted in zip(
                dataclasses.astuple(refreshed), dataclasses.astuple(moments_of(*after[one.group])), strict=True
            ):
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
        again = masks(after)
        differing = sum(int((again[key] != mask).sum()) for key, mask in chosen.items())
        assert differing <= 2e-4 * sum(mask.size for mask in chosen.values()), "but for ties"


def moments_of(values: np.ndarray, counts: Any) -> Moments:
    weight = None if counts is None else jnp.asarray(counts, jnp.float32)
    return Moments.none(values.shape[1], whole=False).with_tokens(jnp.asarray(values, jnp.float32), weight)
