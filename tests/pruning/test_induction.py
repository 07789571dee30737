"""Sparsity Induction: masks with gradients, regularizers, what is learned, and that it does no harm where it looks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from jaxdual.pruning import run
from jaxdual.pruning.induction.absorb import absorb, scale_sizes
from jaxdual.pruning.induction.masks import straight_through
from jaxdual.pruning.induction.regularizers import alpha_of, first_vectors, regularizer
from jaxdual.pruning.induction.settings import MOST, Induction
from jaxdual.pruning.induction.starts import first_scales
from jaxdual.pruning.induction.training import learn_scales
from jaxdual.pruning.layer import Plan
from jaxdual.pruning.layer_state import write_layer
from jaxdual.pruning.linears import linears_of
from jaxdual.pruning.methods import METHODS
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.run import PrunedLayer, prune_model
from models.attention import dense_attend
from models.shapes import parameters_of
from tests.engine.models import folder, load

WINDOWS = np.random.default_rng(1).integers(0, 90, (12, 24)).astype(np.int32)
EVERY = [
    ("0.5", "row", None),
    ("0.3", "matrix", None),
    ("0.5", "matrix", 8),
    ("2:4", "row", None),
    ("4:8", "row", None),
]


@pytest.mark.parametrize(("text", "scope", "columns"), EVERY)
def test_masks_are_those_of_the_pruner_and_have_the_gradient_of_a_soft_step(
    text: str, scope: Any, columns: int | None
) -> None:
    pattern = Pattern.parse(text)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 24)), jnp.float32)
    found = np.asarray(straight_through(scores, pattern, scope, columns, 0.1))
    parts = [scores[:, i : i + (columns or 24)] for i in range(0, 24, columns or 24)]
    kept = np.concatenate([np.asarray(pattern.kept(part, scope)) for part in parts], axis=1)
    np.testing.assert_allclose(found, kept, atol=1e-6)

    gradient = np.asarray(jax.grad(lambda x: jnp.sum(straight_through(x, pattern, scope, columns, 0.1)))(scores))
    wide, thresholds = np.asarray(scores, np.float64), np.empty((6, 24))
    for unit in units(pattern, scope, columns):
        thresholds[unit] = wide[unit][~kept[unit]].max()
    soft = 1 / (1 + np.exp(-(wide - thresholds) / 0.1))
    np.testing.assert_allclose(gradient, soft * (1 - soft) / 0.1, rtol=1e-3, atol=1e-4)


def units(pattern: Pattern, scope: str, columns: int | None) -> list[Any]:
    """What weights are compared within, as index expressions into 6 rows of 24."""
    if pattern.share is None:
        return [np.s_[row, i : i + pattern.of] for row in range(6) for i in range(0, 24, pattern.of)]
    if scope == "row":
        return [np.s_[row, :] for row in range(6)]
    width = columns or 24
    return [np.s_[:, i : i + width] for i in range(0, 24, width)]


def test_a_share_of_no_weights_masks_none() -> None:
    mask = straight_through(jnp.ones((2, 8)), Pattern.parse("0.1"), "row", None, 0.1)
    np.testing.assert_allclose(mask, np.ones((2, 8)))


@pytest.mark.parametrize("kind", ["paper", "stable_rank"])
def test_regularizers_are_those_of_their_singular_values(kind: Any) -> None:
    draw = np.random.default_rng(2)
    weights = {
        "a": jnp.asarray(draw.normal(size=(1, 6, 9)), jnp.float32),
        "b": jnp.asarray(draw.normal(size=(3, 8, 5)), jnp.float32),
    }
    vectors = first_vectors(weights)
    for _ in range(40):
        _, vectors = regularizer(kind, weights, vectors, jnp.float32(0.01))
    found, _ = regularizer(kind, weights, vectors, jnp.float32(0.01))
    values = {key: np.linalg.svd(np.asarray(stack, np.float64), compute_uv=False) for key, stack in weights.items()}
    np.testing.assert_allclose(alpha_of(weights, vectors), 1 / sum(v[:, 0].sum() for v in values.values()), rtol=1e-3)
    if kind == "paper":
        wanted = np.exp(-0.01 * sum(v[:, 0].sum() for v in values.values()))
    else:
        wanted = np.mean([((v**2).sum(1) / v[:, 0] ** 2).mean() / v.shape[1] for v in values.values()])
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_with_a_fixed_mask_folded_scales_have_no_gradient() -> None:
    """(W S o M) S^-1 = W o M: without a gradient through the mask there is nothing to learn."""
    with jax.enable_x64(True):
        graph, state = nnx.split(load("llama"))
        model: models.Decoder = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
        layer, config = model.layers[0], model.config
        x, rope = model.embed(jnp.asarray(WINDOWS[0])), model.rope(jnp.arange(24))
        draw = np.random.default_rng(5)
        masks = {one.path: jnp.asarray(draw.random(one.read(layer).T.shape) < 0.5) for one in linears_of(config, 0)}

        def loss(logs: dict[str, jax.Array]) -> jax.Array:
            copy = nnx.clone(layer)
            folded = absorb(config, parameters_of(layer), {key: jnp.exp(log) for key, log in logs.items()})
            write_layer(copy, folded | {path: folded[path] * mask for path, mask in masks.items()})
            out, _ = copy(x, rope, lambda *args: dense_attend(1, 24)(0, *args), None)
            return jnp.mean(jnp.square(out - layer(x, rope, lambda *args: dense_attend(1, 24)(0, *args), None)[0]))

        logs = {key: jnp.zeros(shape) for key, shape in scale_sizes(config, parameters_of(layer)).items()}
        value, gradient = jax.value_and_grad(loss)(logs)
        assert float(value) > 1e-4
        for slope in gradient.values():
            assert float(jnp.abs(slope).max()) < 1e-12 * float(value) + 1e-15


def pruned(name: str, plan: Plan) -> tuple[models.Decoder, list[PrunedLayer]]:
    model, told = models.load(folder(name), dtype="float32"), []  # type: tuple[models.Decoder, list[PrunedLayer]]
    prune_model(model, WINDOWS, plan, done=told.append)
    return model, told


def parameters(model: models.Decoder) -> dict[str, np.ndarray]:
    return {
        f"{i}.{path}": np.asarray(v) for i, one in enumerate(model.layers) for path, v in parameters_of(one).items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_better_on_held_out_text_is_not_taken(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that wreck the layer lose against one, and what is left is the baseline bit for bit."""
    plan = Plan(METHODS[method], Pattern.parse("2:4"))
    baseline, _ = pruned("qwen3", plan)

    def wrecked(layer: Any, problem: Any, linears: Any, moments: Any, first: Any, *rest: Any) -> Any:
        draw = np.random.default_rng(0)
        return {key: jnp.exp(jnp.asarray(5 * draw.normal(size=one.shape), jnp.float32)) for key, one in first.items()}

    monkeypatch.setattr(run, "learn_scales", wrecked)
    found, told = pruned("qwen3", dataclasses.replace(plan, induction=Induction()))
    assert [one.taken for one in told] == ["plain"] * len(told)
    assert all(one.errors["plain"] < one.errors["induced"] for one in told)
    for path, value in parameters(baseline).items():
        np.testing.assert_array_equal(parameters(found)[path], value)


