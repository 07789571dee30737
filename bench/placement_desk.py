"""The scheduler's side of `bench.placement`: its messages, and the process that holds nothing but the scheduler."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence

from jaxdual.frames import Frames, Message
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.loads import EngineReport, PathRequest, Role
from jaxdual.scheduling.path_modes import MODES
from jaxdual.scheduling.paths import PathScheduler, Placement
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadSide

NODE_READ_RATE = 1e6  # tokens a second: 50 GB/s at 50 KB a token
ENGINE_COMPUTE_RATE = 1.3e5  # prompt tokens a second, hits included
READ_BYTES = 1 << 20


class Submit(Message, frozen=True):
    request: PathRequest


class Fetch(Message, frozen=True):
    """A group's leader asks for work; the answer is `Placed`."""

    role: Role
    group: int
    reports: list[EngineReport]


class ReadProgress(Message, frozen=True):
    number: int
    side: ReadSide
    tokens: int


class Prefilled(Message, frozen=True):
    number: int


class Decoding(Message, frozen=True):
    number: int


class Finished(Message, frozen=True):
    number: int


class Ask(Message, frozen=True):
    """The answer is `State`; `check` has the scheduler check its integrity before."""

    check: bool = False


class Placed(Message, frozen=True):
    """To the leader that fetched."""

    placements: list[Placement]


class Told(Message, frozen=True):
    """To the leader of the other engine of placements that another leader fetched."""

    group: int
    placements: list[Placement]


class State(Message, frozen=True):
    """What the scheduler's process says of itself.

    Attributes:
      cpu_seconds: that it has used.
      live: requests that are not over.
      waiting: of them, those that are not placed.
      trouble: what the check of integrity found.
    """

    cpu_seconds: float
    live: int
    waiting: int
    trouble: str | None = None


ToDesk = Submit | Fetch | ReadProgress | Prefilled | Decoding | Finished | Ask
FromDesk = Placed | Told | State


class Desk:
    """A path scheduler behind messages. A group is a node, whole, and has the node's number."""

    def __init__(self) -> None:
        limits = PrefillPlacement.from_rates(NODE_READ_RATE, ENGINE_COMPUTE_RATE)
        self.scheduler = PathScheduler(MODES["full"], limits)

    def handle(self, message: ToDesk) -> list[FromDesk]:
        """Does what a message asks for; returns the answers to send.

        Raises:
          ValueError: see `PathScheduler`.
        """
        scheduler = self.scheduler
        match message:
            case Fetch(role=role, group=group, reports=reports):
                return self._fetch(role, group, reports)
            case ReadProgress(number=number, side=side, tokens=tokens):
                scheduler.read_progress(number, side, tokens)
            case Submit(request=request):
                scheduler.submit(request)
            case Prefilled(number=number):
                scheduler.prefilled(number)
            case Decoding(number=number):
                scheduler.decoding(number)
            case Finished(number=number):
                scheduler.finished(number)
            case Ask(check=check):
                return [self._state(check)]
        return []

    def _fetch(self, role: Role, group: int, reports: list[EngineReport]) -> list[FromDesk]:
        now = time.monotonic()
        prefills = role is Role.PREFILL
        fetch = self.scheduler.fetch_prefill if prefills else self.scheduler.fetch_decode
        placements = fetch(group, reports, now)
        others: dict[int, list[Placement]] = {}
        for placement in placements:
            engine = placement.decode_engine if prefills else placement.prefill_engine
            others.setdefault(self.scheduler.loads.node_of(engine), []).append(placement)
        return [Placed(placements), *(Told(other, told) for other, told in others.items())]

    def _state(self, check: bool) -> State:
        trouble = None
        if check:
            try:
                self.scheduler.check_integrity()
            except IntegrityError as error:
                trouble = str(error)
        return State(time.process_time(), len(self.scheduler), self.scheduler.num_waiting, trouble)


def serve(sock: socket.socket) -> None:
    """Answers messages until the other end is closed."""
    desk = Desk()
    frames = Frames(ToDesk)
    while data := sock.recv(READ_BYTES):
        for message in frames.feed(data):
            for answer in desk.handle(message):
                sock.sendall(frames.encode(answer))


def main(arguments: Sequence[str]) -> int:
    """Serves a socket on one core; arguments: its descriptor and the core."""
    descriptor, core = map(int, arguments)
    os.sched_setaffinity(0, {core})
    serve(socket.socket(fileno=descriptor))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
