"""The order in which sequences wait for an engine to take them in.

Shortest-first is "SJFS" of arXiv 2602.21626, Algorithm 2: the cost of a sequence is the length of its prompt, and one
that has waited for `age_limit` goes before all that have not. Smaller priorities go before larger ones in any order.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

AGE_LIMIT = 5.0  # seconds: theta_age of the paper
AGEING_RATE = 600.0  # tokens a second of waiting, by linear ageing: theta_load / theta_age
_ROLLING_SHARE = 0.9  # of the rolling 99th percentile of TTFT
_ROLLING_WINDOW = 1000  # requests
_ROLLING_LEAST = 100  # requests without which no percentile is known


class Queued(Protocol):
    """What an order may know of a sequence.

    Attributes:
      seq_id: unique for ever.
      priority: smaller goes first, whatever else holds.
      arrival: seconds, when the request was received; a preempted sequence keeps it.
      prompt_length: tokens.
    """

    @property
    def seq_id(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def prompt_length(self) -> int: ...


type Key = tuple[float, ...]


def arrival_key(sequence: Queued) -> Key:
    """First come, first served."""
    return (sequence.priority, sequence.arrival, sequence.seq_id)


def linear_key(sequence: Queued, rate: float = AGEING_RATE) -> Key:
    """The smaller `prompt - rate * waited` goes first; time passes for all alike, so the key is fixed."""
    return (sequence.priority, sequence.prompt_length + rate * sequence.arrival, sequence.seq_id)


class WaitingQueue[Q: Queued](Protocol):
    """Sequences that wait, and whose turn it is."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Q]:
        """All that wait, in any order."""

    def add(self, sequence: Q) -> None:
        """Takes one in."""

    def remove(self, sequence: Q) -> None:
        """Lets one go; raises KeyError if it does not wait here."""

    def in_order(self, now: float) -> Sequence[Q]:
        """All that wait, whoever is next first. Not to be kept over a change.

        Args:
          now: seconds, on the clock of `arrival`; never less than in the call before.
        """

    def first_token(self, waited: float) -> None:
        """A sequence has given its first token, `waited` seconds after its arrival."""


class FixedOrder[Q: Queued]:
    """By a key that never changes."""

    def __init__(self, key: Callable[[Q], Key]) -> None:
        self._key = key
        self._sequences: list[Q] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Q]:
        return iter(self._sequences)

    def add(self, sequence: Q) -> None:
        """See `WaitingQueue`."""
        bisect.insort(self._sequences, sequence, key=self._key)

    def remove(self, sequence: Q) -> None:
        """See `WaitingQueue`."""
        del self._sequences[_position(self._sequences, sequence, self._key)]

    def in_order(self, now: float) -> Sequence[Q]:
        """See `WaitingQueue`."""
        return self._sequences

    def first_token(self, waited: float) -> None:
        """See `WaitingQueue`."""


class RollingAgeLimit:
    """Part of the 99th percentile of the latest times to a first token, so that few sequences age and some do.

    The paper advises a limit below that percentile, and sets one above.
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_ROLLING_WINDOW)
        self._sorted: list[float] = []

    def observe(self, seconds: float) -> None:
        """Takes note of a time to a first token."""
        if len(self._latest) == _ROLLING_WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._latest[0])]
        self._latest.append(seconds)
        bisect.insort(self._sorted, seconds)

    def __call__(self) -> float:
        if len(self._sorted) < _ROLLING_LEAST:
            return AGE_LIMIT
        return _ROLLING_SHARE * self._sorted[len(self._sorted) * 99 // 100]


class ShortestFirst[Q: Queued]:
    """The shortest prompt first, but those that have waited for the age limit before all others, oldest first.

    Args:
      age_limit: seconds; infinity for none, which starves long prompts under load.

    Attributes:
      aged: sequences that have reached the limit since the start.
    """

    def __init__(self, age_limit: float | RollingAgeLimit = AGE_LIMIT) -> None:
        self._limit = age_limit
        self._young: list[Q] = []
        self._young_by_arrival: list[Q] = []
        self._old: list[Q] = []
        self._in_order: list[Q] | None = None
        self.aged = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __iter__(self) -> Iterator[Q]:
        return itertools.chain(self._old, self._young)

    def add(self, sequence: Q) -> None:
        """See `WaitingQueue`."""
        bisect.insort(self._young, sequence, key=_length_key)
        bisect.insort(self._young_by_arrival, sequence, key=_age_key)
        self._in_order = None

    def remove(self, sequence: Q) -> None:
        """See `WaitingQueue`."""
        self._in_order = None
        try:
            del self._old[_position(self._old, sequence, arrival_key)]
        except KeyError:
            self._remove_young(sequence)

    def in_order(self, now: float) -> Sequence[Q]:
        """See `WaitingQueue`."""
        limit = self._limit if isinstance(self._limit, float | int) else self._limit()
        while self._young_by_arrival and now - self._young_by_arrival[0].arrival >= limit:
            sequence = self._young_by_arrival[0]
            self._remove_young(sequence)
            bisect.insort(self._old, sequence, key=arrival_key)
            self._in_order = None
            self.aged += 1
        if self._in_order is None:
            self._in_order = sorted(self._old + self._young, key=_priority)  # stable: the old of a priority first
        return self._in_order

    def first_token(self, waited: float) -> None:
        """See `WaitingQueue`."""
        if isinstance(self._limit, RollingAgeLimit):
            self._limit.observe(waited)

    def _remove_young(self, sequence: Q) -> None:
        del self._young[_position(self._young, sequence, _length_key)]
        del self._young_by_arrival[_position(self._young_by_arrival, sequence, _age_key)]


def _length_key(sequence: Queued) -> Key:
    return (sequence.priority, sequence.prompt_length, sequence.arrival, sequence.seq_id)


def _age_key(sequence: Queued) -> Key:
    return (sequence.arrival, sequence.seq_id)


def _priority(sequence: Queued) -> int:
    return sequence.priority


def _position[Q: Queued](ordered: list[Q], sequence: Q, key: Callable[[Q], Key]) -> int:
    """Raises KeyError if it is not there."""
    position = bisect.bisect_left(ordered, key(sequence), key=key)
    if position == len(ordered) or ordered[position] is not sequence:
        raise KeyError(f"sequence {sequence.seq_id} does not wait here")
    return position


QUEUE_POLICIES = ("fcfs", "sjf", "sjf_rolling", "sjf_linear")


def waiting_queue[Q: Queued](name: str, age_limit: float = AGE_LIMIT) -> WaitingQueue[Q]:
    """An empty queue of the order that a configuration names.

    Args:
      name: one of `QUEUE_POLICIES`.
      age_limit: seconds, of "sjf"; infinity for none.

    Raises:
      ValueError: another name, or a limit that is not above 0.
    """
    if not age_limit > 0:
        raise ValueError(f"{age_limit=} must be above 0 seconds")
    match name:
        case "fcfs":
            return FixedOrder(arrival_key)
        case "sjf":
            return ShortestFirst(age_limit)
        case "sjf_rolling":
            return ShortestFirst(RollingAgeLimit())
        case "sjf_linear":
            return FixedOrder(linear_key)
    raise ValueError(f"scheduling policy {name!r} must be one of {', '.join(QUEUE_POLICIES)}")
