"""Choice of an implementation of an operation: named ones, or the first that can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("mosaic", "cudnn", "xla", "reference")


def run[Result](
    op: str, implementations: Mapping[str, Callable[..., Result]], implementation: str, *args: Any, **kwargs: Any
) -> Result:
    """Calls the implementation of `op` that `implementation` names.

    Args:
      op: name of the operation, for messages.
      implementations: by name, which is one of `NAMES`, in the order in which "auto" tries them.
      implementation: one of `NAMES`, or "auto": the first that does not raise `NotImplementedError`.

    Raises:
      ValueError: no such name.
      NotImplementedError: `op` has no such implementation, or it can't do these arguments; for "auto" the message says
        why each can't, and the cause is a group of their errors.
    """
    if implementation == "auto":
        refusals: dict[str, NotImplementedError] = {}
        for name, function in implementations.items():
            try:
                return function(*args, **kwargs)
            except NotImplementedError as error:
                refusals[name] = error
        reasons = "; ".join(f"{name}: {error}" for name, error in refusals.items())
        raise NotImplementedError(f"{op}: no implementation can do these arguments: {reasons}") from ExceptionGroup(
            "of each implementation", list(refusals.values())
        )
    if implementation not in NAMES:
        raise ValueError(f"{op}: {implementation=} is none of {['auto', *NAMES]}")
    if implementation not in implementations:
        raise NotImplementedError(f"{op} has no form named {implementation!r}, only {list(implementations)}")
    return implementations[implementation](*args, **kwargs)