def test_scales_of_one_are_the_baseline_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "learn_scales", lambda layer, problem, linears, moments, first, *rest: first)
    # Whatever the errors are, the way that is tried last is taken.
    count = itertools.count()
    monkeypatch.setattr("jaxdual.pruning.ways.layer_error", lambda *args: -next(count))
    for method in METHODS:
        plan = Plan(METHODS[method], Pattern.parse("0.5"))
        baseline = parameters(pruned("qwen3", plan)[0])
        for mode in ("score", "fold"):
            induced = dataclasses.replace(plan, induction=Induction(mode=mode, start="ones"))  # type: ignore[arg-type]
            found, told = pruned("qwen3", induced)
            assert {one.taken for one in told} == {"induced"}
            for path, value in parameters(found).items():
                np.testing.assert_array_equal(value, baseline[path], err_msg=f"{method} {mode} {path}")


@pytest.mark.parametrize(
    ("name", "settings", "shift"),
    [
        ("qwen2", Induction(mode="fold", batch=2), True),
        ("qwen3", Induction(regularizer="stable_rank", batch=3), True),
        ("llama", Induction(regularizer="paper", weight=0.1, start="paper"), False),
        ("mixtral", Induction(start="rms"), True),
        ("qwen3_moe", Induction(mode="fold"), False),
    ],
)
def test_every_setting_prunes_as_its_pattern_says_and_does_no_harm_on_held_out_text(
    name: str, settings: Induction, shift: bool
) -> None:
    plan = Plan(METHODS["magnitude"], Pattern.parse("2:4"), None, dataclasses.replace(settings, rate=0.05), shift)
    model, told = pruned(name, plan)
    for index, layer in enumerate(model.layers):
        for one in linears_of(model.config, index):
            groups = np.asarray(one.read(layer)).reshape(-1, 4)
            assert ((groups == 0).sum(1) == 2).all()
            if shift and one.expert is None:
                assert f"{one.path.removesuffix('.kernel')}.bias" in parameters_of(layer)
        assert told[index].errors[told[index].taken] == min(told[index].errors.values())
        assert len(told[index].errors) == (4 if shift else 2)
    assert model.config.o_bias == (shift or load(name).config.o_bias)


