"""`python -m jaxdual.pruning --method structured`: models that become smaller."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxdual.pruning.induction.options import induction_of
from jaxdual.pruning.structured.plan import Structure
from jaxdual.pruning.structured.run import SmallerLayer, chosen_widths, prune_structured
from jaxdual.pruning.ways import check_windows
from models import Decoder

STRUCTURED = "structured"


class StructuredJob:
    """A `Job` that takes neurons, key-value heads and experts out.

    Args:
      options: of the command.

    Raises:
      ValueError: options that don't go together or are outside their range.
    """

    record = SmallerLayer

    def __init__(self, options: argparse.Namespace) -> None:
        self._structure = Structure.parse(
            options.pattern, kv_groups=options.kv_groups, widths=options.widths, shift=options.shift
        )
        if options.update is not None:
            raise ValueError(f"--update {options.update} is not of --method {STRUCTURED}, which has its own")
        self._induction = induction_of(options, default="none")
        if self._induction is not None and self._induction.mode != "score":
            raise ValueError(
                f"--si {self._induction.mode}: with --method {STRUCTURED} scales count in the choice alone: score"
            )
        self.settings: dict[str, Any] = {
            "method": STRUCTURED,
            "structure": dataclasses.asdict(self._structure),
            "induction": None if self._induction is None else dataclasses.asdict(self._induction),
        }

    def check(self, model: Decoder, windows: int, tokens: int) -> None:
        if self._induction is not None:
            check_windows(windows, self._induction.batch)
        self._structure.check_learning(model.config, scales=self._induction is not None)
        self._structure.check(model.config, tokens)

    def prepare(self, model: Decoder, windows: Int32[np.ndarray, "N L"]) -> list[int]:
        """Widths of the layers."""
        return chosen_widths(model, windows, self._structure)

    def prune(
        self,
        model: Decoder,
        windows: Int32[np.ndarray, "N L"],
        prepared: list[int],
        first: int,
        done: Callable[[SmallerLayer], None],
    ) -> Decoder:
        return prune_structured(
            model, windows, self._structure, prepared, first=first, done=done, induction=self._induction
        )

    def outcome(
        self, told: Sequence[SmallerLayer], before: dict[str, Any], after: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        stay, were = after["parameters"], before["parameters"]
        return {}, f"{stay} of {were} parameters stay ({stay / were:.1%})"
