"""The polynomial filter bank `[X, AX, ..., A^(k-1) X]`, learned: k powers by `sqrt(k)` heads with as many pseudo heads.

Attention is linear, scores come from a token's place alone and values from its content alone. Each head of plain
attention is then one matrix of places, so that H heads give H powers and leave `1 - H / k` of the target's square.
What is learned depends on the start: an arm of its own starts from scores that are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.iha.attention import Mixing, attend
from bench.iha.results import Curves, Result, Setting, Table
from bench.iha.training import num_parameters, train
from bench.summary import Summary
from models.layers import INIT_STDDEV

TOKENS, WIDTH, POWERS = 16, 2, 4  # N, d, k
STEPS, CHUNK, BATCH, LEARNING_RATE, NOISE = 3000, 100, 16, 3e-3, 0.3
SOLVED = 1e-6
_TEST = 512


@dataclass(frozen=True, slots=True)
class Arm:
    """A model.

    Attributes:
      heads, pseudo_heads: H and P; P is 0 for plain attention.
      spread: standard deviation of the weights of queries and keys at the start.
    """

    heads: int
    pseudo_heads: int = 0
    spread: float = INIT_STDDEV

    @property
    def name(self) -> str:
        start = "" if self.spread == INIT_STDDEV else f", start {self.spread:.2g}"
        return (f"IHA H=P={self.heads}" if self.pseudo_heads else f"MHA H={self.heads}") + start

    @property
    def floor(self) -> float | None:
        """Relative error that plain attention cannot fall below."""
        return None if self.pseudo_heads else 1 - self.heads / POWERS


ARMS = (Arm(1), Arm(2), Arm(4), Arm(2, 2), Arm(2, 2, TOKENS**-0.5))


class FilterBank(nnx.Module):
    """Linear attention over `[X, I]` whose heads' outputs, side by side, are the powers.

    Attributes:
      q, k: `[width + tokens, heads, tokens]`; the rows of the content have no effect.
      v: `[width + tokens, heads, powers * width / heads]`; the rows of places have none.
    """

    def __init__(self, arm: Arm, seed: int) -> None:
        rng = np.random.default_rng(seed)
        inputs, wide = TOKENS + WIDTH, POWERS * WIDTH // arm.heads

        def weights(*shape: int, spread: float) -> nnx.Param:
            return nnx.Param(jnp.asarray(spread * rng.standard_normal(shape), jnp.float32))

        self.q = weights(inputs, arm.heads, TOKENS, spread=arm.spread)
        self.k = weights(inputs, arm.heads, TOKENS, spread=arm.spread)
        self.v = weights(inputs, arm.heads, wide, spread=WIDTH**-0.5)
        self.mixing = Mixing.initial(arm.heads, arm.pseudo_heads, NOISE, rng) if arm.pseudo_heads else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, tokens, powers * width]` of contents `[batch, tokens, width]`."""
        q, k = (jnp.broadcast_to(one[WIDTH:], (len(x), *one[WIDTH:].shape)) for one in (self.q, self.k))
        v = jnp.einsum("bnd,dhw->bnhw", x, self.v[:WIDTH])
        out = attend(q, k, v, linear=True) if self.mixing is None else self.mixing(q, k, v, linear=True)
        return out.reshape(len(x), TOKENS, -1)


def target(x: jax.Array) -> jax.Array:
    """`[X, AX, ..., A^(k-1) X]` where A moves every token's content to the next place, the last one's to the first."""
    return jnp.concatenate([jnp.roll(x, power, axis=1) for power in range(POWERS)], axis=-1)


def relative_error(model: FilterBank, x: jax.Array) -> jax.Array:
    """Square of what is wrong by the square of the target."""
    wanted = target(x)
    return jnp.sum(jnp.square(model(x) - wanted)) / jnp.sum(jnp.square(wanted))


@dataclass(frozen=True, slots=True)
class Run:
    """Of one arm and seed.

    Attributes:
      error: relative, on data of its own.
      curve: relative error in training, by step.
    """

    error: float
    curve: list[tuple[float, float]]


def learn(arm: Arm, seed: int, steps: int = STEPS) -> Run:
    """Trains an arm from a seed, which is that of weights and data."""
    keys = jax.random.split(jax.random.key(seed), 2)

    def data() -> Iterator[jax.Array]:
        for chunk in range(steps // CHUNK):
            yield jax.random.normal(jax.random.fold_in(keys[0], chunk), (CHUNK, BATCH, TOKENS, WIDTH))

    model = FilterBank(arm, seed)
    losses = train(model, relative_error, _optimizer(steps), data())
    curve = [(float(CHUNK * (at + 1)), loss) for at, loss in enumerate(losses)]
    test = jax.random.normal(keys[1], (_TEST, TOKENS, WIDTH))
    return Run(float(jax.jit(relative_error)(model, test)), curve)


@cache
def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


def experiment(setting: Setting) -> Result:
    """All arms and seeds; the protocol is small enough to be whole always."""
    rows, lines, figures = [], {}, {}
    errors: dict[Arm, Summary] = {}
    for arm in ARMS:
        runs = [learn(arm, seed) for seed in range(setting.seeds)]
        errors[arm] = Summary.of([run.error for run in runs])
        parameters = num_parameters(FilterBank(arm, 0))
        solved = sum(run.error < SOLVED for run in runs)
        span = errors[arm].span("{:.2e}")
        rows.append([arm.name, parameters, arm.floor, f"{errors[arm].mean:.2e}", span, f"{solved} of {setting.seeds}"])
        lines[arm.name] = [run.curve for run in runs]
        figures[arm.name] = {"parameters": parameters, "errors": [run.error for run in runs]}
        print(f"  {arm.name}: {errors[arm].span('{:.2e}')}", flush=True)
    two, interleaved = errors[Arm(2)], errors[Arm(2, 2)]
    holds = abs(two.lowest - 0.5) <= 0.01 and abs(two.highest - 0.5) <= 0.01 and interleaved.highest < SOLVED
    good = sum(error < SOLVED for error in figures[Arm(2, 2).name]["errors"])
    verdict = (
        f"{'as expected' if holds else 'NOT in every seed as expected'}: with two heads, plain attention stays at "
        f"{two.span('{:.3f}')} (0.50 +- 0.01 expected), and IHA is below {SOLVED:.0e} in {good} of {setting.seeds} "
        f"seeds, {interleaved.highest:.1e} at worst"
    )
    rows.append(["nothing but zeros", 0, None, "1.00e+00", "", ""])
    shown = Table(
        f"Relative squared error after {STEPS} steps, {setting.seeds} seeds",
        ["model", "parameters", "floor", "mean", "lowest to highest", f"below {SOLVED:.0e}"],
        rows,
    )
    levels = {"floor of MHA H=2": 0.5}
    curves = Curves("Polynomial filter, learned", "step", "relative squared error", lines, log=True, levels=levels)
    return Result([shown], verdict, holds, [curves], figures)
