"""Runs of the repository's trainer for a number of steps, with held-out losses on the way."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

import models
from models import ModelConfig
from models.training import corpus, tokenizer
from models.training.data import WindowStream
from models.training.recipes import Recipe
from models.training.run import Budget, run
from models.training.step import Parameters
from models.training.train import heldout_slice

SHIPPED = Path(models.__file__).parent / "shipped"


@dataclass(frozen=True, slots=True)
class Text:
    """What is trained on and measured.

    Attributes:
      entries: the shipped models' tokenizer.
      train: source files, path -> text.
      heldout: windows of files that training never sees, `[windows, length + 1]`.
      bits_per_nat: factor from nats a token to bits a byte, of these windows.
    """

    entries: Tokenizer
    train: dict[str, str]
    heldout: Int32[np.ndarray, "windows window"]
    bits_per_nat: float

    @classmethod
    def read(cls, length: int, windows: int) -> Text:
        """The shipped models' text; raises `CorpusChangedError` if this machine's differs from the list."""
        entries = tokenizer.load(SHIPPED / "small")
        train, heldout = (corpus.read_texts(split) for split in ("train", "heldout"))
        return cls(entries, dict(train), *heldout_slice(entries, heldout, length, windows))

    def baselines(self) -> dict[str, float]:
        """Nats a held-out token without a model: all tokens alike, and by their frequencies in the training text."""
        size = self.entries.get_vocab_size()
        counts = np.ones(size)
        for encoding in self.entries.encode_batch_fast(list(self.train.values())):
            np.add.at(counts, encoding.ids, 1)
        nats = -np.log(counts / counts.sum())
        return {"uniform": float(np.log(size)), "unigram": float(nats[self.heldout[:, 1:]].mean())}


def trained(
    config: ModelConfig,
    recipe: Recipe,
    steps: int,
    data: WindowStream,
    heldout: Int32[np.ndarray, "windows window"],
    initial: Parameters,
    *,
    measured_at: Container[int],
    keep: Path | None = None,
) -> dict[str, Any]:
    """Held-out losses of one run.

    Args:
      config, recipe, steps, data, heldout: as of `models.training.run.run`.
      initial: first parameters; not changed.
      measured_at: steps with a held-out loss, beside the last.
      keep: file of the result; a run whose file is there is not repeated.

    Returns:
      "curve", pairs of steps and nats a held-out token; "steps"; "cpu_seconds".
    """
    if keep is not None and keep.is_file():
        found: dict[str, Any] = json.loads(keep.read_text(encoding="utf-8"))
        return found
    curve: list[tuple[int, float]] = []
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        # The step takes the arrays that it is given.
        run(
            config,
            recipe,
            Budget(steps=steps),
            data,
            heldout,
            Path(folder),
            initial={name: jnp.array(value) for name, value in initial.items()},
            checkpoint_seconds=float("inf"),
            checkpoint_at=measured_at,
            report=lambda progress, _state: curve.append((progress.step, progress.heldout)),
        )
    result = {"curve": curve, "steps": steps, "cpu_seconds": round(time.process_time() - started, 1)}
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(json.dumps(result), encoding="utf-8")
    return result


def say(line: str) -> None:
    """Progress for a person to read."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


type Say = Callable[[str], None]
