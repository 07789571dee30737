"""What commands have in common: types of arguments, and what becomes of errors."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130


def run_command(
    prog: str,
    run: Callable[[], int],
    *,
    failures: tuple[type[Exception], ...] = (OSError,),
    stopped: str | None = None,
) -> int:
    """Exit status of a command: its own, 2 for a ValueError, 1 for a failure, 130 after Ctrl-C; the last three are told
    on standard error.

    Args:
      prog: the command's name.
      run: the command.
      failures: what can go wrong in a call that is right.
      stopped: what is told after Ctrl-C; None for no more than that it was interrupted.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted" if stopped is None else stopped, file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1


def whole(low: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {low}")
        return value

    return parse


def above_0(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def json_object(text: str) -> dict[str, Any]:
    """The type of an argument that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object")
    return value
