"""Perplexities of a model pruned in many ways, each with several seeds of calibration text."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

import models
from jaxdual.pruning.calibration import perplexity
from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.layer import Plan
from jaxdual.pruning.methods import METHODS, UPDATES
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.run import PrunedLayer, prune_model
from jaxdual.tokenizer import Tokenizer
from models.training import corpus

PATTERNS = ("0.5", "2:4", "4:8")
# What the paper prunes with and without Sparsity Induction, and what stands beside it without.
INDUCED = ("magnitude", "wanda", "sparsegpt")
PLAIN = (*INDUCED, "ria", "wanda, DSnoT", "sparsegpt, ADMM")
_UPDATES = {"DSnoT": "dsnot", "ADMM": "admm"}


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is to be done.

    Attributes:
      model: folder of the model.
      induction: how scales are learned.
      seeds: draws of calibration text.
      sequences, length: windows of calibration text, and tokens of one.
      evaluated: windows of held-out text, each of `length` tokens.
      patterns: that weights are pruned to.
    """

    model: Path
    induction: Induction
    seeds: int = 5
    sequences: int = 64
    length: int = 128
    evaluated: int = 96
    patterns: Sequence[str] = PATTERNS


@dataclass(frozen=True, slots=True)
class Run:
    """One pruned model.

    Attributes:
      pattern, pruner, induced, seed: which.
      perplexity: of held-out text.
      seconds: that pruning took.
      error: mean over layers of the change of their outputs on calibration text that nothing was learned from, relative
        to what they add; None where scales were not learned.
      taken: layers that took the learned scales.
    """

    pattern: str
    pruner: str
    induced: bool
    seed: int
    perplexity: float
    seconds: float
    error: float | None = None
    taken: int | None = None


def quality(setting: Setting, workers: int, done: Callable[[list[Run]], None], before: Sequence[Run] = ()) -> list[Run]:
    """All runs, by seed and pattern.

    Args:
      setting: how much.
      before: runs of the same setting that are there already, all ways to a pattern with a seed or none.
      workers: processes, each with the ways to one pattern with one seed at a time.
      done: is told of all runs so far after each of these.
    """
    runs = list(before)
    tasks = [(seed, pattern) for seed in range(setting.seeds) for pattern in setting.patterns]
    there = {(run.seed, run.pattern) for run in runs}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for found in as_completed([pool.submit(_runs, setting, *task) for task in tasks if task not in there]):
            runs += found.result()
            runs.sort(key=lambda run: tasks.index((run.seed, run.pattern)))
            done(runs)
    return runs


def dense_perplexity(setting: Setting) -> float:
    """Of the model as it was trained."""
    return perplexity(models.load(setting.model, dtype="float32"), _held_out(setting))


def _held_out(setting: Setting) -> Int32[np.ndarray, "N L"]:
    return draw_windows(Tokenizer.from_dir(setting.model), "heldout", setting.evaluated, setting.length, seed=0)


def _runs(setting: Setting, seed: int, pattern: str) -> list[Run]:
    text = draw_windows(Tokenizer.from_dir(setting.model), "train", setting.sequences, setting.length, seed=seed)
    held_out = _held_out(setting)
    return [
        _run(setting, pattern, pruner, plan, seed, text, held_out) for pruner, plan in plans(pattern, setting.induction)
    ]


def plans(pattern: str, induction: Induction) -> Iterator[tuple[str, Plan]]:
    """Names and plans of all ways to a pattern."""
    for pruner in PLAIN:
        method, _, update = pruner.partition(", ")
        behind = UPDATES[_UPDATES[update]] if update else None
        yield pruner, Plan(METHODS[method], Pattern.parse(pattern), behind)
        if pruner in INDUCED:
            yield pruner, Plan(METHODS[method], Pattern.parse(pattern), behind, induction)


def draw_windows(
    tokenizer: Tokenizer, split: corpus.Split, count: int, length: int, *, seed: int
) -> Int32[np.ndarray, "N L"]:
    """Windows from anywhere in one side of the corpus that the shipped models are trained on."""
    tokens = np.array(tokenizer.encode("\n".join(corpus.read_texts(split).values())), np.int32)
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return rows[np.random.default_rng(seed).permutation(len(rows))[:count]]


def _run(
    setting: Setting, pattern: str, pruner: str, plan: Plan, seed: int, text: np.ndarray[Any, Any], held_out: Any
) -> Run:
    model = models.load(setting.model, dtype="float32")
    layers: list[PrunedLayer] = []
    begin = time.perf_counter()
    prune_model(model, text, plan, done=layers.append)
    seconds = round(time.perf_counter() - begin, 2)
    induced = plan.induction is not None
    return Run(
        pattern,
        pruner,
        induced,
        seed,
        perplexity(model, held_out),
        seconds,
        float(np.mean([one.errors[one.taken] for one in layers])) if induced else None,
        sum(one.taken == "induced" for one in layers) if induced else None,
    )
