"""Structured pruning against references in NumPy, and against models in which what goes counts for nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.structured.plan import MULTIPLE, Structure, smaller_config
from jaxdual.pruning.structured.refit import refit, relative_error
from jaxdual.pruning.structured.removal import expert_importance, neuron_importance
from jaxdual.pruning.structured.run import SmallerLayer, chosen_widths, prune_structured
from jaxdual.pruning.structured.widths import ErrorCurve, allocate
from models import Decoder
from models.attention import dense_attend
from models.shapes import parameters_of, with_parameters
from tests.engine.models import folder, load
from tests.pruned_models import KINDS, random_model

LENGTH = 48
WINDOWS = np.random.default_rng(1).integers(0, 90, (4, LENGTH)).astype(np.int32)
TOKENS = WINDOWS[:2, :24]


def pruned(model: Decoder, structure: Structure, windows: np.ndarray = WINDOWS) -> tuple[Decoder, list[SmallerLayer]]:
    told: list[SmallerLayer] = []
    widths = chosen_widths(model, windows, structure)
    return prune_structured(model, windows, structure, widths, done=told.append), told


def changed(model: Decoder, change: Any) -> Decoder:
    """A model of which some parameters are others."""
    parameters = parameters_of(model)
    return with_parameters(model.config, {path: change(path, value) for path, value in parameters.items()})


def moments_of(x: np.ndarray) -> Moments:
    first, second = np.split(x.astype(np.float32), [len(x) // 3])
    return Moments.none(x.shape[1], whole=True).with_tokens(jnp.asarray(first)).with_tokens(jnp.asarray(second))


@pytest.mark.parametrize("shift", [False, True])
def test_a_refit_is_least_squares_with_a_ridge_at_the_weights_before(shift: bool) -> None:
    rng = np.random.default_rng(0)
    tokens, inputs, kept = 200, 24, np.sort(rng.permutation(24)[:10])
    x = rng.normal(size=(tokens, inputs)) @ rng.normal(size=(inputs, inputs)) + rng.normal(size=inputs)
    weights = rng.normal(size=(7, inputs))
    after, bias = refit(weights, kept, moments_of(x), shift=shift)
    # One row a token, and one of each kept input for the ridge, which a constant input has no part in.
    spread = x - x.mean(0) if shift else x
    ridge = 0.01 * np.mean(spread**2)
    rows = np.concatenate([x[:, kept] / np.sqrt(tokens), np.sqrt(ridge) * np.eye(10)])
    wanted = np.concatenate([x @ weights.T / np.sqrt(tokens), np.sqrt(ridge) * weights[:, kept].T])
    if shift:
        rows = np.concatenate([rows, np.r_[np.ones(tokens) / np.sqrt(tokens), np.zeros(10)][:, None]], axis=1)
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(after, found[:, :10], atol=1e-4)
    np.testing.assert_allclose(bias, found[:, 10] if shift else 0, atol=1e-4)
    lost = x @ weights.T - x[:, kept] @ after.T - bias
    error = relative_error(weights, after, kept, moments_of(x), shift=shift)
    assert error == pytest.approx(np.sum(lost**2) / np.sum((x @ weights.T) ** 2), rel=1e-3)
    plain = np.sum((x @ weights.T - x[:, kept] @ weights[:, kept].T) ** 2) / np.sum((x @ weights.T) ** 2)
    assert error < 0.9 * plain, "the refit makes up for something"


@pytest.mark.parametrize(
    ("name", "shift"), [("qwen3", False), ("qwen2", True), ("llama_biases", True), ("mistral_mixed", False)]
)
def test_neurons_that_are_always_zero_go_and_nothing_changes(name: str, shift: bool) -> None:
    def silent(path: str, value: jax.Array) -> jax.Array:
        return value.at[..., ::3].set(0) if path.endswith(("mlp.up.kernel", "mlp.up.bias")) else value

    model = changed(load(name), silent)
    want = model.logits(TOKENS)
    before = model.config.intermediate_size
    smaller, told = pruned(model, Structure(share=0.25, shift=shift))
    after = smaller.config.intermediate_size
    assert (before, after) in ((128, 96), (48, 32))
    assert smaller.config.family == ("jaxdual_pruned" if name == "qwen2" else load(name).config.family)
    np.testing.assert_allclose(smaller.logits(TOKENS), want, atol=1e-4 if shift else 2e-5)
    for layer in told:
        assert (layer.neurons, layer.experts) == ((after, before), (0, 0))
        assert layer.error < 1e-7


def test_importance_is_the_size_of_what_a_neuron_adds() -> None:
    layer = load("qwen3").layers[0]
    x = np.random.default_rng(3).normal(2, 1, size=(100, 128))
    down = np.asarray(layer.mlp.down.kernel[...])
    for shift, size in ((False, np.sqrt(np.mean(x**2, axis=0))), (True, x.std(0))):
        found = neuron_importance(layer, moments_of(x), shift=shift)
        np.testing.assert_allclose(found, size * np.linalg.norm(down, axis=1), rtol=1e-3)
    scale = np.arange(128) + 1.0
    scaled = neuron_importance(layer, moments_of(x), shift=True, scale=jnp.asarray(scale))
    np.testing.assert_allclose(scaled, found * scale, rtol=1e-6)


def with_learned(scales: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, list[SmallerLayer]]:
    told: list[SmallerLayer] = []
    monkeypatch.setattr("jaxdual.pruning.structured.run.learn_neuron_scales", lambda *args: jnp.asarray(scales))
    model = models.load(folder("qwen3"), dtype="float32")
    structure, widths = Structure(share=0.25), [96] * model.config.num_layers
    smaller = prune_structured(model, WINDOWS, structure, widths, done=told.append, induction=Induction())
    return smaller, told


def test_learned_scales_choose_what_stays_only_where_that_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = np.full(128, 1e-6)
    chosen[5:101] = 1
    whole, (plain, _) = load("qwen3"), pruned(models.load(folder("qwen3"), dtype="float32"), Structure(share=0.25))
    smaller, told = with_learned(chosen, monkeypatch)
    for index, layer in enumerate(told):
        assert layer.taken == min(layer.errors, key=lambda name: layer.errors[name])
        gate = whole.layers[index].mlp.gate.kernel[...][:, 5:101]
        assert np.array_equal(smaller.layers[index].mlp.gate.kernel[...], gate) == (layer.taken == "induced")
    monkeypatch.setattr("jaxdual.pruning.ways.layer_error", lambda *args: next(falling))
    falling = iter(-np.arange(100.0))
    smaller, told = with_learned(chosen, monkeypatch)
    assert [layer.taken for layer in told] == ["induced"] * len(told)
    gate = whole.layers[0].mlp.gate.kernel[...]
    np.testing.assert_array_equal(smaller.layers[0].mlp.gate.kernel[...], gate[:, 5:101])
    falling = itertools.repeat(0.0)
    smaller, told = with_learned(chosen, monkeypatch)
    assert [layer.taken for layer in told] == ["plain"] * len(told)
    for path, value in parameters_of(plain).items():
        np.testing.assert_array_equal(value, parameters_of(smaller)[path])


def test_scales_of_neurons_are_learned() -> None:
    model, told = models.load(folder("qwen3"), dtype="float32"), []  # type: tuple[Decoder, list[SmallerLayer]]
    structure, widths = Structure(share=0.25), [96] * model.config.num_layers
    prune_structured(model, WINDOWS, structure, widths, done=told.append, induction=Induction(rate=0.1, epochs=4))
    assert all(set(layer.errors) == {"plain", "induced"} for layer in told)
    assert any(layer.errors["induced"] != layer.errors["plain"] for layer in told)


@functools.cache
def with_heads(name: str) -> Decoder:
    """A model of the tests, or one with four key-value heads."""
    if name != "four":
        return load(name)
    return random_model(dataclasses.replace(KINDS["pruned_window"], num_heads=8, num_kv_heads=4, head_dim=8))


@pytest.mark.parametrize("name", ["qwen3", "llama_biases", "four", "qwen3_moe"])
def test_a_key_value_head_goes_with_its_queries_as_if_nobody_read_them(name: str) -> None:
    unread = 1  # the second group

    def without(path: str, value: jax.Array) -> jax.Array:
        if not path.endswith("attention.o.kernel"):
            return value
        size = value.shape[0] // before.num_kv_heads
        return value.at[unread * size : (unread + 1) * size].set(0)

    before = with_heads(name).config
    model = changed(with_heads(name), without)
    want = model.logits(TOKENS)
    smaller, told = pruned(model, Structure(kv_groups=1))
    config = smaller.config
    assert (config.num_heads, config.num_kv_heads) == (
        before.num_heads - before.num_heads // before.num_kv_heads,
        before.num_kv_heads - 1,
    )
    assert (config.family, config.head_dim, config.qk_norm) == (before.family, before.head_dim, before.qk_norm)
    np.testing.assert_allclose(smaller.logits(TOKENS), want, atol=5e-5)
    assert all(layer.kv_heads == (config.num_kv_heads, before.num_kv_heads) for layer in told)


def test_a_key_value_head_that_is_read_is_made_up_for() -> None:
    for shift in (False, True):
        smaller, told = pruned(models.load(folder("qwen3"), dtype="float32"), Structure(kv_groups=1, shift=shift))
        attention = smaller.layers[0].attention
        assert (attention.o.bias is not None) == shift
        assert 0 < told[0].error < 1
        original = np.asarray(load("qwen3").layers[0].attention.o.kernel[...])
        kept = np.asarray(attention.o.kernel[...])
        assert not any(np.allclose(kept, part) for part in np.split(original, load("qwen3").config.num_kv_heads))


def outputs_of_experts(mlp: Any, x: np.ndarray) -> np.ndarray:
    """`[experts, tokens, hidden]`"""
    gate, up, down = (np.asarray(getattr(mlp.experts, name)[...], np.float64) for name in ("gate", "up", "down"))
    inner = np.einsum("td,edf->etf", x, gate)
    return np.einsum("etf,efd->etd", inner / (1 + np.exp(-inner)) * np.einsum("td,edf->etf", x, up), down)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_experts_that_add_least_go_and_their_tokens_to_the_others(name: str) -> None:
    model = models.load(folder(name), dtype="float32")
    config = model.config
    assert config.moe is not None
    layer = load(name).layers[0]
    attend = partial(dense_attend(1, LENGTH, config.layer_windows), 0)
    rope = model.rope(jnp.arange(LENGTH))
    found = np.zeros(config.moe.num_experts)
    wanted = np.zeros(config.moe.num_experts)
    for window in WINDOWS:
        x = model.embed(jnp.asarray(window))
        found += np.asarray(expert_importance(layer, x, rope, attend))
        q, k, v = layer.attention.project(layer.attention_norm(x), rope)
        normed = layer.mlp_norm(x + layer.attention.output(attend(q, k, v, None)[0]))
        norms = np.linalg.norm(outputs_of_experts(layer.mlp, np.asarray(normed, np.float64)), axis=-1)
        for token, (experts, weights) in enumerate(zip(*layer.mlp.route(normed), strict=True)):
            for expert, weight in zip(np.asarray(experts), np.asarray(weights), strict=True):
                wanted[expert] += weight * norms[expert, token]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    smaller, told = pruned(model, Structure(share=0.4))
    assert smaller.config.moe is not None
    count = smaller.config.moe.num_experts
    assert smaller.config.family == name
    assert told[0].experts == (count, config.moe.num_experts)
    assert config.moe.num_experts_per_tok <= count < config.moe.num_experts
    kept = np.sort(np.argsort(wanted)[-count:])
    normed = np.asarray(layer.mlp_norm(model.embed(jnp.asarray(WINDOWS[0]))), np.float64)
    scores = np.exp(normed @ np.asarray(layer.mlp.router.kernel[...], np.float64)[:, kept])
    scores /= scores.sum(1, keepdims=True)
    chosen = np.argsort(-scores, axis=1)[:, : config.moe.num_experts_per_tok]
    weights = np.take_along_axis(scores, chosen, 1)
    weights = weights / weights.sum(1, keepdims=True) if config.moe.norm_topk_prob else weights
    outputs = outputs_of_experts(layer.mlp, normed)[kept]
    want = sum(weights[:, [k]] * outputs[chosen[:, k], np.arange(LENGTH)] for k in range(chosen.shape[1]))
    np.testing.assert_allclose(smaller.layers[0].mlp(jnp.asarray(normed, jnp.float32)), want, atol=2e-4)


def test_in_mixed_models_dense_layers_lose_neurons_and_mixtures_experts() -> None:
    model = models.load(folder("qwen3_moe_mixed"), dtype="float32")
    before = model.config
    smaller, told = pruned(model, Structure(share=0.5, kv_groups=1))
    config = smaller.config
    assert config.family == "qwen3_moe"
    for index, layer in enumerate(told):
        assert (layer.neurons == (0, 0)) == (layer.experts != (0, 0)) == before.is_sparse(index)
    assert config.intermediate_size < before.intermediate_size
    assert config.moe is not None
    assert before.moe is not None
    assert config.moe.num_experts == before.moe.num_experts // 2


def test_half_of_the_neurons_is_half_of_the_bytes_of_the_mlps() -> None:
    config = dataclasses.replace(KINDS["pruned"], layer_intermediate_sizes=(), intermediate_size=64)
    model = random_model(config)
    before = {path: value.nbytes for path, value in parameters_of(model).items()}
    smaller, _ = pruned(model, Structure(share=0.5))
    after = {path: value.nbytes for path, value in parameters_of(smaller).items()}
    assert before.keys() == after.keys()
    for path, size in before.items():
        halved = ".mlp." in path and not path.endswith("down.bias")
        assert after[path] == (size // 2 if halved else size), path


def test_widths_by_error_take_from_the_layer_where_less_is_lost() -> None:
    weak = 1

    def fainter(path: str, value: jax.Array) -> jax.Array:
        return value * 1e-3 if path == f"layers.{weak}.mlp.down.kernel" else value

    model = changed(load("qwen3"), fainter)
    layers = model.config.num_layers
    structure = Structure(share=0.25, widths="error")
    widths = chosen_widths(model, WINDOWS, structure)
    assert widths[weak] == MULTIPLE < min(widths[:weak] + widths[weak + 1 :])
    assert sum(widths) == 96 * layers
    smaller, _ = pruned(model, structure)
    assert smaller.config.family == "jaxdual_pruned"
    assert smaller.config.layer_intermediate_sizes == tuple(widths)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    seed=st.integers(0, 1000),
    part=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_widths_are_the_best_ones_where_errors_are_convex(sizes: list[int], seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    curves = {}
    for layer, size in enumerate(sizes):
        steps = np.sort(rng.random(size - 1))  # what each further neuron group takes from the error, the last the least
        errors = np.r_[np.cumsum(steps)[::-1], 0.0]
        curves[layer] = ErrorCurve(tuple(MULTIPLE * (i + 1) for i in range(size)), tuple(errors))
    total = MULTIPLE * (len(sizes) + round(part * (sum(sizes) - len(sizes))))
    found = allocate(curves, total)
    assert sum(found.values()) == total
    assert all(width % MULTIPLE == 0 and width >= MULTIPLE for width in found.values())

    def cost(widths: tuple[int, ...]) -> float:
        return sum(curves[layer].at(width) for layer, width in enumerate(widths))

    every = itertools.product(*(curve.widths for curve in curves.values()))
    best = min(cost(widths) for widths in every if sum(widths) == total)
    assert cost(tuple(found.values())) == pytest.approx(best)


def test_fewer_neurons_than_layers_can_have_are_refused() -> None:
    curve = ErrorCurve((16, 32), (1.0, 0.0))
    with pytest.raises(ValueError, match="16 neurons are too few for 2 layers of 16"):
        allocate({0: curve, 1: curve}, 16)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3", {"share": 1.0}, "share 1: a number from 0 to below 1"),
        ("qwen3", {"share": -0.5}, "share -0.5: a number from 0"),
        ("qwen3", {}, "nothing goes"),
        ("mistral_mixed", {"share": 0.9}, "leaves 0 of the 48 neurons of layer 0: 16 to 47 are expected"),
        ("qwen3", {"share": 0.01}, "leaves 128 of the 128 neurons"),
        ("qwen3", {"kv_groups": 2}, "2 key-value heads of 2 can't go: 0 to 1"),
        ("qwen3", {"kv_groups": -1}, "-1 key-value heads"),
        ("qwen3", {"kv_groups": 1, "widths": "error"}, "widths by error need a share above 0"),
        ("qwen3_moe", {"share": 0.5, "widths": "error"}, "widths by error need .* two dense layers"),
        ("qwen3", {"share": 0.5, "widths": "odd"}, "widths 'odd': known are even, error"),
        ("qwen3_moe", {"share": 0.9}, "leaves 1 of 8 experts: 2 .those of a token. to 7"),
        ("iha", {"share": 0.5}, "jaxdual_iha can't be pruned"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_goes(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Structure(**settings).check(load(name).config, 10_000)


def test_too_few_tokens_for_the_fit_are_refused() -> None:
    config = load("qwen3").config
    Structure(share=0.5).check(config, 64)
    with pytest.raises(ValueError, match="63 tokens of calibration text are too few to fit 64 inputs"):
        Structure(share=0.5).check(config, 63)
    with pytest.raises(ValueError, match=r"63 tokens .* 128 inputs"):
        Structure(share=0.5, widths="error").check(config, 63)
    heads = config.num_heads // 2 * config.head_dim
    with pytest.raises(ValueError, match=f"fit {heads} inputs"):
        Structure(kv_groups=1).check(config, heads - 1)


def test_pruning_again_goes_on_from_uneven_widths() -> None:
    config = dataclasses.replace(KINDS["pruned"], layer_intermediate_sizes=(32, 64, 48), intermediate_size=64)
    smaller, told = pruned(random_model(config), Structure(share=0.5))
    assert [layer.neurons for layer in told] == [(16, 32), (32, 64), (32, 48)]
    assert smaller.config.layer_intermediate_sizes == (16, 32, 32)
    assert smaller_config(config, Structure(share=0.5), [32, 32, 32]).layer_intermediate_sizes == ()
