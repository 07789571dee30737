"""Composition of boolean relations (appendix D of the paper): every entry of R∘R or R∘R∘R, from all entries of R."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.iha.encoder import Encoder, EncoderConfig
from bench.iha.results import Curves, Result, Setting, Table
from bench.iha.training import num_parameters, shuffled, train
from bench.summary import Summary, compared

_IGNORED = 2  # the symbol of padding
_EVALUATED = 100  # examples at once: 800 pseudo tokens squared in each of 8 heads for the largest


@dataclass(frozen=True, slots=True)
class Task:
    """Which composition, of which relations.

    Attributes:
      hops: 2 for R∘R, 3 for R∘R∘R.
      smallest, largest: elements of a relation.
      density: probability of an entry.
    """

    hops: int
    smallest: int
    largest: int
    density: float

    @property
    def name(self) -> str:
        return {2: "binary", 3: "ternary"}[self.hops]


BINARY, TERNARY = Task(2, 6, 10, 0.325), Task(3, 5, 8, 0.264)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the models are trained.

    Attributes:
      tasks: that are learned.
      train, valid, test: examples; without valid ones the last epoch is what counts.
      width, inner, heads: of the layer.
      pseudo_heads: P of IHA.
      learning_rates: each is a model of its own.
      batch: examples of a step.
      epochs: at most.
      patience: epochs without a better accuracy on valid examples that end the training.
    """

    tasks: tuple[Task, ...]
    train: int
    valid: int
    test: int
    width: int
    inner: int
    heads: int
    pseudo_heads: int
    learning_rates: tuple[float, ...]
    batch: int
    epochs: int
    patience: int


REDUCED = Protocol((TERNARY,), 4_000, 0, 1_000, 64, 256, 8, 2, (1e-3,), 50, 6, 6)
FULL = Protocol((BINARY, TERNARY), 40_000, 5_000, 5_000, 128, 512, 8, 8, (1e-3, 1e-4), 64, 200, 10)


@dataclass(frozen=True, slots=True)
class Data:
    """Relations and what they compose to, padded at the right.

    Attributes:
      symbols: `[examples, largest^2]`, 0 or 1, row by row; `_IGNORED` behind the end.
      wanted: of the same shape.
      features: what is known of a token without composing: elements, successors of its row, predecessors of its
        column, and its entry, `[examples, largest^2, 4]`.
    """

    symbols: np.ndarray
    wanted: np.ndarray
    features: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        return self.symbols != _IGNORED


def make(task: Task, examples: int, rng: np.random.Generator) -> Data:
    """Random relations of all sizes of a task."""
    places = task.largest**2
    symbols = np.full((examples, places), _IGNORED, np.int8)
    wanted = np.zeros((examples, places), np.int8)
    features = np.zeros((examples, places, 4), np.int8)
    for at in range(examples):
        size = int(rng.integers(task.smallest, task.largest + 1))
        relation = (rng.random((size, size)) < task.density).astype(int)
        composed = np.linalg.matrix_power(relation, task.hops) > 0
        symbols[at, : size**2], wanted[at, : size**2] = relation.ravel(), composed.ravel()
        successors, predecessors = np.broadcast_arrays(relation.sum(1)[:, None], relation.sum(0)[None])
        known = [np.full((size, size), size), successors, predecessors, relation]
        features[at, : size**2] = np.stack(known, axis=-1).reshape(-1, 4)
    return Data(symbols, wanted, features)


def baselines(learned: Data, test: Data) -> dict[str, float]:
    """Accuracy by the commonest answer: of all, of the own entry's, and of the own entry's and degrees'."""
    seen, asked = learned.wanted[learned.valid], test.wanted[test.valid]
    seen_of, asked_of = learned.features[learned.valid], test.features[test.valid]
    always = int(seen.mean() > 0.5)
    return {
        "positive rate": float(asked.mean()),
        "commonest answer": float((asked == always).mean()),
        "own entry": _by_group(seen_of[:, 3:], seen, asked_of[:, 3:], asked, always),
        "degrees and own entry": _by_group(seen_of, seen, asked_of, asked, always),
    }


def _by_group(seen_of: np.ndarray, seen: np.ndarray, asked_of: np.ndarray, asked: np.ndarray, other: int) -> float:
    """Accuracy of the commonest answer of those with the same features; `other` where there were none."""
    base = 16 ** np.arange(seen_of.shape[1])
    tally = np.zeros((16 ** seen_of.shape[1], 2), int)
    np.add.at(tally, (seen_of.astype(int) @ base, seen), 1)
    answers = np.where(tally[:, 0] == tally[:, 1], other, tally.argmax(axis=1))
    return float((asked == answers[asked_of.astype(int) @ base]).mean())


@dataclass(slots=True)
class Learned:
    """Of one model and seed.

    Attributes:
      accuracy: on test examples, after the epoch that was best on valid ones, or the last one without them.
      curve: accuracy on valid examples, or on test ones without them, by epoch.
    """

    accuracy: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)


