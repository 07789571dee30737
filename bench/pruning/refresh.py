"""What a refresh of Wanda's scores takes for new scales: from statistics that are kept, or taken anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from bench.pruning.turns import medians
from jaxdual.pruning.linears import linears_of
from jaxdual.pruning.methods import METHODS
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.stream import with_window


def refresh(model: Path, windows: np.ndarray[Any, Any], seconds: float = 10.0) -> dict[str, float]:
    """Median seconds for one layer, and the ratio of both.

    Anew, the layer runs on all windows and sums up the squares of its inputs; either way seven parts of scores are then
    made, and multiplied by scales. That the scores are the same is checked first.

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

    def taken() -> dict[str, Moments]:
        moments = {one.group: Moments.none(one.read(layer).shape[1], whole=False) for one in linears}
        for x in streams:
            moments = with_window(moments, layer, config.window_of(0), x, rope)
        return moments

    @jax.jit
    def columns(moments: dict[str, Moments], scales: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {group: method.of_inputs(one) * scales[group] for group, one in moments.items()}

    kept = taken()
    for fast, classical in zip(columns(kept, scales).values(), columns(taken(), scales).values(), strict=True):
        np.testing.assert_allclose(fast, classical, rtol=1e-6)
    found = medians({"fast": lambda: columns(kept, scales), "classical": lambda: columns(taken(), scales)}, seconds)
    return found | {"ratio": found["classical"] / found["fast"]}