def test_learning_helps_where_inputs_differ_much() -> None:
    """Magnitudes don't see inputs; inputs of very different sizes make them choose badly, and scales mend it."""
    plan = Plan(METHODS["magnitude"], Pattern.parse("0.5"), None, Induction(rate=0.05, epochs=5, start="ones"))
    model, told = models.load(folder("llama"), dtype="float32"), []  # type: tuple[models.Decoder, list[PrunedLayer]]
    for layer in model.layers:
        width = layer.attention_norm.scale.shape[0]
        sizes = jnp.asarray(np.random.default_rng(3).lognormal(0, 1.5, width), jnp.float32)
        layer.attention_norm.scale[...] = layer.attention_norm.scale[...] * sizes
        layer.mlp_norm.scale[...] = layer.mlp_norm.scale[...] * sizes
    prune_model(model, WINDOWS, plan, done=told.append)
    assert all(one.taken == "induced" for one in told)
    assert all(one.errors["induced"] < 0.8 * one.errors["plain"] for one in told)


def test_shifts_make_up_for_the_means() -> None:
    """On the text that the means are of, a pruned matrix with its shift loses none of its outputs' means."""
    model = models.load(folder("llama"), dtype="float32")
    layer, config = model.layers[0], model.config
    linears = linears_of(config, 0)
    draw = np.random.default_rng(4)
    inputs = {one.group: draw.normal(1.0, 1.0, (50, one.read(layer).shape[1])).astype(np.float32) for one in linears}
    moments = {group: Moments.none(x.shape[1], whole=True).with_tokens(jnp.asarray(x)) for group, x in inputs.items()}
    before = {one.name: inputs[one.group] @ np.asarray(one.read(layer)).T for one in linears}
    plan = Plan(METHODS["sparsegpt"], Pattern.parse("2:4"), shift=True)
    run.prune_layer(layer, config, linears, moments, plan, shift=True)
    found = parameters_of(layer)
    for one in linears:
        bias = found[one.path.removesuffix("kernel") + "bias"]
        after = inputs[one.group] @ np.asarray(one.read(layer)).T + np.asarray(bias)
        np.testing.assert_allclose(after.mean(0), before[one.name].mean(0), atol=2e-3)
        assert np.abs(after - before[one.name]).max() > 0.01


