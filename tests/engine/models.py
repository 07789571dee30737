"""Models of the engine's tests: parity fixtures, models made from a seed, and what they should give."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import models
from tests import iha_models, pruned_models, windowed_models

_MAKERS: dict[str, Callable[[str, Path], Path]] = {
    name: maker.write for maker in (iha_models, pruned_models, windowed_models) for name in maker.KINDS
}
FIXTURES = Path(__file__).parent.parent / "fixtures" / "hf"


def folder(name: str) -> Path:
    """Folder of a parity fixture, or of a model that is made when first asked for."""
    return Path(_made(name).name) if name in _MAKERS else FIXTURES / name


@functools.cache
def _made(name: str) -> tempfile.TemporaryDirectory[str]:
    place = tempfile.TemporaryDirectory(prefix="jaxdual-test-model-")
    _MAKERS[name](name, Path(place.name))
    return place


@functools.cache
def load(name: str) -> models.Decoder:
    return models.load(folder(name), dtype="float32")


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        return dict(arrays)


def logits_after(name: str, tokens: Sequence[int], padded: int = 256) -> np.ndarray:
    """Logits that follow `tokens`, by the full-sequence forward pass in one fixed shape."""
    row = np.zeros((1, padded), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(load(name).logits(row))[0, len(tokens) - 1]


class TieCounter:
    """Compares greedy outputs under the same-tokens rule: where two first differ, both tokens must be a tie.

    The last bits of a float32 product depend on its shape, so two tokens whose logits agree within 1e-3 may change
    places; such ties are counted, and may be at most 1 in 10,000 tokens.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokens = 0
        self.ties = 0

    def compare(self, prompt: Sequence[int], want: Sequence[int], got: Sequence[int]) -> None:
        assert len(want) == len(got)
        self.tokens += len(want)
        for position, (one, other) in enumerate(zip(want, got, strict=True)):
            if one != other:
                logits = logits_after(self.name, [*prompt, *want[:position]])
                assert abs(logits[one] - logits[other]) <= 1e-3, (position, one, other)
                assert logits.max() - logits[one] <= 1e-3
                self.ties += 1
                return

    def check(self) -> None:
        print(f"{self.name}: {self.ties} ties in {self.tokens} tokens")
        assert self.ties * 10_000 <= self.tokens
