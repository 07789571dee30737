"""Training of P(IK): from hidden states and whether the model was right, by binary cross-entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.cascade.evaluation.calibration import Quality
from jaxdual.cascade.evaluation.measures import macro_averages
from jaxdual.cascade.evaluation.signals import Signals
from jaxdual.cascade.probe import ConfidenceProbe, Probe, ProbeParameters, p_ik


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a probe is trained; by default as in Mahaut et al. 2024, but for the epoch, which validation chooses.

    Attributes:
      rate: learning rate of Adam.
      epochs: of which the one with the least validation loss is kept.
      batch: questions of a step.
      seed: of initial weights and order.
      shuffled_labels: trains on labels of other questions: a control, whose AUROC must be about 0.5.
    """

    rate: float = 1e-4
    epochs: int = 10
    batch: int = 64
    seed: int = 42
    shuffled_labels: bool = False


@dataclass(frozen=True, slots=True)
class ProbeFigures:
    """How well P(IK) tells right from wrong answers.

    Attributes:
      accuracy, f1: of the prediction that P(IK) of at least 0.5 is a right answer; F1 is that of right answers.
      macro_f1: mean of both classes.
      quality: of P(IK) as a confidence.
    """

    accuracy: float
    f1: float
    macro_f1: float
    quality: Quality

    @classmethod
    def of(cls, confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]) -> ProbeFigures:
        sure = confidence >= 0.5
        hits = int((sure & correct).sum())
        both = int(sure.sum()) + int(correct.sum())
        return cls(
            float((sure == correct).mean()),
            2 * hits / both if both else 0.0,
            macro_averages(sure.astype(int), correct.astype(int)).f1,
            Quality.of(confidence, correct),
        )


@dataclass(frozen=True, slots=True)
class Epoch:
    """Losses after one epoch, in nats a question."""

    train: float
    validation: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A probe's parameters and how they came about.

    Attributes:
      parameters: of the best epoch.
      epochs: losses of all.
      best: number of that epoch, from 1.
    """

    parameters: ProbeParameters
    epochs: tuple[Epoch, ...]
    best: int


def train_probe(
    train: tuple[Float32[np.ndarray, "N D"], Bool[np.ndarray, " N"]],
    validation: tuple[Float32[np.ndarray, "M D"], Bool[np.ndarray, " M"]],
    recipe: Recipe,
    done: Callable[[], object] = lambda: None,
) -> Trained:
    """Trains on hidden states and whether the model was right.

    Args:
      train: states and labels that are learned, whose mean and deviation standardise all.
      validation: that choose the epoch.
      recipe: how.
      done: is called after each epoch.

    Raises:
      ValueError: states that are not finite.
    """
    hidden, labels = train
    for name, states in (("train", hidden), ("validation", validation[0])):
        if not np.isfinite(states).all():
            raise ValueError(f"hidden states of {name} questions are not finite")
    rng = np.random.default_rng(recipe.seed)
    held_out = validation[1]
    if recipe.shuffled_labels:
        labels, held_out = rng.permutation(labels), rng.permutation(held_out)
    network = ConfidenceProbe(
        jnp.asarray(hidden.mean(axis=0, dtype=np.float64).astype(np.float32)),
        jnp.asarray(hidden.std(axis=0, dtype=np.float64).astype(np.float32)),
        rngs=nnx.Rngs(recipe.seed),
    )
    graphdef, learned, fixed = nnx.split(network, nnx.Param, ...)
    adam = optax.adam(recipe.rate)
    moments = adam.init(learned)
    rows = min(recipe.batch, len(labels))
    arrays = jnp.asarray(hidden), jnp.asarray(labels, jnp.float32)
    checked = jnp.asarray(validation[0]), jnp.asarray(held_out, jnp.float32)
    epochs: list[Epoch] = []
    best = nnx.merge(graphdef, learned, fixed).parameters()
    for _ in range(recipe.epochs):
        order = rng.permutation(len(labels))[: len(labels) // rows * rows].reshape(-1, rows)
        learned, moments, loss = _epoch(graphdef, adam, learned, fixed, moments, *arrays, jnp.asarray(order, jnp.int32))
        epochs.append(Epoch(float(loss), float(_loss(graphdef, learned, fixed, *checked))))
        if epochs[-1].validation <= min(epoch.validation for epoch in epochs):
            best = nnx.merge(graphdef, learned, fixed).parameters()
        done()
    losses = [epoch.validation for epoch in epochs]
    return Trained(best, tuple(epochs), len(losses) - losses[::-1].index(min(losses)))


def probe_of(signals: Signals, recipe: Recipe, done: Callable[[], object] = lambda: None) -> tuple[Probe, Trained]:
    """Trains the probe of a model on the train split of its signals, and tells of it on the others.

    Raises:
      ValueError: a split that has no questions, or states that are not finite.
    """
    train, validation = signals.of("train"), signals.of("validation")
    trained = train_probe((train.hidden, train.correct), (validation.hidden, validation.correct), recipe, done)
    figures: dict[str, Any] = {}
    for part in (validation, signals.of("test")):
        scores = p_ik_of(trained.parameters, part.hidden)
        figures[str(part.splits[0])] = dataclasses.asdict(ProbeFigures.of(scores, part.correct))
    header = signals.header
    probe = Probe(
        parameters=trained.parameters,
        model=header.model,
        fingerprint=header.fingerprint,
        num_layers=header.sizes.layers,
        tap=header.sizes.tap,
        training={
            "recipe": dataclasses.asdict(recipe),
            "items": header.items,
            "form": header.form,
            "questions": {"train": len(train), "validation": len(validation)},
            "base_rate": {"train": float(train.correct.mean()), "validation": float(validation.correct.mean())},
            "best_epoch": trained.best,
            **figures,
        },
    )
    return probe, trained


def p_ik_of(parameters: ProbeParameters, hidden: Float32[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """P(IK) of many questions, as float64."""
    return np.asarray(_p_ik(parameters, jnp.asarray(hidden)), np.float64)


_p_ik = jax.jit(p_ik)


@partial(jax.jit, static_argnums=0)
def _loss(
    graphdef: Any, learned: Any, fixed: Any, hidden: Float32[Array, "N D"], labels: Float32[Array, " N"]
) -> Float32[Array, ""]:
    logits = nnx.merge(graphdef, learned, fixed)(hidden)
    loss: jax.Array = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return loss


@partial(jax.jit, static_argnums=(0, 1))
def _epoch(
    graphdef: Any,
    adam: optax.GradientTransformation,
    learned: Any,
    fixed: Any,
    moments: optax.OptState,
    hidden: Float32[Array, "N D"],
    labels: Float32[Array, " N"],
    order: Int32[Array, "steps rows"],
) -> tuple[Any, optax.OptState, Float32[Array, ""]]:
    def step(carry: tuple[Any, optax.OptState], rows: Int32[Array, " rows"]) -> tuple[Any, Float32[Array, ""]]:
        learned, moments = carry
        loss, gradients = jax.value_and_grad(_loss, argnums=1)(graphdef, learned, fixed, hidden[rows], labels[rows])
        updates, moments = adam.update(gradients, moments, learned)
        return (optax.apply_updates(learned, updates), moments), loss

    (learned, moments), losses = jax.lax.scan(step, (learned, moments), order)
    return learned, moments, losses.mean()