def learn(config: EncoderConfig, protocol: Protocol, rate: float, seed: int, data: tuple[Data, Data, Data]) -> Learned:
    """Trains one model.

    Args:
      config: of the model.
      protocol: of the training.
      rate: learning rate of Adam.
      seed: of weights and of the order of examples.
      data: to learn from, valid, and test.
    """
    learned_from, valid, test = data
    model = Encoder(config, seed)
    rng = np.random.default_rng([seed, 1])

    def epochs() -> Iterator[Any]:
        for _ in range(protocol.epochs):
            yield shuffled((learned_from.symbols, learned_from.wanted), protocol.batch, rng)

    def accuracy(on: Data) -> float:
        parts = range(0, len(on.symbols), _EVALUATED)
        found = sum(
            int(_right(model, on.symbols[at : at + _EVALUATED], on.wanted[at : at + _EVALUATED])) for at in parts
        )
        return found / int(on.valid.sum())

    found, best = Learned(), (-1.0, 0)
    for epoch, _ in enumerate(train(model, _loss, _optimizer(rate), epochs()), 1):
        reached = accuracy(valid if protocol.valid else test)
        found.curve.append((float(epoch), reached))
        if not protocol.valid:
            found.accuracy = reached
        elif reached > best[0]:
            best, found.accuracy = (reached, epoch), accuracy(test)
        elif epoch - best[1] >= protocol.patience:
            break
    return found


@cache
def _optimizer(rate: float) -> optax.GradientTransformation:
    return optax.adam(rate)


def _loss(model: Encoder, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    symbols, wanted = batch
    counted = symbols != _IGNORED
    losses = optax.sigmoid_binary_cross_entropy(model(symbols.astype(int), counted)[..., 0], wanted)
    return jnp.sum(losses * counted) / jnp.sum(counted)


@jax.jit
def _right(model: Encoder, symbols: jax.Array, wanted: jax.Array) -> jax.Array:
    """Entries that are right."""
    counted = symbols != _IGNORED
    return jnp.sum(((model(symbols.astype(int), counted)[..., 0] > 0) == wanted) & counted)


def experiment(setting: Setting) -> Result:
    return run(FULL if setting.full else REDUCED, setting.seeds)


def run(protocol: Protocol, seeds: int) -> Result:
    """All tasks, rates, models and seeds; each seed has data of its own, which all models share."""
    tables, pictures, figures, said = [], [], {}, []
    composed = False
    for task in protocol.tasks:
        runs: dict[str, dict[float, list[Learned]]] = {}
        trivial: dict[str, list[float]] = {}
        configs = [_config(task, protocol, pseudo) for pseudo in (0, protocol.pseudo_heads)]
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 0])
            data = tuple(make(task, count, rng) for count in (protocol.train, protocol.valid, protocol.test))
            for name, value in baselines(data[0], data[2]).items():
                trivial.setdefault(name, []).append(value)
            for rate in protocol.learning_rates:
                for config in configs:
                    one = learn(config, protocol, rate, seed, data)  # type: ignore[arg-type]
                    runs.setdefault(config.name, {}).setdefault(rate, []).append(one)
                    print(f"  {task.name}, {config.name}, rate {rate}, seed {seed}: {one.accuracy:.4f}", flush=True)
        parameters = {config.name: num_parameters(Encoder(config, 0)) for config in configs}
        table, sentence, above = _compared(task, protocol, runs, trivial, parameters)
        tables.append(table)
        said.append(sentence)
        composed |= above
        for rate in protocol.learning_rates:
            lines = {name: [one.curve for one in of[rate]] for name, of in runs.items()}
            levels = {name: Summary.of(values).mean for name, values in trivial.items() if name != "positive rate"}
            title = f"{task.name.capitalize()} composition, rate {rate}"
            pictures.append(Curves(title, "epoch", "accuracy", lines, levels=levels))
        figures[task.name] = {
            "baselines": trivial,
            "accuracy": {
                name: {str(rate): [one.accuracy for one in found] for rate, found in of.items()}
                for name, of in runs.items()
            },
        }
    return Result(tables, "; ".join(said), composed, pictures, figures)


def _compared(
    task: Task,
    protocol: Protocol,
    runs: dict[str, dict[float, list[Learned]]],
    trivial: dict[str, list[float]],
    parameters: dict[str, int],
) -> tuple[Table, str, bool]:
    """Table and verdict of a task, and whether a model is above what degrees tell."""
    plain, iha = runs
    known = Summary.of(trivial["degrees and own entry"]).mean
    rows: list[list[object]] = []
    parts, above = [], False
    for rate in protocol.learning_rates:
        values = {name: [one.accuracy for one in of[rate]] for name, of in runs.items()}
        ahead = Summary.of([a - b for a, b in zip(values[iha], values[plain], strict=True)])
        rows.append([plain, parameters[plain], rate, Summary.of(values[plain]).text(), ""])
        rows.append([iha, parameters[iha], rate, Summary.of(values[iha]).text(), ahead.text("{:+.4f}")])
        best = max(Summary.of(one).mean for one in values.values())
        above |= best > known
        parts.append(f"{task.name}, rate {rate}: IHA {compared(ahead)} MHA ({ahead.text('{:+.4f}')})")
        if best <= known:
            parts.append(f"no model is above what degrees alone tell ({known:.3f}), so none has learned to compose")
    rows += [[name, None, None, Summary.of(values).text(), ""] for name, values in trivial.items()]
    title = (
        f"{task.name.capitalize()} composition: accuracy on {protocol.test} test examples, {protocol.train} to learn "
        f"from, at most {protocol.epochs} epochs, {len(trivial['own entry'])} seeds; 95 % intervals"
    )
    return (
        Table(title, ["model", "parameters", "rate", "accuracy", f"ahead of {plain} by"], rows),
        "; ".join(parts),
        above,
    )


def _config(task: Task, protocol: Protocol, pseudo_heads: int) -> EncoderConfig:
    return EncoderConfig(
        symbols=3,
        positions=task.largest**2,
        outputs=1,
        width=protocol.width,
        inner=protocol.inner,
        heads=protocol.heads,
        pseudo_heads=pseudo_heads,
    )
