"""Agent traces drawn from published statistics: the three sets of DualPath (arXiv 2602.21548), Table 2."""

from dataclasses import dataclass

import numpy as np

from jaxdual.offline.trace import Session, Turn

TRAJECTORIES = 500  # of each set
_TURNS_SPREAD = 0.15  # uniform around the mean; longer sessions would pass the set's name
_WORK_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class TraceShape:
    """Means of a set of trajectories, in tokens but for `turns`.

    Attributes:
      turns: of a trajectory.
      append, generate: prompt tokens to compute and output tokens of a turn.
      total: tokens of a trajectory at its end.
      context: tokens of a prompt.
    """

    turns: int
    append: int
    generate: int
    total: int
    context: int

    @property
    def first(self) -> int:
        """Where the line begins on which contexts grow: it has the mean `context` and ends at `total`."""
        return 2 * self.context - self.total

    @property
    def increment(self) -> float:
        """Tokens that the context grows by from turn to turn."""
        return (self.total - self.first) / self.turns


TRACE_SHAPES = {
    "32k": TraceShape(60, 608, 148, 28_639, 17_183),
    "48k": TraceShape(106, 474, 172, 42_607, 25_120),
    "64k": TraceShape(157, 429, 176, 55_958, 32_721),
}


def generate_sessions(name: str, count: int, seed: int) -> list[Session]:
    """The first `count` trajectories of a set, the same for any `count`.

    Turn i (from 0) sends `first + (i + 1/2) * increment` tokens. The published append and generation lengths sum to
    more than that grows, so they are taken as the work of a turn: what would make the context too long is dropped from
    its end before the new tokens come. Append and generation lengths and the number of turns vary around their means.

    Args:
      name: one of `TRACE_SHAPES`.
      count: at most `TRAJECTORIES`.
      seed: of all that varies.

    Raises:
      ValueError: an unknown name, or too many.
    """
    if name not in TRACE_SHAPES:
        raise ValueError(f"trace {name!r} must be one of {', '.join(TRACE_SHAPES)}")
    if not 0 < count <= TRAJECTORIES:
        raise ValueError(f"count={count} must be in [1, {TRAJECTORIES}]")
    return [_session(name, TRACE_SHAPES[name], number, seed) for number in range(count)]


def _session(name: str, shape: TraceShape, number: int, seed: int) -> Session:
    rng = np.random.default_rng((seed, shape.turns, number))

    def vary(mean: float, spread: float) -> int:
        return round(mean * rng.uniform(1 - spread, 1 + spread))

    turns, context = [], 0
    for i in range(vary(shape.turns, _TURNS_SPREAD)):
        prompt = round(shape.first + (i + 0.5) * shape.increment)
        append = vary(shape.append, _WORK_SPREAD) if i else prompt
        turn = Turn(append, vary(shape.generate, _WORK_SPREAD), max(0, context + append - prompt))
        turns.append(turn)
        context += turn.append + turn.generate - turn.drop
    return Session(f"{name}-{number}", tuple(turns))
