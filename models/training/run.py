"""A training run: budget, steps, checkpoints, progress."""

import math
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from models import Decoder, ModelConfig, init
from models.shapes import parameters_of, with_parameters
from models.training.data import Position
from models.training.recipes import Recipe
from models.training.state import TrainState, load_state, save_state
from models.training.step import (
    Parameters,
    cross_entropy,
    learning_rate,
    optimizer,
    train_step,
)


class Windows(Protocol):
    """Training windows in an order that follows from a position."""

    def batch(self, position: Position, rows: int) -> tuple[Int32[np.ndarray, "rows window"], Position]:
        """The next ``rows`` windows of ``position.length + 1`` tokens, and the position after them."""


@dataclass(frozen=True, slots=True)
class Budget:
    """When a run ends: after ``cpu_seconds`` of CPU time, or after ``steps``; exactly one is given.

    CPU time counts every process of a resumed run, compilation and checkpoints included. A step-limited run does not
    depend on the clock, so it is repeatable.
    """

    cpu_seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.cpu_seconds, self.steps) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ValueError(f"cpu_seconds={self.cpu_seconds}, steps={self.steps}: give exactly one, greater than zero")

    def fraction(self, state: TrainState) -> float:
        """Share of the budget used, 1 when the run is over."""
        if self.steps is not None:
            return min(1.0, state.step / self.steps)
        return min(1.0, state.cpu_seconds / float(self.cpu_seconds or math.inf))


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a run's progress.

    Attributes:
        step, tokens: done so far.
        fraction: share of the budget used.
        loss: mean training cross-entropy since the last line, nats a token.
        heldout: cross-entropy of the held-out slice, nats a token.
        tokens_per_second: by CPU time since the last line.
        cpu_seconds: used so far.
    """

    step: int
    tokens: int
    fraction: float
    loss: float
    heldout: float
    tokens_per_second: float
    cpu_seconds: float


def run(
    config: ModelConfig,
    recipe: Recipe,
    budget: Budget,
    data: Windows,
    heldout: Int32[np.ndarray, "B window"],
    folder: Path,
    *,
    initial: Parameters | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 120.0,
    checkpoint_at: Container[int] = (),
    stop_after: int | None = None,
    report: Callable[[Progress, TrainState], None] = lambda _progress, _state: None,
) -> tuple[Decoder, TrainState]:
    """Trains a model from its first weights, or goes on where a run stopped.

    Args:
        config: the model.
        recipe: how to train it.
        budget: when to end; the learning rate reaches zero there.
        data: the training windows.
        heldout: windows that ``report`` measures; never trained on.
        folder: gets the state.
        initial: parameters to begin with; random ones unless given.
        resume: go on from the state in ``folder``.
        checkpoint_seconds: CPU seconds between two checkpoints, each with a progress report.
        checkpoint_at: steps with a checkpoint and a progress report, too.
        stop_after: stop (after a checkpoint) at this many steps, before the budget ends.
        report: called with every progress line and the state.

    Returns:
        The trained model in float32, and the last state, which is also in ``folder``.

    Raises:
        ValueError: the state in ``folder`` is of another model or recipe.
        FileNotFoundError: ``resume`` without a state.
    """
    parameters = parameters_of(init(config, seed=recipe.seed)) if initial is None else initial
    identity = repr((config, recipe))
    state = TrainState(
        parameters, optimizer(recipe, parameters).init(parameters), Position(0, 0, recipe.length), 0, 0, 0.0
    )
    if resume:
        state = load_state(state, identity, folder)
    clock = _Clock(state.cpu_seconds)
    since, recent = state, []
    while (fraction := budget.fraction(state)) < 1 and state.step != stop_after:
        windows, position = data.batch(*_next_batch(state.position, recipe, fraction))
        rate = learning_rate(recipe, state.step, fraction)
        values, moments, loss = train_step(
            config, recipe, state.parameters, state.optimizer, jnp.asarray(windows), jnp.float32(rate)
        )
        recent.append(float(loss))
        state = TrainState(
            values, moments, position, state.step + 1, state.tokens + recipe.tokens_per_step, clock.seconds()
        )
        ended = budget.fraction(state) >= 1 or state.step == stop_after
        if ended or state.step in checkpoint_at or state.cpu_seconds - since.cpu_seconds >= checkpoint_seconds:
            heldout_loss = float(cross_entropy(config, recipe, state.parameters, jnp.asarray(heldout)))
            state = replace(state, cpu_seconds=clock.seconds())
            save_state(state, identity, folder)
            speed = (state.tokens - since.tokens) / max(1e-9, state.cpu_seconds - since.cpu_seconds)
            line = Progress(
                state.step,
                state.tokens,
                budget.fraction(state),
                sum(recent) / len(recent),
                heldout_loss,
                speed,
                state.cpu_seconds,
            )
            report(line, state)
            since, recent = state, []
    return with_parameters(config, state.parameters), state


def _next_batch(position: Position, recipe: Recipe, fraction: float) -> tuple[Position, int]:
    length = recipe.long_length if fraction >= 1 - recipe.long_fraction else recipe.length
    if length != position.length:
        position = Position(position.epoch + 1, 0, length)
    return position, recipe.tokens_per_step // length


class _Clock:
    """CPU seconds of this process on top of those of the earlier ones."""

    def __init__(self, before: float) -> None:
        self._zero = time.process_time() - before

    def seconds(self) -> float:
        return time.process_time() - self._zero
