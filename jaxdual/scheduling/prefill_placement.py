"""Which prefill engine computes a request: DualPath 6.1, Algorithm 1 ("Inter-PE Scheduling")."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxdual.scheduling.loads import EngineReport, PathRequest

READ_SECONDS = 3.0  # DualPath A.4: alpha is what a node reads in this time,
COMPUTE_SECONDS = 5.0  # and beta what a GPU computes in this time.


@dataclass(frozen=True, slots=True)
class PrefillPlacement:
    """Algorithm 1: engines whose node has little to read come first, and overloaded ones get nothing.

    An engine with `tok > beta` is overloaded and gets nothing, however idle the rest is. Of the others, those with
    `read_q <= alpha` are preferred, since a node with a short disk queue may soon read nothing; then the least `tok`
    decides, then the lowest engine number.

    Attributes:
      alpha: longest disk queue of a node that still counts as short, in tokens.
      beta: most tokens of an engine that still gets requests.
      reclassify: whether each assignment may make its engine overloaded, as the text has it. If not, the classes are
        those at the fetch, as the pseudo-code has it: an engine may then get any number of requests in one fetch.

    Raises:
      ValueError: a limit is negative.
    """

    alpha: int
    beta: int
    reclassify: bool = True

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"{self.alpha=} and {self.beta=} must be at least 0")

    @classmethod
    def from_rates(
        cls,
        node_read_rate: float,
        engine_compute_rate: float,
        *,
        read_seconds: float = READ_SECONDS,
        compute_seconds: float = COMPUTE_SECONDS,
    ) -> PrefillPlacement:
        """Limits from profiled rates.

        Args:
          node_read_rate: tokens that a node reads from the store in a second.
          engine_compute_rate: prompt tokens that one engine moves through in a second, hits included: `tok` counts them
            too.
          read_seconds, compute_seconds: what the limits stand for.
        """
        return cls(int(node_read_rate * read_seconds), int(engine_compute_rate * compute_seconds))

    def place(self, queue: Iterable[PathRequest], engines: Sequence[EngineReport]) -> list[tuple[PathRequest, int]]:
        """Assigns requests from the head of the queue until all engines are overloaded.

        Args:
          queue: waiting requests, first come first.
          engines: of the fetching group.

        Returns:
          A prefix of the queue, each request with its engine.
        """
        fit = [engine for engine in engines if engine.tok <= self.beta]
        short = [(engine.tok, engine.engine) for engine in fit if engine.read_q <= self.alpha]
        long = [(engine.tok, engine.engine) for engine in fit if engine.read_q > self.alpha]
        heapq.heapify(short)
        heapq.heapify(long)
        assigned: list[tuple[PathRequest, int]] = []
        for request in queue:
            heap = short or long
            if not heap:
                break
            tok, engine = heap[0]
            tok += request.prompt_tokens
            if self.reclassify and tok > self.beta:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (tok, engine))
            assigned.append((request, engine))
        return assigned
