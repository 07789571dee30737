"""Warnings about what may go wrong a thousand times a second: each cause is told now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_SECONDS = 60.0


class Complaints:
    """Tells each cause at once, and then at most once a minute, with how often it has come up since. Any thread may.

    Args:
      logger: who tells.
      clock: seconds, monotonic.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._lock = threading.Lock()
        self._told: dict[str, tuple[float, int]] = {}  # when it was told last, and how often it has come up since

    def tell(self, cause: str, times: int = 1) -> None:
        """Something has happened.

        Args:
          cause: the same text for what is the same.
          times: how often.
        """
        now = self._clock()
        with self._lock:
            told, since = self._told.get(cause, (float("-inf"), 0))
            quiet = now - told < _SECONDS
            self._told[cause] = (told, since + times) if quiet else (now, 0)
        if not quiet:
            self._logger.warning("%s (%d times)", cause, since + times)
