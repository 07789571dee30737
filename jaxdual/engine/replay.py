"""One runner in several processes: what the leader's is called with, those of the followers are, in the same order.

So all processes start the same programs in the same order, as JAX wants it of them, and each keeps the same tables.
Only the leader looks at what comes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from jaxdual.engine.follower_wire import Begin, Dispatch, End, Fetch, MoveExperts, TakeRouterCounts, WarmUp
from jaxdual.engine.followers import Followers, Leader
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.runner import Launch, Runner, ScoreTargets, StepResult
from jaxdual.engine.slot_sampler import SlotBinding
from jaxdual.scheduling.experts import Move
from jaxdual.scheduling.plan import StepPlan


class LeadingRunner(Runner):
    """The runner of process 0.

    Args:
      followers: the other processes.
      settings: see `Runner`.
    """

    def __init__(self, followers: Followers, *arguments: Any, **settings: Any) -> None:
        self._followers = followers
        followers.send(Begin(tuple(settings["memory"])))
        super().__init__(*arguments, **settings)

    def dispatch(
        self, plans: Sequence[StepPlan], bindings: Sequence[SlotBinding], targets: Mapping[int, ScoreTargets]
    ) -> Launch:
        with self._followers.calling(Dispatch(tuple(plans), tuple(bindings), dict(targets))):
            return super().dispatch(plans, bindings, targets)

    def fetch(self, launch: Launch) -> StepResult:
        with self._followers.calling(Fetch()):
            return super().fetch(launch)

    def take_router_counts(self) -> RouterCounts | None:
        with self._followers.calling(TakeRouterCounts()):
            return super().take_router_counts()

    def move_experts(self, row: int, moves: Sequence[Move], experts: Sequence[int]) -> None:
        with self._followers.calling(MoveExperts(row, tuple(moves), list(experts))):
            super().move_experts(row, moves, experts)

    def warm_ups(self, *, moves: bool = False) -> Iterator[tuple[str, Callable[[], float]]]:
        for name, run in super().warm_ups(moves=moves):
            yield name, partial(self._warm_up, name, run)

    def _warm_up(self, name: str, run: Callable[[], float]) -> float:
        with self._followers.calling(WarmUp(name)):
            return run()

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._followers.descriptors

    def check_processes(self) -> None:
        self._followers.check()

    def close(self) -> None:
        self._followers.close()


def follow(leader: Leader, begin: Callable[[Begin], Runner]) -> None:
    """Does what the leader does, until it ends.

    Args:
      begin: makes the runner.

    Raises:
      ConnectionError: the leader has ended without a word.
    """
    runner: Runner | None = None
    launches: deque[Launch] = deque()
    while not isinstance(call := leader.next(), End):
        if isinstance(call, Begin):
            runner = begin(call)
            warm_ups = dict(runner.warm_ups(moves=True))
            continue
        if runner is None:
            raise TypeError(f"{type(call).__name__} came before Begin")
        match call:
            case Dispatch(plans, bindings, targets):
                launches.append(runner.dispatch(plans, bindings, targets))
            case Fetch():
                runner.fetch(launches.popleft())
            case TakeRouterCounts():
                runner.take_router_counts()
            case WarmUp(name):
                warm_ups[name]()
            case MoveExperts(row, moves, experts):
                runner.move_experts(row, moves, experts)
