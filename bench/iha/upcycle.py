"""What upcycling costs at first, and what training makes of it: the shipped `small` model with pseudo heads.

The start gap is the held-out loss of the upcycled model above its base's, without training. Then the nearest starts and
the base itself are trained on with the same recipe, the same windows in the same order, and equally many tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import models
from bench.iha.paired import difference, interval_cells, judged, summary
from bench.iha.results import Curves, Result, Setting, Table
from bench.iha.training_flops import training
from bench.iha.training_runs import SHIPPED, Say, Text, say, trained
from models import Decoder
from models.config import IHAConfig
from models.shapes import parameters_of
from models.training.data import WindowStream
from models.training.recipes import Recipe
from models.training.step import cross_entropy
from models.upcycle import ROPES, SELECTS, is_exact, stay_copies, upcycled
from pallas_kernels.pseudo_heads import MASKS

PSEUDO_HEADS = 2
LENGTH = 256
NOISE = 0.02
CONTROL = "base"
# A twentieth of the rate that the base was trained with: at a fifth, the base itself became worse.
RECIPE = Recipe(
    tokens_per_step=1024, length=LENGTH, long_length=LENGTH, long_fraction=0.0, peak_rate=5e-4, warmup_steps=10
)
# Rope, mask and noise of what is trained on, all with the mean of the pseudo heads.
STARTS = {
    "scaled": ("scaled", "token", 0.0),
    "exact": ("token", "token", 0.0),
    "exact_noise": ("token", "token", NOISE),
}
# Other windows than the base's training began with.
_FIRST_SEED = 1000
_EXACT = 1e-3  # nats a token: rounding


def run(
    *, seeds: int = 3, steps: int = 60, points: int = 4, windows: int = 32, keep: Path | None = None, tell: Say = say
) -> dict[str, Any]:
    """Measures start gaps, then trains on.

    Args:
      seeds: of noise and order of data, at least two.
      steps: of each run.
      points: of each curve.
      windows: held-out ones that losses are measured on.
      keep: folder of runs that are done; an interrupted measurement goes on there.
      tell: takes a line of progress.

    Returns:
      Settings, start gaps, rows, curves and verdict, all plain values.

    Raises:
      CorpusChangedError: the training text is not the listed one.
    """
    text = Text.read(LENGTH, windows)
    base = models.load(SHIPPED / "small", dtype="float32")
    before = _loss(base, text)
    gaps = start_gaps(base, text, before, tell=tell)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (CONTROL, *STARTS)}
    stream = WindowStream(text.entries, text.train, _FIRST_SEED)
    for seed in range(seeds):
        data = stream.reseeded(_FIRST_SEED + seed)
        for name, runs in found.items():
            model = base if name == CONTROL else _start(base, *STARTS[name], seed=seed)
            first = _loss(model, text)
            one = trained(
                model.config,
                RECIPE,
                steps,
                data,
                text.heldout,
                parameters_of(model),
                measured_at={steps * point // points for point in range(1, points)},
                keep=None if keep is None else keep / f"upcycle_{name}_{steps}_{RECIPE.peak_rate:g}_{seed}.json",
            )
            runs.append(one | {"curve": [(0, first), *one["curve"]]})
            tell(f"upcycle: {name}, seed {seed}: {first:.4f} to {one['curve'][-1][1]:.4f} nats/token")
    return _results(base, before, found) | {
        "start_gaps": gaps,
        "settings": {
            "source": "small",
            "pseudo_heads": PSEUDO_HEADS,
            "seeds": seeds,
            "steps": steps,
            "tokens": steps * RECIPE.tokens_per_step,
            "heldout_windows": windows,
            "length": LENGTH,
            "recipe": asdict(RECIPE),
        },
    }


def start_gaps(base: Decoder, text: Text, before: float, seeds: int = 2, *, tell: Say = say) -> list[dict[str, Any]]:
    """Held-out loss of upcycled models above the base's, in nats a token, for all settings.

    Args:
      before: the base's loss.
      seeds: of the noise.
    """
    rows = []
    for rope, mask, select in itertools.product(ROPES, MASKS, SELECTS):
        plain = _loss(_start(base, rope, mask, 0.0, select=select), text) - before
        noisy = [
            _loss(_start(base, rope, mask, NOISE, select=select, seed=seed), text) - before for seed in range(seeds)
        ]
        exact = is_exact(_iha(base, rope, mask), select)
        rows.append({"rope": rope, "mask": mask, "select": select, "exact": exact, "gap": plain})
        rows[-1] |= {"noise": NOISE, "gap_with_noise": summary(noisy)}
        tell(f"upcycle: rope {rope}, mask {mask}, select {select}: {plain:+.4f}, with noise {noisy[0]:+.4f}")
    return rows


def _iha(base: Decoder, rope: str, mask: str) -> IHAConfig:
    every = tuple(range(base.config.num_layers))
    return IHAConfig(pseudo_heads=PSEUDO_HEADS, layers=every, rope=rope, mask=mask)  # type: ignore[arg-type]


def _start(base: Decoder, rope: str, mask: str, noise: float, *, select: str = "mean", seed: int = 0) -> Decoder:
    return upcycled(base, _iha(base, rope, mask), select=select, noise=noise, seed=seed)


def _loss(model: Decoder, text: Text) -> float:
    return float(cross_entropy(model.config, RECIPE, parameters_of(model), jnp.asarray(text.heldout)))


def _results(base: Decoder, before: float, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    ends = {name: [one["curve"][-1][1] for one in runs] for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        settings = None if name == CONTROL else STARTS[name]
        config = base.config if settings is None else _start(base, *settings).config
        rows.append(
            {
                "arm": name,
                "rope": settings and settings[0],
                "mask": settings and settings[1],
                "noise": settings and settings[2],
                "training_flops_per_token": training(config, LENGTH),
                "start_gap": summary([one["curve"][0][1] - before for one in runs]),
                "loss": summary(ends[name]),
                "from_base": difference(ends[name], [before] * len(runs)),
                "from_control": difference(ends[name], ends[CONTROL]),
                "stays_copies": settings is not None and stay_copies(_iha(base, *settings[:2]), "mean", settings[2]),
                "cpu_seconds_per_run": [one["cpu_seconds"] for one in runs],
            }
        )
    return {
        "base_loss": before,
        "rows": rows,
        "curves": {name: [one["curve"] for one in runs] for name, runs in found.items()},
        "verdict": [judged(row["arm"], CONTROL, row["from_control"], "nats/token") for row in rows[1:]],
    }


def experiment(setting: Setting) -> Result:
    """Measures start gaps, and trains on for 60 steps in place of 2,000."""
    found = run(seeds=setting.seeds, steps=2000 if setting.full else 60, keep=setting.keep)
    return Result(
        tables=_tables(found),
        verdict=" ".join(found["verdict"]),
        holds=all(abs(row["gap"]) < _EXACT for row in found["start_gaps"] if row["exact"]),
        curves=[Curves("upcycled models trained on", "step", "held-out loss, nats a token", found["curves"])],
        figures=found,
    )


def _tables(found: dict[str, Any]) -> list[Table]:
    gaps = [
        (
            f"{row['rope']} {row['mask']} {row['select']}",
            "exact" if row["exact"] else None,
            f"{row['gap']:+.5f}",
            f"{row['gap_with_noise']['mean']:+.5f}",
        )
        for row in found["start_gaps"]
    ]
    rows = [
        (
            row["arm"],
            f"{row['training_flops_per_token'] / 1e6:.2f}",
            f"{row['start_gap']['mean']:+.4f}",
            f"{row['loss']['mean']:.4f}",
            *interval_cells(row["from_control"]),
        )
        for row in found["rows"]
    ]
    base = f"above the base's {found['base_loss']:.4f} nats a token, without training"
    return [
        Table(base, ("rope mask select", "on paper", "gap", f"noise {NOISE}"), gaps),
        Table("trained on", ("start", "MFLOP/token", "start gap", "end", "to base", "low", "high"), rows),
    ]
