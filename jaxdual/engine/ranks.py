"""The ranks of an engine: parts of its devices that have sequences and KV memory of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxdual.engine.request import Request
from jaxdual.kv.keys import KeyChain
from jaxdual.kv.manager import KVManager
from jaxdual.scheduling.batch import BatchScheduler
from jaxdual.scheduling.dispatch import CountsDispatch, DispatchPolicy, DispatchRequest, LoadBoard

_REPORT_SECONDS = 0.1  # between the loads that a rank is chosen by, as vLLM's engines report them


@dataclass(frozen=True, slots=True)
class Rank:
    """One of them.

    Attributes:
      scheduler: chooses the work of each step.
      kv: page accounting; the same object that the scheduler asks.
    """

    scheduler: BatchScheduler
    kv: KVManager


class Ranks:
    """All ranks of an engine. A step is that of all of them: one that has nothing to do waits for the others.

    Args:
      ranks: at least one.
      dispatch: chooses the rank of each request.
    """

    def __init__(self, ranks: Sequence[Rank], dispatch: DispatchPolicy | None = None) -> None:
        self._ranks = tuple(ranks)
        self.dispatch: DispatchPolicy = CountsDispatch() if dispatch is None else dispatch
        self._board = LoadBoard(len(self._ranks))
        self._reported = -math.inf

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Rank]:
        return iter(self._ranks)

    def __getitem__(self, number: int) -> Rank:
        return self._ranks[number]

    def choose(self, request: Request, keys: KeyChain, now: float) -> int:
        """Where all outputs of a request go, so that they share its prompt.

        Args:
          keys: of its prompt; those that a policy looks at are computed here.
          now: seconds, monotonic.
        """
        if len(self._ranks) == 1:
            return 0
        if now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            for number, rank in enumerate(self._ranks):
                self._board.report(number, rank.scheduler.load())
        wanted = DispatchRequest(
            request.request_id,
            len(request.prompt_token_ids),
            request.user,
            request.params.n,
            self._shares(request, keys),
        )
        number = self.dispatch.select(wanted, self._board, now)
        self._board.sent(number, wanted)
        return number

    def ended(self, rank: int, request_id: str) -> None:
        """Nothing of a request is left."""
        self._board.withdrawn(rank, request_id)

    @property
    def have_news(self) -> bool:
        """Whether any rank's pages have something to tell the next step."""
        return any(rank.kv.has_news for rank in self._ranks)

    def stats(self) -> dict[str, int]:
        """Counters and figures of all ranks together, named as in `EngineStats`."""
        figures = [_figures(rank) for rank in self._ranks]
        return {name: sum(of_rank[name] for of_rank in figures) for name in figures[0]}

    def _shares(self, request: Request, keys: KeyChain) -> Sequence[float]:
        """Part of a prompt that each rank has cached, for a policy that asks."""
        if not self.dispatch.uses_prefixes or not self._ranks[0].kv.prefix_caching:
            return ()
        return prefix_shares([rank.kv for rank in self._ranks], request.prompt_token_ids, keys)


def prefix_shares(ranks: Sequence[KVManager], prompt: Sequence[int], keys: KeyChain) -> list[float]:
    """Part of a prompt that each of several ranks could go on from; `keys` are its own."""
    page_size = ranks[0].page_size
    blocks = keys.upto(prompt, (len(prompt) - 1) // page_size)
    return [kv.num_cached_blocks(blocks) * page_size / len(prompt) for kv in ranks]


def _figures(rank: Rank) -> dict[str, int]:
    """Counters and figures of a rank, named as in `EngineStats`."""
    kv, scheduler = rank.kv, rank.scheduler
    return {
        "num_running": scheduler.num_running,
        "num_waiting": scheduler.num_waiting,
        "computed_prompt_tokens": scheduler.stats.prefill_tokens,
        "prefix_cache_queries": kv.stats.prefix_queries,
        "prefix_cache_hits": kv.stats.prefix_hits,
        "host_cache_hits": kv.stats.host_hits,
        "blocks_copied_out": kv.stats.copied_out,
        "blocks_copied_in": kv.stats.copied_in,
        "preemptions": scheduler.stats.preemptions_recompute + scheduler.stats.preemptions_swap,
        "kv_blocks": kv.num_pages,
        "kv_blocks_cached": kv.num_cached,
        "kv_blocks_available": kv.num_available,
        "store_cache_hits": kv.stats.staged_hits,
        "handed_over_tokens": kv.stats.handed_over,
    }
