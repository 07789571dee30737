"""Small language models with plain, windowed and interleaved attention, trained with equally many operations.

The text and tokenizer are those of the shipped models. Arms of one seed begin with the same values of the parameters
that they share and see the same windows in the same order; the number of their steps is what the operations of the
plain model allow (`bench.iha.training_flops`, attention as the mask lets it through).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import models
from bench.iha.paired import difference, interval_cells, judged, summary
from bench.iha.results import Curves, Result, Setting, Table
from bench.iha.training_flops import forward, training, training_executed
from bench.iha.training_runs import Say, Text, say, trained
from models import ModelConfig
from models.config import IHAConfig
from models.iha import num_mixing_parameters, schedule
from models.shapes import parameters_of
from models.training.data import WindowStream
from models.training.recipes import Recipe
from models.training.step import Parameters
from models.training.tokenizer import VOCAB_SIZE

LAYERS = 5
LENGTH = 256
# What 512 are of the paper's 8,192 tokens.
LOCAL_WINDOW = LENGTH * 512 // 8192
PSEUDO_HEADS = 2
BASE, LOCAL, WINDOWS = "mha", "global_local", "iha_windows"
RECIPE = Recipe(tokens_per_step=1024, length=LENGTH, long_length=LENGTH, long_fraction=0.0, peak_rate=1e-2)


def arms() -> dict[str, ModelConfig]:
    """The models that are compared."""
    windows, layers = schedule(LAYERS, LENGTH, PSEUDO_HEADS)
    local = tuple(None if window is None else LOCAL_WINDOW for window in windows)
    everywhere = IHAConfig(pseudo_heads=1, layers=tuple(range(LAYERS)))
    return {
        BASE: _model("qwen3"),
        LOCAL: _model("qwen3", layer_windows=local),
        # Plain attention in the windows of the next arm: what those are worth without mixing.
        WINDOWS: _model("qwen3", layer_windows=windows),
        "iha": _model("jaxdual_iha", layer_windows=windows, iha=IHAConfig(pseudo_heads=PSEUDO_HEADS, layers=layers)),
        "iha_lite": _model("jaxdual_iha", iha=everywhere),
    }


def steps_of(configs: dict[str, ModelConfig], steps: int) -> dict[str, int]:
    """Steps that cost each arm what `steps` cost the base."""
    spent = steps * training(configs[BASE], LENGTH)
    return {name: round(spent / training(config, LENGTH)) for name, config in configs.items()}


def run(
    *, seeds: int = 3, steps: int = 240, points: int = 5, windows: int = 48, keep: Path | None = None, tell: Say = say
) -> dict[str, Any]:
    """Trains all arms and compares their held-out losses.

    Args:
      seeds: of first weights and order of data, at least two.
      steps: of the base; the other arms have as many as the same operations allow.
      points: of each curve.
      windows: held-out ones that losses are measured on.
      keep: folder of runs that are done; an interrupted measurement goes on there.
      tell: takes a line of progress.

    Returns:
      Settings, rows, curves, baselines and verdict, all plain values.

    Raises:
      CorpusChangedError: the training text is not the listed one.
    """
    text, configs = Text.read(LENGTH, windows), arms()
    budget = steps_of(configs, steps)
    common = min(budget.values())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    stream = WindowStream(text.entries, text.train, seed=0)
    for seed in range(seeds):
        data = stream.reseeded(seed)
        shared = parameters_of(models.init(configs[BASE], seed=seed))
        for name, config in configs.items():
            one = trained(
                config,
                RECIPE,
                budget[name],
                data,
                text.heldout,
                beginning(config, shared, seed),
                measured_at={common, *(budget[name] * point // points for point in range(1, points))},
                keep=None if keep is None else keep / f"lm_{name}_{steps}_{seed}.json",
            )
            found[name].append(one)
            tell(f"lm: {name}, seed {seed}: {one['curve'][-1][1]:.4f} nats/token, {one['cpu_seconds']:.0f} CPU seconds")
    return _results(text, configs, budget, common, found) | {
        "settings": {
            "seeds": seeds,
            "steps": budget,
            "heldout_windows": windows,
            "length": LENGTH,
            "recipe": asdict(RECIPE),
            "configs": {name: asdict(config) for name, config in configs.items()},
        }
    }


def beginning(config: ModelConfig, shared: Parameters, seed: int) -> Parameters:
    """First parameters of a model: those of `shared` where it has them, others from the seed."""
    own = parameters_of(models.init(config, seed=seed))
    return {name: jnp.array(shared.get(name, value)) for name, value in own.items()}


def _model(family: str, **more: Any) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_ids=(VOCAB_SIZE - 1, VOCAB_SIZE - 3),
        **more,
    )


def _results(
    text: Text,
    configs: dict[str, ModelConfig],
    budget: dict[str, int],
    common: int,
    found: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    ends = {name: [one["curve"][-1][1] for one in runs] for name, runs in found.items()}
    at_common = {name: [dict(map(tuple, one["curve"]))[common] for one in runs] for name, runs in found.items()}
    rows = [
        {
            "arm": name,
            "parameters": sum(value.size for value in parameters_of(models.init(config)).values()),
            "mixing_parameters": num_mixing_parameters(config),
            "forward_flops_per_token": forward(config, LENGTH),
            "training_flops_per_token": training(config, LENGTH),
            "executed_flops_per_token": training_executed(config, LENGTH),
            "steps": budget[name],
            "tokens": budget[name] * RECIPE.tokens_per_step,
            "training_flops": budget[name] * RECIPE.tokens_per_step * training(config, LENGTH),
            "cpu_seconds_per_run": [one["cpu_seconds"] for one in found[name]],
            "loss": summary(ends[name]),
            "bits_per_byte": text.bits_per_nat * summary(ends[name])["mean"],
            "loss_at_common_step": summary(at_common[name]),
            "difference": difference(ends[name], ends[BASE]),
            "difference_at_common_step": difference(at_common[name], at_common[BASE]),
        }
        for name, config in configs.items()
    ]
    return {
        "baselines": text.baselines(),
        "common_step": common,
        "rows": rows,
        "curves": {name: [one["curve"] for one in runs] for name, runs in found.items()},
        "verdict": {"equal_operations": _verdicts(ends), "equal_tokens": _verdicts(at_common)},
    }


def _verdicts(losses: dict[str, list[float]]) -> list[str]:
    """On every arm beside the base, and on IHA beside plain models with windows: what mixing adds to them."""
    compared = [(name, BASE) for name in losses if name != BASE] + [("iha", LOCAL), ("iha", WINDOWS)]
    return [judged(name, base, difference(losses[name], losses[base]), "nats/token") for name, base in compared]


def experiment(setting: Setting) -> Result:
    """Trains all arms: 240 steps of the base in place of 5,000."""
    found = run(seeds=setting.seeds, steps=5000 if setting.full else 240, keep=setting.keep)
    ends = {row["arm"]: row["loss"]["mean"] for row in found["rows"]}
    verdicts = [*found["verdict"]["equal_operations"], "At the common step:", *found["verdict"]["equal_tokens"]]
    return Result(
        tables=[_table(found)],
        verdict=" ".join(verdicts),
        holds=max(ends.values()) < found["baselines"]["unigram"],
        curves=[
            Curves(
                "language models of equal operations",
                "step",
                "held-out loss, nats a token",
                found["curves"],
                levels={"token frequencies": found["baselines"]["unigram"]},
            )
        ],
        figures=found,
    )


def _table(found: dict[str, Any]) -> Table:
    rows = [
        (
            row["arm"],
            row["parameters"],
            f"{row['training_flops_per_token'] / 1e6:.3f}",
            row["steps"],
            f"{row['loss']['mean']:.4f}",
            *interval_cells(row["difference"]),
            f"{row['loss_at_common_step']['mean']:.4f}",
            f"{row['difference_at_common_step']['mean']:+.4f}",
        )
        for row in found["rows"]
    ]
    rows += [(name, None, None, None, f"{loss:.4f}") for name, loss in found["baselines"].items()]
    head = (
        "arm",
        "parameters",
        "MFLOP/token",
        "steps",
        "held out",
        "to mha",
        "low",
        "high",
        "at common step",
        "to mha",
    )
    return Table(
        "held-out loss, nats a token, at equal operations",
        head,
        [(*row, *[None] * (len(head) - len(row))) for row in rows],
    )
