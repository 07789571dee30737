"""What bytes pass through: cards and memories as queues, first come first served, that count what has passed."""

from __future__ import annotations

from collections.abc import Sequence


class Pipe:
    """One direction of a card, or a memory.

    Args:
      rate: bytes per second.
      window_seconds: of `windows`; None for no account over time.

    Attributes:
      nbytes: that have been sent through.
      busy_until: when the last of them has passed.
      windows: bytes of each window of time.
    """

    __slots__ = ("_window", "busy_until", "nbytes", "rate", "windows")

    def __init__(self, rate: float, window_seconds: float | None = None) -> None:
        self.rate = rate
        self.nbytes = 0.0
        self.busy_until = 0.0
        self.windows: list[float] = []
        self._window = window_seconds

    def send(self, now: float, nbytes: float) -> float:
        """Queues bytes; when the last of them has passed. None of them wait for nothing."""
        if not nbytes:
            return now
        begin = self.busy_until if self.busy_until > now else now
        end = begin + nbytes / self.rate
        self.nbytes += nbytes
        self.busy_until = end
        if self._window is not None:
            self._account(begin, end, nbytes)
        return end

    def left(self, now: float) -> float:
        """Bytes that have not passed at a time when nothing is sent any more: they follow one another."""
        return min(self.nbytes, max(0.0, self.busy_until - now) * self.rate)

    def _account(self, begin: float, end: float, nbytes: float) -> None:
        windows, size = self.windows, self._window or 1.0
        first, last = int(begin / size), int(end / size)
        if last >= len(windows):
            windows.extend([0.0] * (last + 1 - len(windows)))
        if first == last:
            windows[first] += nbytes
            return
        per_second = nbytes / (end - begin)
        windows[first] += ((first + 1) * size - begin) * per_second
        for number in range(first + 1, last):
            windows[number] += size * per_second
        windows[last] += (end - last * size) * per_second


class Card:
    """A card with its two directions, as its host's memory sees them: `read` is out of memory, `write` into it."""

    __slots__ = ("read", "write")

    def __init__(self, rate: float, window_seconds: float | None = None) -> None:
        self.read, self.write = Pipe(rate, window_seconds), Pipe(rate, window_seconds)


def send_through(now: float, nbytes: float, pipes: Sequence[Pipe]) -> float:
    """Sends bytes through several pipes at once; when the slowest of them has let them pass."""
    return max([pipe.send(now, nbytes) for pipe in pipes])
