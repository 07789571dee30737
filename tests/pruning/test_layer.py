"""One layer: what scales, shifts and folds do to the choice in each matrix, and experts that few tokens go to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxdual.pruning.induction.absorb import scale_sizes
from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.layer import LEAST_TOKENS, Plan, PrunedMatrix, prune_layer
from jaxdual.pruning.linears import linears_of
from jaxdual.pruning.methods import METHODS
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from models.shapes import parameters_of
from tests.engine.models import folder

TWO_OF_FOUR = Pattern.parse("2:4")


class Case:
    """The first layer of a model, with inputs of all its matrices that were drawn."""

    def __init__(self, name: str, *, tokens: int = 200, mean: float = 0.0, seed: int = 0) -> None:
        self.model = models.load(folder(name), dtype="float32")
        self.layer, self.config = self.model.layers[0], self.model.config
        self.linears = linears_of(self.config, 0)
        draw = np.random.default_rng(seed)
        self.inputs = {}
        for one in self.linears:
            if one.group not in self.inputs:
                width = one.read(self.layer).shape[1]
                self.inputs[one.group] = (draw.normal(mean, 1, (tokens, width)) * draw.lognormal(0, 0.5, width)).astype(
                    np.float32
                )

    def moments(self, *, whole: bool) -> dict[str, Moments]:
        return {
            group: Moments.none(x.shape[1], whole=whole).with_tokens(jnp.asarray(x)) for group, x in self.inputs.items()
        }

    def prune(self, plan: Plan, **rest: Any) -> list[PrunedMatrix]:
        moments = self.moments(whole=plan.whole)
        return prune_layer(self.layer, self.config, self.linears, moments, plan, **rest)

    def zeros(self) -> dict[str, np.ndarray]:
        return {one.name: np.asarray(one.read(self.layer)) == 0 for one in self.linears}


def test_each_expert_has_scales_of_its_own() -> None:
    case = Case("qwen3_moe")
    scales = {
        one.kind: np.ones((1 if one.expert is None else case.config.moe.num_experts, one.read(case.layer).shape[1]))
        for one in case.linears
        if case.config.moe is not None
    }
    # The first two of every four inputs count for all in expert 1, and the last two in expert 2.
    first = np.arange(scales["gate_up"].shape[1]) % 4 < 2
    scales["gate_up"][1] = np.where(first, 1e4, 1)
    scales["gate_up"][2] = np.where(first, 1, 1e4)
    plan = Plan(METHODS["wanda"], TWO_OF_FOUR, induction=Induction())
    case.prune(plan, scales={kind: jnp.asarray(scale, jnp.float32) for kind, scale in scales.items()})
    zeros, plain = case.zeros(), Case("qwen3_moe")
    plain.prune(dataclasses.replace(plan, induction=None))
    for name in ("gate", "up"):
        # But for weights that are next to nothing.
        assert (zeros[f"mlp.experts.{name}.1"] == ~first).mean() > 0.99
        assert (zeros[f"mlp.experts.{name}.2"] == first).mean() > 0.99
        np.testing.assert_array_equal(zeros[f"mlp.experts.{name}.0"], plain.zeros()[f"mlp.experts.{name}.0"])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_folded_scales_are_nothing_to_wanda(name: str) -> None:
    """Weights grow as their inputs' norms shrink: the same weights go, if statistics are those behind the fold."""
    plain, folded = Case(name), Case(name)
    plan = Plan(METHODS["wanda"], TWO_OF_FOUR, induction=Induction(mode="fold"))
    plain.prune(dataclasses.replace(plan, induction=None))
    draw = np.random.default_rng(1)
    scales = {
        key: jnp.asarray(draw.lognormal(0, 0.7, shape), jnp.float32)
        for key, shape in scale_sizes(folded.config, parameters_of(folded.layer)).items()
    }
    folded.prune(plan, scales=scales)
    for matrix, zeros in plain.zeros().items():
        assert (folded.zeros()[matrix] != zeros).mean() < 1e-3, "but for ties"
    magnitude = Case(name)
    magnitude.prune(dataclasses.replace(plan, method=METHODS["magnitude"]), scales=scales)
    assert (magnitude.zeros()["attention.q"] != plain.zeros()["attention.q"]).mean() > 0.05


def test_with_a_shift_inputs_count_by_how_much_they_vary() -> None:
    plan = Plan(METHODS["wanda"], TWO_OF_FOUR, shift=True)
    case = Case("llama", mean=3.0)
    still = np.arange(case.inputs["qkv"].shape[1]) % 4 < 2
    case.inputs["qkv"][:, still] = case.inputs["qkv"][:1, still]
    case.prune(plan, shift=True)
    assert (case.zeros()["attention.q"] == still).mean() > 0.98, "but for weights that are next to nothing"
    other = Case("llama", mean=3.0)
    other.inputs = case.inputs
    other.prune(plan, shift=False)
    assert (other.zeros()["attention.q"] == still).mean() < 0.8


@pytest.mark.parametrize("method", METHODS)
def test_of_experts_that_hardly_a_token_goes_to_the_smallest_weights_go(method: str) -> None:
    tokens = LEAST_TOKENS - 1
    case, magnitude = Case("qwen3_moe", tokens=tokens), Case("qwen3_moe", tokens=tokens)
    for one in (case, magnitude):
        one.inputs["gate_up.0"] = one.inputs["gate_up.0"][:0]
    told = case.prune(Plan(METHODS[method], Pattern.parse("0.5")))
    magnitude.prune(Plan(METHODS["magnitude"], Pattern.parse("0.5")))
    for one in case.linears:
        (report,) = [entry for entry in told if entry.name == one.name]
        assert report.tokens == len(case.inputs[one.group])
        if one.expert is not None:
            np.testing.assert_array_equal(case.zeros()[one.name], magnitude.zeros()[one.name])
            assert case.zeros()[one.name].mean() == 0.5
