"""Choice of an implementation of an operation: named ones, or the first that can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def run[Result](
    op: str, implementations: Mapping[str, Callable[..., Result]], implementation: str, *args: Any, **kwargs: Any
) -> Result:
    """Calls the implementation of `op` that `implementation` names.

    Args:
      op: name of the operation, for messages.
      implementations: name to function, in the order in which "auto" tries them.
      implementation: a key of `implementations`, or "auto": the first that does not raise `NotImplementedError`.

    Raises:
      ValueError: no implementation of that name.
      NotImplementedError: the named one can't do these arguments; for "auto" an `ExceptionGroup` of why each can't.
    """
    if implementation == "auto":
        refusals: list[NotImplementedError] = []
        for name, function in implementations.items():
            try:
                return function(*args, **kwargs)
            except NotImplementedError as error:
                refusals.append(NotImplementedError(f"{name}: {error}"))
        raise ExceptionGroup(f"{op}: no implementation can do these arguments", refusals)
    if implementation not in implementations:
        raise ValueError(f"{op}: {implementation=} is none of {['auto', *implementations]}")
    return implementations[implementation](*args, **kwargs)