def test_scales_are_gauged_and_within_bounds() -> None:
    model = load("qwen3")
    graph_layer, linears = model.layers[0], linears_of(model.config, 0)
    moments = {one.group: Moments.none(one.read(graph_layer).shape[1], whole=False) for one in linears}
    draw = np.random.default_rng(6)
    moments = {
        group: one.with_tokens(jnp.asarray(draw.normal(size=(30, one.first.shape[0])) * 10, jnp.float32))
        for group, one in moments.items()
    }
    samples = {group: jnp.asarray(draw.normal(size=(30, one.first.shape[0]))) for group, one in moments.items()}
    for start in ("ones", "rms", "paper"):
        for mode in ("score", "fold"):
            settings = Induction(start=start, mode=mode)  # type: ignore[arg-type]
            scales = first_scales(graph_layer, model.config, linears, moments, settings, samples)
            for scale in scales.values():
                assert (np.asarray(scale) > 0).all()
                assert np.asarray(scale).max() <= MOST
                if start != "paper":
                    np.testing.assert_allclose(np.log(scale).mean(), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "both"}, "mode is 'both'; known: score, fold"),
        ({"start": "zero"}, "start is 'zero'; known: None, ones, rms, paper"),
        ({"regularizer": "l2"}, "regularizer is 'l2'"),
        ({"rate": 0.0}, "rate is 0.0; it must be a positive number"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Induction(**changed)


def test_too_few_windows_are_refused() -> None:
    plan = Plan(METHODS["wanda"], Pattern.parse("2:4"), induction=Induction(batch=4))
    with pytest.raises(ValueError, match="4 windows of calibration text, of which 1 are held out, are too few"):
        run.check(load("qwen3"), plan, 4)


def watched(monkeypatch: pytest.MonkeyPatch, name: str, plan: Plan) -> list[dict[str, Any]]:
    """What each layer's scales were learned from, and what came of it."""
    seen: list[dict[str, Any]] = []

    def learn(
        layer: Any, problem: Any, linears: Any, moments: Any, first: Any, rope: Any, examples: Any, held_out: Any
    ) -> Any:
        found = learn_scales(layer, problem, linears, moments, first, rope, examples, held_out)
        seen.append({"first": first, "found": found, "examples": examples, "held_out": held_out, "moments": moments})
        return found

    monkeypatch.setattr(run, "learn_scales", learn)
    pruned(name, plan)
    return seen


def test_nothing_is_learned_from_what_is_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(METHODS["magnitude"], Pattern.parse("2:4"), induction=Induction(epochs=1, rate=0.05))
    for layer in watched(monkeypatch, "qwen3", plan):
        learned, chosen = ([np.asarray(one.before) for one in layer[side]] for side in ("examples", "held_out"))
        assert (len(learned), len(chosen)) == (9, 3)
        assert not any(np.array_equal(one, other) for one in learned for other in chosen)
        # Magnitudes begin half-way to Wanda.
        first = layer["first"]["qkv"][0]
        moments = layer["moments"]["qkv"]
        level = np.asarray(moments.squares / moments.tokens) ** 0.25
        np.testing.assert_allclose(first, level / np.exp(np.log(level).mean()), rtol=1e-3)
        for scale in layer["found"].values():
            logs = np.log(np.asarray(scale))
            assert np.abs(logs).max() > 0.02
            np.testing.assert_allclose(logs.mean(-1), 0, atol=1e-4)


def test_passes_that_made_it_worse_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    wild = Plan(METHODS["wanda"], Pattern.parse("2:4"), induction=Induction(epochs=2, rate=1e4))
    for layer in watched(monkeypatch, "qwen3", wild):
        for key, scale in layer["found"].items():
            np.testing.assert_allclose(scale, layer["first"][key], rtol=1e-6, err_msg="ones at first, and in the end")


def test_experts_that_few_tokens_go_to_keep_scales_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(METHODS["magnitude"], Pattern.parse("2:4"), induction=Induction(epochs=1, rate=0.05, batch=3))
    for layer in watched(monkeypatch, "qwen3_moe", plan):
        for key, scale in layer["found"].items():
            experts = key in ("gate_up", "down")
            assert np.array_equal(scale, np.ones_like(scale)) == experts, key
