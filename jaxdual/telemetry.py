"""What JAX compiles, counted."""

from __future__ import annotations

from types import TracebackType

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts programs that JAX compiles, or reads from its persistent cache, from its start until `stop`.

    Stray operations outside `jax.jit` count too: each is a program.

    Attributes:
      compilations: programs.
      seconds: time that they took.
    """

    def __init__(self) -> None:
        self.compilations = 0
        self.seconds = 0.0
        self._counting = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def stop(self) -> None:
        """Ends counting; the figures stay."""
        self._counting = False

    def __enter__(self) -> CompileCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._counting and event == _COMPILE_EVENT:
            self.compilations += 1
            self.seconds += duration_secs
