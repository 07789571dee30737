"""Prefill engines of a simulated cluster: what they compute together, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxdual.offline.trace import Session
from jaxdual.scheduling.path_modes import PathMode
from jaxdual.scheduling.quota import AttentionCost, ChunkRules, PrefillWork, pack
from jaxdual.sim.config import SimConfig
from jaxdual.sim.events import Events
from jaxdual.sim.nodes import PrefillEngine, Request

_RATE_SESSIONS = 100  # that are looked at for a mean

type _Batches = list[tuple[PrefillEngine, list[tuple[Request, int]]]]


class PrefillModel:
    """What computing prompts takes, and how much of them fits in a forward.

    Args:
      config: of the simulation.
      mode: of the path scheduler.

    Attributes:
      attention: predicts its seconds.
      pass_seconds: of any forward.
      token_seconds: of a token, attention aside.
      quota_seconds: attention of a forward at most.
      rules: how prompts are cut.
      batch_tokens: prompts of a forward that fit in memory, with all their tokens.
      layers: of the model.
    """

    def __init__(self, config: SimConfig, mode: PathMode) -> None:
        prefill, model = config.prefill, config.model
        self.mode, self.layers = mode, model.layers
        self.attention = AttentionCost(
            model.attention.shape(model.layers), 0.0, 1 / prefill.attention_flops, prefill.item_seconds
        )
        self.pass_seconds = prefill.pass_seconds
        self.token_seconds = 2 * model.active_parameters / prefill.flops
        self.quota_seconds = prefill.quota_seconds if mode.quota else float("inf")
        self.rules = ChunkRules(prefill.min_chunk, 1, None if mode.quota else prefill.batch_tokens)
        # A layer that comes, one that is computed and one that goes. Where whole prompts are held, what is read is
        # limited by memory already.
        held = 3 * model.kv_token_bytes / model.layers
        self.batch_tokens = prefill.kv_bytes / held if mode.layerwise else float("inf")

    def rate(self, sessions: Sequence[Session]) -> float:
        """Prompt tokens that an engine moves through in a second, hits included, at these sessions' mean."""
        tokens = seconds = 0.0
        for session in sessions[:_RATE_SESSIONS]:
            for turn, prompt in zip(session.turns, session.prompt_lengths(), strict=True):
                count = min(turn.append, prompt)
                tokens += prompt
                flops = self.attention.shape.flops(prompt - count, count)
                seconds += self.attention.seconds(flops, 1) + count * self.token_seconds
        return tokens / seconds


class PrefillSurroundings(Protocol):
    """What prefill engines need of the rest of a simulated cluster."""

    events: Events

    def bring(self, engine: PrefillEngine, request: Request, count: int) -> tuple[float, float]: ...
    def take_away(self, engine: PrefillEngine, request: Request, count: int) -> tuple[float, float]: ...
    def prefilled(self, request: Request) -> None: ...


@dataclass(slots=True)
class ForwardFigures:
    """Of a group's forwards: how many, the seconds that they took, and the sum of each one's longest over mean
    attention.
    """

    count: int = 0
    seconds: float = 0.0
    unevenness: float = 0.0


class PrefillGroup:
    """Prefill engines that compute in lock step: a forward takes as long as the longest attention among them.

    Args:
      cluster: moves keys and values, and takes what is computed.
      model: what computing takes.
      engines: of the group.
    """

    def __init__(self, cluster: PrefillSurroundings, model: PrefillModel, engines: Sequence[PrefillEngine]) -> None:
        self._cluster, self._model, self._engines = cluster, model, engines
        self._running = False
        self.figures = ForwardFigures()

    def start(self) -> None:
        """Begins a forward if there is anything to compute and none is under way."""
        if self._running:
            return
        cluster, model = self._cluster, self._model
        events, cost = cluster.events, model.attention
        batches = [(engine, self._batch(engine)) for engine in self._engines if engine.ready]
        if not batches:
            return
        self._running = True
        longest = total = tokens = 0.0
        for _, batch in batches:
            flops = sum(cost.shape.flops(request.cached, count) for request, count in batch)
            seconds = cost.seconds(flops, len(batch))
            longest, total = max(longest, seconds), total + seconds
            tokens += sum(count for _, count in batch)
        self.figures.count += 1
        if len(self._engines) > 1:
            self.figures.unevenness += longest * len(self._engines) / total if total else 1.0
        # Experts are spread over the group, so that all of it computes what any of its engines is given.
        compute = model.pass_seconds + longest + tokens / len(self._engines) * model.token_seconds
        begin = events.now
        come = self._move(batches, cluster.bring)
        if model.mode.layerwise:
            go = self._move(batches, cluster.take_away)
            duration = max(compute, come, go) * (1 + 1 / model.layers)
            events.at(begin + duration, self._end, batches, begin)
        else:
            events.at(begin + come + compute, self._computed, batches, begin)

    def _computed(self, batches: _Batches, begin: float) -> None:
        """Without layerwise prefill nothing has left yet."""
        now = self._cluster.events.now
        self._cluster.events.at(now + self._move(batches, self._cluster.take_away), self._end, batches, begin)

    def _move(self, batches: _Batches, move: Callable[[PrefillEngine, Request, int], tuple[float, float]]) -> float:
        """Moves what a forward needs, or what it has made; seconds until all of it has passed and was submitted."""
        longest = 0.0
        if self._model.mode.transfers:
            for engine, batch in batches:
                submitted = 0.0
                for request, count in batch:
                    passed, submits = move(engine, request, count)
                    submitted += submits
                    longest = max(longest, passed, submitted)
        return longest

    def _batch(self, engine: PrefillEngine) -> list[tuple[Request, int]]:
        model = self._model
        packed = pack(self._work(engine), model.quota_seconds, model.attention, model.rules)
        return [(engine.ready[number], count) for number, (_, count) in enumerate(packed)]

    def _work(self, engine: PrefillEngine) -> Iterator[PrefillWork]:
        """Prompts in order, as long as their keys and values find room."""
        room = self._model.batch_tokens
        for number, request in enumerate(engine.ready):
            room -= request.prompt
            if room < 0 and number:
                return
            yield PrefillWork(request.number, request.cached, request.prompt - request.cached)

    def _end(self, batches: _Batches, begin: float) -> None:
        self.figures.seconds += self._cluster.events.now - begin
        # Others become ready meanwhile, and wait for the next forward.
        for engine, batch in batches:
            for request, count in batch:
                request.cached += count
                if request.cached == request.prompt:
                    engine.ready.popleft()
                    self._cluster.prefilled(request)
        self._running = False
        self.start()
