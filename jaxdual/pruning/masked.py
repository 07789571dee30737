"""`python -m jaxdual.pruning` with methods that set weights to zero."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxdual.pruning.induction.options import induction_of
from jaxdual.pruning.layer import Plan
from jaxdual.pruning.methods import METHODS, UPDATES
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.run import PrunedLayer, check, prune_model
from models import Decoder


class MaskedJob:
    """A `Job` of one of `METHODS`.

    Args:
      options: of the command.

    Raises:
      ValueError: options that don't go together or are outside their range.
    """

    record = PrunedLayer

    def __init__(self, options: argparse.Namespace) -> None:
        if options.kv_groups or options.widths != "even":
            raise ValueError(f"--kv-groups and --widths are of --method structured, and the method is {options.method}")
        pattern = Pattern.parse(options.pattern)
        self._plan = Plan(
            METHODS[options.method],
            pattern,
            None if options.update is None else UPDATES[options.update],
            induction_of(options, default="none" if pattern.block else "score"),
            options.shift,
        )
        induction = self._plan.induction
        self.settings: dict[str, Any] = {
            "method": options.method,
            "pattern": str(pattern),
            "update": options.update,
            "induction": None if induction is None else dataclasses.asdict(induction),
            "shift": options.shift,
        }

    def check(self, model: Decoder, windows: int, tokens: int) -> None:
        check(model, self._plan, windows)

    def prepare(self, model: Decoder, windows: Int32[np.ndarray, "N L"]) -> None:
        """Nothing."""

    def prune(
        self,
        model: Decoder,
        windows: Int32[np.ndarray, "N L"],
        prepared: None,
        first: int,
        done: Callable[[PrunedLayer], None],
    ) -> Decoder:
        prune_model(model, windows, self._plan, first=first, done=done)
        return model

    def outcome(
        self, told: Sequence[PrunedLayer], before: dict[str, Any], after: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        matrices = [one for layer in told for one in layer.matrices]
        removed, weights = sum(one.removed for one in matrices), sum(one.weights for one in matrices)
        share = removed / weights
        return {"sparsity": share}, f"{removed} of {weights} weights in {len(matrices)} matrices are 0 ({share:.1%})"
