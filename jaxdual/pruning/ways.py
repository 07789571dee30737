"""Several ways to prune a layer, of which the best on held-out windows of the calibration text is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.layer_state import write_layer
from jaxdual.pruning.stream import behind
from models.rope import Rope
from models.shapes import parameters_of

PLAIN, INDUCED = "plain", "induced"  # names of ways: as the method says; with learned scales

# Windows of the calibration text at most that ways are chosen by.
_HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class Example:
    """Windows of text: the stream before a layer, and behind it while nothing is pruned.

    Attributes:
      before, after: `[windows * length, hidden]`.
    """

    before: Float[Array, "T D"]
    after: Float[Array, "T D"]


def held_out_windows(windows: int) -> int:
    """How many windows of the calibration text, at its end, are chosen by and not learned from."""
    return min(_HELD_OUT, max(1, windows // 4))


def check_windows(windows: int, batch: int) -> None:
    """Raises `ValueError` if so many windows of text are too few to learn from `batch` at a time."""
    if windows - held_out_windows(windows) < batch:
        raise ValueError(
            f"{windows} windows of calibration text, of which {held_out_windows(windows)} are held out, are too few to "
            f"take {batch} at a time"
        )


def layer_error(layer: nnx.Module, window: int | None, examples: Sequence[Example], rope: Rope) -> float:
    """Mean square of what a changed layer's output is off, relative to what the layer adds to the stream."""
    errors = [relative_error(behind(layer, window, one.before, rope), one.before, one.after) for one in examples]
    return float(np.mean(jax.device_get(errors)))


def relative_error(
    found: Float[Array, "T D"], before: Float[Array, "T D"], after: Float[Array, "T D"]
) -> Float[Array, ""]:
    """Mean square of `found - after`, relative to that of `after - before`."""
    return jnp.mean(jnp.square(found - after)) / jnp.mean(jnp.square(after - before))


def take_best[Result](
    layer: nnx.Module,
    ways: Mapping[str, Callable[[nnx.Module], Result]],
    window: int | None,
    held_out: Sequence[Example],
    rope: Rope,
) -> tuple[str, dict[str, float], Result]:
    """Prunes a layer in the way whose output is off least; of equal ones the first.

    Args:
      layer: changed in place.
      ways: by name, each prunes a copy in place.
      window, held_out, rope: as of `layer_error`.

    Returns:
      The name of the way, the errors of all, and what the way returned.
    """
    copies, errors, results = {}, {}, {}
    for name, prune in ways.items():
        copies[name] = nnx.clone(layer)
        results[name] = prune(copies[name])
        errors[name] = layer_error(copies[name], window, held_out, rope)
    taken = min(errors, key=errors.__getitem__)
    write_layer(layer, parameters_of(copies[taken]))
    return taken, errors, results[taken]
