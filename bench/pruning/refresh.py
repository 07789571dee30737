"""What a refresh of Wanda's scores takes for new scales: from statistics that are kept, or taken anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from bench.pruning.turns import medians
from jaxdual.pruning.linears import inputs_of, linears_of
from jaxdual.pruning.methods import METHODS
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.stream import attend_within, with_window


def refresh(model: Path, windows: np.ndarray[Any, Any], seconds: float = 10.0) -> dict[str, float]:
    """Median seconds for one layer, and the ratio of both.

    Anew, the layer runs on all windows and sums up the squares of its inputs, each multiplied by its scale; from what
    is kept, sums are multiplied by the scales. Either way the scores of all seven matrices are then made. That they are
    the same is checked first (equation 10 of the paper).

    Args:
      model: folder of the model; its first layer is looked at.
      windows: calibration text.
      seconds: that the measurement may take.
    """
    decoder = models.load(model, dtype="float32")
    layer, config, method = decoder.layers[0], decoder.config, METHODS["wanda"]
    linears = linears_of(config, 0)
    rope = decoder.rope(jnp.arange(windows.shape[1]))
    streams = [decoder.embed(jnp.asarray(window)) for window in windows]
    draw = np.random.default_rng(0)
    scales = {one.group: jnp.asarray(draw.lognormal(0, 0.2, one.read(layer).shape[1]), jnp.float32) for one in linears}

    weights = {one.name: one.read(layer) for one in linears}
    groups = {one.name: one.group for one in linears}
    graph, state = nnx.split(layer)

    @jax.jit
    def with_scaled(moments: dict[str, Moments], state: Any, x: jax.Array) -> dict[str, Moments]:
        inputs = inputs_of(nnx.merge(graph, state), x, rope, attend_within(config.window_of(0), x.shape[0]))
        return {group: moments[group].with_tokens(values * scales[group]) for group, values, _ in inputs}

    @jax.jit
    def scores(moments: dict[str, Moments], divisors: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: method.score(matrix, moments[groups[name]].divided(divisors[groups[name]]))
            for name, matrix in weights.items()
        }

    none = {one.group: Moments.none(one.read(layer).shape[1], whole=False) for one in linears}
    ones = {group: jnp.ones_like(scale) for group, scale in scales.items()}
    inverse = {group: 1 / scale for group, scale in scales.items()}

    def classical() -> dict[str, jax.Array]:
        moments = none
        for x in streams:
            moments = with_scaled(moments, state, x)
        return scores(moments, ones)

    kept = none
    for x in streams:
        kept = with_window(kept, layer, config.window_of(0), x, rope)

    def fast() -> dict[str, jax.Array]:
        return scores(kept, inverse)

    for one, other in zip(fast().values(), classical().values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)
    found = medians({"fast": fast, "classical": classical}, seconds)
    return found | {"ratio": found["classical"] / found["fast"]}
