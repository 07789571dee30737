"""Sparsity Induction on a command line."""

from __future__ import annotations

import argparse

from jaxdual.pruning.induction.settings import MODES, REGULARIZERS, STARTS, Induction

_NONE = "none"
_DEFAULT = Induction()


def add_induction(parser: argparse.ArgumentParser) -> None:
    """Adds `--si` and what goes with it."""
    group = parser.add_argument_group("Sparsity Induction")
    group.add_argument("--si", choices=(*MODES, _NONE), help="its mode; default score, of blocks and structured none")
    group.add_argument("--si-start", choices=STARTS, help="scales at first; rms for magnitude, else ones")
    group.add_argument("--si-regularizer", choices=REGULARIZERS, default=_DEFAULT.regularizer)
    for name, kind, about in (
        ("weight", float, "of the regularizer"),
        ("epochs", int, "passes over the text"),
        ("rate", float, "of Adam"),
        ("temperature", float, "of masks on the way back"),
        ("batch", int, "windows in a step"),
    ):
        default = getattr(_DEFAULT, name)
        group.add_argument(f"--si-{name}", type=kind, default=default, help=f"{about}; default {default}")


def induction_of(options: argparse.Namespace, *, default: str) -> Induction | None:
    """The settings that a command line asks for; None for none.

    Args:
      options: parsed.
      default: the mode where none is named.

    Raises:
      ValueError: a setting outside its range.
    """
    mode = options.si or default
    induction = Induction(
        mode="score" if mode == _NONE else mode,  # type: ignore[arg-type]  # one of the choices
        start=options.si_start,
        regularizer=options.si_regularizer,
        weight=options.si_weight,
        epochs=options.si_epochs,
        rate=options.si_rate,
        temperature=options.si_temperature,
        batch=options.si_batch,
    )
    return None if mode == _NONE else induction
