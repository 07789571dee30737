"""A decode engine in closed form: what all its steps between two changes of its batch take together.

A step gives every sequence of the batch a token. It takes `base + per_sequence * n + per_token * c` seconds for `n`
sequences that see `c` tokens together, and each step makes these `n` more. So `k` steps take

    k * (base + per_sequence * n + per_token * c) + per_token * n * k * (k - 1) / 2,

and how many have ended at some time is the root of that. A sequence joins at the end of the step that is under way when
it comes. What follows is what simulating each step gives, up to rounding.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from jaxdual.kv.slots import IntegrityError


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Seconds of a step.

    Attributes:
      base: of any step.
      per_sequence: of each sequence.
      per_token: of each token of all their contexts.

    Raises:
      ValueError: a coefficient is negative, or all are 0.
    """

    base: float
    per_sequence: float
    per_token: float

    def __post_init__(self) -> None:
        if min(self.base, self.per_sequence, self.per_token) < 0 or not any(
            (self.base, self.per_sequence, self.per_token)
        ):
            raise ValueError(f"{self} must have no negative coefficient, and one above 0")

    def seconds(self, steps: float, sequences: int, tokens: int) -> float:
        """Of so many steps in a row, with so many tokens in the context of the first."""
        first = self.base + self.per_sequence * sequences + self.per_token * tokens
        return steps * first + self.per_token * sequences * steps * (steps - 1) / 2

    def steps(self, seconds: float, sequences: int, tokens: int) -> int:
        """How many whole steps end within a time; the reverse of `seconds`."""
        first = self.base + self.per_sequence * sequences + self.per_token * tokens
        growth = self.per_token * sequences / 2
        # growth * k^2 + (first - growth) * k = seconds, in the form that loses no digits where growth is small.
        slope = first - growth
        divisor = slope + math.sqrt(slope * slope + 4 * growth * seconds)
        steps = int(2 * seconds / divisor) if divisor else 0
        # Rounding may be off by one at the very end of a step.
        while self.seconds(steps + 1, sequences, tokens) <= seconds:
            steps += 1
        while steps and self.seconds(steps, sequences, tokens) > seconds:
            steps -= 1
        return steps


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence whose last token was given.

    Attributes:
      sequence: its number.
      time: seconds.
      context: tokens that it has now.
    """

    sequence: int
    time: float
    context: int


class DecodeBatch:
    """One engine's batch. Times never go back from call to call.

    Args:
      cost: of its steps.
    """

    def __init__(self, cost: DecodeCost) -> None:
        self._cost = cost
        self._began = 0.0  # when the batch became what it is
        self._step = 0  # steps since ever, until then
        self._tokens = 0  # of all contexts, then
        self._running: list[tuple[int, int, int]] = []  # heap of last step, sequence, final context
        self._joining: list[tuple[int, int, int]] = []  # sequence, context, tokens to give
        self._joins: int | None = None  # after how many steps of this batch they do

    def __len__(self) -> int:
        """Sequences that run or are about to."""
        return len(self._running) + len(self._joining)

    def tokens(self, now: float) -> int:
        """Of all contexts at a time that is not after `next_time`."""
        return self._tokens_after(self._steps_until(now)) + sum(context for _, context, _ in self._joining)

    @property
    def next_time(self) -> float | None:
        """When the batch changes next; None while it is empty."""
        if self._joins is not None:
            return self._time_of(self._joins)
        if not self._running:
            return None
        return self._time_of(self._running[0][0] - self._step)

    @property
    def all_run(self) -> bool:
        """Whether nobody waits for the next step to begin."""
        return not self._joining

    @property
    def step_seconds(self) -> float:
        """Of the first step of the present batch."""
        return self._cost.seconds(1, len(self._running), self._tokens)

    def join(self, now: float, sequence: int, context: int, tokens: int) -> float:
        """A sequence comes, whose context is in memory.

        Args:
          now: seconds, not after `next_time`.
          context: tokens that its first step here sees.
          tokens: that it is to be given, at least 1.

        Returns:
          When it runs.
        """
        if tokens < 1:
            raise ValueError(f"{tokens=} must be at least 1")
        if self._joins is None:
            if not self._running:
                self._began = now
                self._joins = 0
            else:
                ended = self._steps_until(now)
                self._joins = ended + (self._time_of(ended) < now)
        self._joining.append((sequence, context, tokens))
        return self._time_of(self._joins)

    def advance(self, now: float) -> list[Finished]:
        """Has the batch change at `now`, which is `next_time`; who is done with that."""
        running = self._running
        steps = running[0][0] - self._step if self._joins is None else self._joins
        self._tokens = self._tokens_after(steps)
        self._step += steps
        self._began = now
        done = []
        while running and running[0][0] <= self._step:
            _, sequence, context = heapq.heappop(running)
            self._tokens -= context
            done.append(Finished(sequence, now, context))
        if self._joins is not None:
            for sequence, context, tokens in self._joining:
                heapq.heappush(running, (self._step + tokens, sequence, context + tokens))
                self._tokens += context
            self._joining.clear()
            self._joins = None
        return done

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless contexts are what the sequences have been given."""
        tokens = sum(context - (last - self._step) for last, _, context in self._running)
        if tokens != self._tokens:
            raise IntegrityError(f"the batch counts {self._tokens} tokens, its sequences have {tokens}")

    def _tokens_after(self, steps: int) -> int:
        return self._tokens + len(self._running) * steps

    def _time_of(self, steps: int) -> float:
        """When so many steps of this batch have ended."""
        return self._began + self._cost.seconds(steps, len(self._running), self._tokens)

    def _steps_until(self, now: float) -> int:
        if not self._running:
            return 0
        return self._cost.steps(now - self._began, len(self._running), self._tokens)
