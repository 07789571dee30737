"""CPM-3, learned: counts of pairs, by one bidirectional layer of plain or Interleaved Head Attention.

How often each symbol occurs tells every count, so that a head that weighs all tokens alike brings an MLP what it needs.
No order of tokens has to be kept, as in the construction; the task is no proof that pseudo heads are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import optax

from bench.iha.cpm3_task import check_coefficients, counts_of
from bench.iha.encoder import Encoder, EncoderConfig
from bench.iha.results import Curves, Result, Setting, Table
from bench.iha.training import num_parameters, shuffled, train
from bench.summary import Summary, compared

TOKENS, MODULUS, COEFFICIENT = 8, 5, 13  # N, M, G
WIDTH, INNER = 96, 512
HEADS = ((3, 3), (3, 0), (8, 0))  # H and P
_LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Size:
    """Of data and training."""

    train: int
    test: int
    epochs: int
    batch: int


REDUCED = Size(train=50_000, test=5_000, epochs=4, batch=250)
FULL = Size(train=50_000, test=5_000, epochs=100, batch=250)


@dataclass(frozen=True, slots=True)
class Data:
    """Tokens and their counts, `[examples, N]` each."""

    x: np.ndarray
    counts: np.ndarray

    @classmethod
    def make(cls, examples: int, rng: np.random.Generator) -> Data:
        x = rng.integers(0, MODULUS, (examples, TOKENS))
        return cls(x.astype(np.int32), counts_of(x, MODULUS, COEFFICIENT).astype(np.int32))


def baselines(train_data: Data, test_data: Data) -> dict[str, float]:
    """Exact counts by the commonest one, and by the commonest one of tokens like the own; learned and tested apart."""
    tally = np.zeros((MODULUS, TOKENS**2 + 1), int)
    np.add.at(tally, (train_data.x, train_data.counts), 1)
    return {
        "commonest count": float((test_data.counts == tally.sum(axis=0).argmax()).mean()),
        "commonest of the own token": float((test_data.counts == tally.argmax(axis=1)[test_data.x]).mean()),
    }


def config_of(heads: int, pseudo_heads: int) -> EncoderConfig:
    return EncoderConfig(
        symbols=MODULUS,
        positions=TOKENS,
        outputs=TOKENS**2 + 1,
        width=WIDTH,
        inner=INNER,
        heads=heads,
        pseudo_heads=pseudo_heads,
    )


def learn(config: EncoderConfig, seed: int, train_data: Data, test_data: Data, size: Size) -> list[tuple[float, float]]:
    """Exact counts of the test data after each epoch of training."""
    model = Encoder(config, seed)
    rng = np.random.default_rng([seed, 1])

    def epochs() -> Iterator[Any]:
        for _ in range(size.epochs):
            yield shuffled((train_data.x, train_data.counts), size.batch, rng)

    found = []
    for epoch, _ in enumerate(train(model, _loss, _optimizer(size), epochs()), 1):
        found.append((float(epoch), float(_exact(model, test_data.x, test_data.counts))))
    return found


@cache
def _optimizer(size: Size) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, size.epochs * (size.train // size.batch)))


def _loss(model: Encoder, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()


@jax.jit
def _exact(model: Encoder, x: jax.Array, counts: jax.Array) -> jax.Array:
    return (model(x).argmax(axis=-1) == counts).mean()


def experiment(setting: Setting) -> Result:
    check_coefficients(MODULUS, COEFFICIENT)
    return run(FULL if setting.full else REDUCED, setting.seeds)


def run(size: Size, seeds: int) -> Result:
    """All arms and seeds; each seed has data of its own, which all arms share."""
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    trivial: dict[str, list[float]] = {}
    configs = [config_of(*heads) for heads in HEADS]
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 0])
        train_data, test_data = Data.make(size.train, rng), Data.make(size.test, rng)
        for name, accuracy in baselines(train_data, test_data).items():
            trivial.setdefault(name, []).append(accuracy)
        for config in configs:
            curves.setdefault(config.name, []).append(learn(config, seed, train_data, test_data, size))
            print(f"  {config.name}, seed {seed}: {curves[config.name][-1][-1][1]:.4f}", flush=True)
    last = {name: [curve[-1][1] for curve in seeds_of] for name, seeds_of in curves.items()}
    parameters = {config.name: num_parameters(Encoder(config, 0)) for config in configs}
    iha, *_ = last
    rows: list[list[object]] = []
    differences = {}
    for name, values in last.items():
        if name != iha:
            differences[name] = Summary.of([a - b for a, b in zip(last[iha], values, strict=True)])
        other = "" if name == iha else differences[name].text("{:+.4f}")
        rows.append([name, parameters[name], Summary.of(values).text(), other])
    rows += [[name, None, Summary.of(values).text(), ""] for name, values in trivial.items()]
    best = max(max(values) for values in trivial.values())
    learned = min(map(min, last.values())) > best
    verdict = f"{'every' if learned else 'NOT every'} model is above the baselines ({best:.3f}); " + "; ".join(
        f"IHA with 3 heads {compared(one)} {name}" for name, one in differences.items()
    )
    shown = Table(
        f"Exact counts of the test data: N={TOKENS}, M={MODULUS}, G={COEFFICIENT}, {size.train} examples, "
        f"{size.epochs} epochs, {seeds} seeds; 95 % intervals",
        ["model", "parameters", "exact", f"{iha} is ahead by"],
        rows,
    )
    levels = {name: Summary.of(values).mean for name, values in trivial.items()}
    picture = Curves("CPM-3, learned", "epoch", "exact counts", curves, levels=levels)
    return Result([shown], verdict, learned, [picture], {"exact": last, "baselines": trivial})
