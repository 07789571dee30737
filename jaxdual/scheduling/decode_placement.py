"""Which decode engine gets a request: DualPath 6.1, "DE Scheduling", in two phases."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxdual.scheduling.loads import EngineReport, PathRequest


@dataclass(slots=True)
class _Candidate:
    """An engine's counts while its group's requests are assigned."""

    engine: int
    seq: int
    tok: int
    free: int


@dataclass(frozen=True, slots=True)
class DecodePlacement:
    """Balances tokens between groups, and within a group tokens first, then requests.

    Attributes:
      balance_percent: how far above the group's mean, in percent of it, an engine's tokens may go before it is
        avoided: Z of the paper. A whole number, so that the limit is exact.

    Raises:
      ValueError: it is below 100: the mean itself could not be reached.
    """

    balance_percent: int = 105

    def __post_init__(self) -> None:
        if self.balance_percent < 100:
            raise ValueError(f"{self.balance_percent=} must be at least 100")

    def drain(self, queue: Iterable[PathRequest], totals: Mapping[int, int]) -> list[tuple[PathRequest, int]]:
        """Phase 1: gives each request of the global queue to the group with the fewest tokens.

        Args:
          queue: the global queue, all of it.
          totals: tokens of each group, those of its private queue included: else all requests that come at once would
            go to the same group. Of equal groups the lowest number is taken.

        Returns:
          Each request with its group.
        """
        heap = [(tokens, group) for group, tokens in totals.items()]
        heapq.heapify(heap)
        drained = []
        for request in queue:
            tokens, group = heap[0]
            heapq.heapreplace(heap, (tokens + request.prompt_tokens, group))
            drained.append((request, group))
        return drained

    def place(self, queue: Collection[PathRequest], engines: Sequence[EngineReport]) -> list[tuple[PathRequest, int]]:
        """Phase 2: assigns requests of the fetching group until the first one fits nowhere.

        Among engines with memory for the request, those that it keeps at `tok <= Z` come first, and of them the one
        with the fewest requests; if there is none, the one with the fewest tokens. Ties go to the lowest engine number.

        Args:
          queue: the group's private queue, first come first.
          engines: of the group.

        Returns:
          A prefix of the queue, each request with its engine.
        """
        candidates = [
            _Candidate(e.engine, e.seq, e.tok, e.free_tokens) for e in sorted(engines, key=lambda e: e.engine)
        ]
        limit = self._limit(queue, candidates)
        assigned: list[tuple[PathRequest, int]] = []
        for request in queue:
            chosen = self._choose(request, candidates, limit)
            if chosen is None:
                break
            chosen.seq += 1
            chosen.tok += request.prompt_tokens
            chosen.free -= request.kv_tokens
            assigned.append((request, chosen.engine))
        return assigned

    def _limit(self, queue: Iterable[PathRequest], candidates: Sequence[_Candidate]) -> int:
        """Z times 100 and the number of engines.

        What can be scheduled at most is the longest prefix of the queue that the group's memory would hold if it were
        one piece.
        """
        free = sum(candidate.free for candidate in candidates)
        tokens = sum(candidate.tok for candidate in candidates)
        for request in queue:
            free -= request.kv_tokens
            if free < 0:
                break
            tokens += request.prompt_tokens
        return self.balance_percent * tokens

    def _choose(self, request: PathRequest, candidates: Sequence[_Candidate], limit: int) -> _Candidate | None:
        # The most tokens an engine may have so that it stays at or below Z with this request.
        most = limit // (100 * len(candidates)) - request.prompt_tokens
        need = request.kv_tokens
        low = high = None
        for candidate in candidates:
            if candidate.free < need:
                continue
            if candidate.tok <= most:
                if low is None or candidate.seq < low.seq:
                    low = candidate
            elif high is None or candidate.tok < high.tok:
                high = candidate
        return low or high
