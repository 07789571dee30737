"""Figures of a cluster, in terms of one engine that does all its work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxdual.outputs import EngineStats
from jaxdual.scheduling.loads import Role

_MEMORY = ("kv_blocks", "kv_blocks_cached", "kv_blocks_available")
_PRESENT = ("num_running", "num_waiting", "kv_staging_blocks_used", *_MEMORY)
_START = ("load_seconds", "compile_seconds")
_OF_CLUSTERS = ("engines", "card_bytes")
# An engine of a cluster has one rank, counts nothing of its routers, and not all of them count their work.
_OF_ENGINES_ALONE = ("dispatch_decisions", "expert_imbalance", "expert_imbalance_worst", "routers", "work")
_COUNTERS = tuple(
    field.name
    for field in dataclasses.fields(EngineStats)
    if field.name not in (*_PRESENT, *_START, *_OF_CLUSTERS, *_OF_ENGINES_ALONE, "restarts")
)


@dataclass(slots=True)
class MemberFigures:
    """What an engine has done, and the processes that were it before.

    Attributes:
      now: figures of the present process, or of the last one; None while there was none.
      restarts: processes after the first.
    """

    now: EngineStats | None = None
    restarts: int = 0
    _before: EngineStats = dataclasses.field(default_factory=EngineStats)  # counters of earlier processes

    def died(self) -> None:
        """The process is gone: what it did counts on, what it holds is no more."""
        self._before = self.total()
        self.now = None if self.now is None else EngineStats()
        self.restarts += 1

    def total(self) -> EngineStats:
        """Counters of all processes; what the present one holds."""
        now = self.now or EngineStats()
        counters = {name: getattr(self._before, name) + getattr(now, name) for name in _COUNTERS}
        return dataclasses.replace(now, **counters, restarts=self.restarts)


def cluster_figures(
    members: Sequence[tuple[str, Role, EngineStats]],
    *,
    num_waiting: int,
    prompt_tokens: int,
    unwanted_tokens: int,
    card_bytes: Mapping[str, int],
) -> EngineStats:
    """Figures of engines as those of one that does all their work.

    Memory is that of decode engines: a prompt that a prefill engine has goes there, and pages of the two may differ in
    size. A prompt that is handed over counts where it was computed.

    Args:
      members: name, role and figures of each engine.
      num_waiting: sequences that wait for engines.
      prompt_tokens: of all requests.
      unwanted_tokens: that engines gave for the sake of what they compute before.
      card_bytes: see `EngineStats`.
    """
    every = [stats for _, _, stats in members]
    decode = [stats for _, role, stats in members if role is not Role.PREFILL]
    figures = {name: sum(getattr(stats, name) for stats in every) for name in (*_COUNTERS, *_PRESENT, "restarts")}
    figures |= {name: sum(getattr(stats, name) for stats in decode) for name in _MEMORY}
    # They start side by side, and the most uneven one is what is told.
    figures |= {name: max((getattr(stats, name) for stats in every), default=0.0) for name in _START}
    figures["num_waiting"] += num_waiting
    figures["prompt_tokens"] = prompt_tokens
    figures["generation_tokens"] -= unwanted_tokens
    return EngineStats(**figures, card_bytes=card_bytes, engines={name: stats for name, _, stats in members})
