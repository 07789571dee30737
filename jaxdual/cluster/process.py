"""`python -m jaxdual.cluster.process FD`: engines that serve one model together, for the front at socket FD.

To the front it is an engine: it speaks the same messages. Its engines are processes of its own, started again when they
die, and end with it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from jaxdual.cluster.cards import ClusterCards
from jaxdual.cluster.cluster import Cluster
from jaxdual.cluster.figures import MemberFigures, cluster_figures
from jaxdual.cluster.hosts import Hosts, LocalHost, hosts_of
from jaxdual.cluster.lookups import StoreLookups
from jaxdual.config import ClusterConfig, ConfigError, EngineConfig
from jaxdual.engine.client import EngineProcess
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.request import TokenEvent
from jaxdual.engine.wire import (
    Abort,
    Add,
    AgentAt,
    Answer,
    Ask,
    Compiled,
    Died,
    Events,
    Ready,
    Start,
    StartFailed,
    Stop,
    ToEngine,
    UseMode,
)
from jaxdual.frames import Frames, Message
from jaxdual.kv.keys import BlockKey, KeyChain, root_key
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.store import open_store
from jaxdual.outputs import EngineInfo, EngineStats
from jaxdual.scheduling.loads import Role
from jaxdual.scheduling.path_modes import MODES, PathMode
from jaxdual.scheduling.paths import PathScheduler
from jaxdual.scheduling.prefill_placement import COMPUTE_SECONDS, PrefillPlacement
from jaxdual.scheduling.read_side import ReadPolicy

_MOST_FAILED_STARTS = (
    5  # of one engine, in a row: those after which it died before it gave anything or was all compiled
)
_RESTART_SECONDS = 1.0  # from the first failed start in a row to the next one; doubled with each further one
_STATS_SECONDS = 0.1
_ANSWER_SECONDS = 10.0  # for an engine to tell its figures
_MODE_SECONDS = 300.0  # for an engine to compile what another mode needs

_logger = logging.getLogger(__name__)


class Member:
    """An engine of the cluster, and the processes that have been it.

    Args:
      number: in the cluster.
      config: of its process.
      part: what it is to the cluster.
      owner: the cluster's process.
    """

    def __init__(self, number: int, config: EngineConfig, part: ClusterPart, owner: ClusterProcess) -> None:
        self.number, self.role = number, part.role
        self.info: EngineInfo | None = None
        self.figures = MemberFigures()
        self.agent: str | None = None  # address of its KV agent
        self.warm = False
        self.process: EngineProcess | None = None
        self._config, self._part, self._owner = config, part, owner
        self._started_mode = part.cluster.path_mode  # of the present process
        self._failed_starts = 0
        self._proved = False  # that a process of it works
        self._questions: dict[int, asyncio.Future[Answer]] = {}

    @property
    def name(self) -> str:
        return _name(self.role, self.number)

    async def launch(self) -> None:
        """Starts a process."""
        self.warm = self._proved = False
        try:
            self._started_mode = self._part.cluster.path_mode
            self.process = await self._owner.hosts.launch(
                self.number, self._config, self._part, self._on_message, self._on_death
            )
        except OSError as error:
            self._on_death(f"{self.name} can't be started: {error}")

    def send(self, message: Message) -> None:
        if self.process is not None:
            self.process.send(message)

    async def ask(self, number: int, *, check_integrity: bool) -> Answer | None:
        """Its figures now; None if it does not tell them."""
        return await self._question(Ask(number, check_integrity))

    async def use_mode(self, number: int, mode: str) -> str | None:
        """Has it go on in another path mode, or start in it where it is starting; why it can't."""
        cluster = dataclasses.replace(self._part.cluster, path_mode=mode)  # type: ignore[arg-type]  # checked before
        self._part = msgspec.structs.replace(self._part, cluster=cluster)
        if self.process is None or self.info is None:
            return None
        answer = await self._question(UseMode(number, mode), _MODE_SECONDS)
        return f"{self.name} does not answer" if answer is None else answer.error

    async def _question(self, message: Ask | UseMode, timeout: float = _ANSWER_SECONDS) -> Answer | None:
        number = message.number
        if self.process is None or self.info is None:
            return None
        question = self._questions[number] = asyncio.get_running_loop().create_future()
        self.send(message)
        try:
            return await asyncio.wait_for(question, timeout)
        except (TimeoutError, ConnectionError):
            return None
        finally:
            self._questions.pop(number, None)

    def _on_message(self, message: Any) -> None:
        match message:
            case Ready(info, stats, warm):
                self.info, self.figures.now, self.warm = info, stats, warm
                mode = self._part.cluster.path_mode
                if mode != self._started_mode:  # it was told meanwhile, and the process was not there yet
                    self.send(UseMode(-1, mode))
            case AgentAt(address):
                first, self.agent = self.agent is None, address
                if first:
                    self._owner.member_ready(self)
                else:
                    self._owner.member_says(self, message)
            case StartFailed(kind, text):
                self._owner.member_refused(self, kind, text)
            case Compiled(name, seconds, last):
                self.warm = last
                self._failed_starts *= not last
                self._proved |= last
                self._owner.member_compiled(self, f"{self.name}: {name}", seconds)
            case Answer(number):
                question = self._questions.get(number)
                if question is not None and not question.done():
                    question.set_result(message)
                elif message.error is not None:
                    _logger.error("%s: %s", self.name, message.error)
            case _:
                if isinstance(message, Events):
                    self.figures.now = message.stats or self.figures.now
                    self._failed_starts *= not message.events
                    self._proved |= bool(message.events)
                self._owner.member_says(self, message)

    def _on_death(self, reason: str) -> None:
        self.process = None
        for question in self._questions.values():
            if not question.done():
                question.set_exception(ConnectionError(reason))
        started, self.info, self.agent = self.info is not None, None, None
        self.figures.died()
        self._failed_starts += not self._proved
        _logger.error("%s: %s", self.name, reason)
        if not started and self.figures.now is None:
            self._owner.member_refused(self, "EngineDeadError", f"{self.name}: {reason}")
        elif self._failed_starts >= _MOST_FAILED_STARTS:
            self._owner.give_up(f"{self.name}: {reason}; it has failed {self._failed_starts} times in a row")
        else:
            self._owner.member_died(self)

    async def start_again(self) -> None:
        """Starts the next process, later after failed starts."""
        if self._failed_starts:
            await asyncio.sleep(_RESTART_SECONDS * 2 ** (self._failed_starts - 1))
        await self.launch()


class ClusterProcess(asyncio.Protocol):
    """The protocol of the connection to the front.

    Attributes:
      over: set when there is nothing more to do.
      hosts: where the engines run.
    """

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.hosts: Hosts = LocalHost()
        self._frames = Frames(ToEngine)
        self._front: asyncio.WriteTransport | None = None
        self._members: list[Member] = []
        self._cluster: Cluster | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._cards: ClusterCards | None = None
        self._lookups: StoreLookups | None = None
        self._config, self._settings = EngineConfig(), ClusterConfig()
        self._serving = False
        self._stats_due = 0.0
        self._stats_later: asyncio.TimerHandle | None = None
        self._stopping = False

    async def finish(self) -> None:
        """Ends all engines."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(member.process.stop() for member in self._members if member.process is not None))
        await self.hosts.close()
        if self._lookups is not None:
            await self._lookups.close()
        if self._cards is not None:
            self._cards.close()
        if self._front is not None:
            self._front.close()

    # Of the front.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            self._front = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._front = None
        self.over.set()

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._handle(message)

    def _handle(self, message: Any) -> None:
        match message:
            case Start(config, cluster):
                self._later(self._start(config, cluster))
            case Stop():
                self.over.set()
            case Ask(number, check_integrity):
                self._later(self._answer(number, check_integrity=check_integrity))
            case UseMode(number, mode):
                self._later(self._use_mode(number, mode))
            case Add(request) if self._cluster is not None:
                self._cluster.add(request)
                self._tell_stats()
            case Abort(request_id, index) if self._cluster is not None:
                self._cluster.abort(request_id, index)

    def _send(self, message: Message) -> None:
        if self._front is not None:
            self._front.write(self._frames.encode(message))

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        _logger.error("the cluster has failed: %s", error, exc_info=None if isinstance(error, ConfigError) else error)
        if self._cluster is None:
            self._send(StartFailed(type(error).__name__, str(error)))
            self.over.set()
        else:
            self.give_up(f"{type(error).__name__}: {error}")

    async def _start(self, config: EngineConfig, cluster: ClusterConfig) -> None:
        self.hosts = hosts_of(config, cluster)
        config = dataclasses.replace(
            config,
            kv_transport=config.kv_transport or self.hosts.carrier,
            kv_secret=config.kv_secret or secrets.token_hex(),
        )
        self._config, self._settings = config, cluster
        roles = [Role.PREFILL] * cluster.prefill + [Role.DECODE] * cluster.decode
        of_role = {
            Role.PREFILL: dataclasses.replace(
                config,
                kv_store_read_only=True,
                tensor_parallel_size=cluster.prefill_tensor_parallel_size or config.tensor_parallel_size,
            ),
            Role.DECODE: config,
        }
        # How many devices the engines before each take.
        taken = itertools.accumulate((of_role[role].num_devices for role in roles), initial=0)
        if cluster.cluster == "local":
            self._cards = ClusterCards([_name(role, number) for number, role in enumerate(roles)], cluster)
        await self.hosts.open(len(roles))
        self._members = [
            Member(
                number,
                of_role[role],
                ClusterPart(role, cluster, None if self._cards is None else self._cards.of(_name(role, number)), first),
                self,
            )
            for number, (role, first) in enumerate(zip(roles, taken, strict=False))
        ]
        for member in self._members:
            self._later(member.launch())

    # Of the engines.

    def member_ready(self, member: Member) -> None:
        """A process takes requests."""
        if self._cluster is not None:
            self._join(self._cluster, member)
        elif all(one.agent is not None for one in self._members) and not self._serving:
            self._serving = True
            self._later(self._serve())

    def member_refused(self, member: Member, kind: str, text: str) -> None:
        """A process can't be made."""
        if self._cluster is None:
            self._send(StartFailed(kind, text))
            self.over.set()
        else:
            _logger.error("%s can't be started again: %s: %s", member.name, kind, text)

    def member_compiled(self, member: Member, name: str, seconds: float) -> None:
        """A shape of an engine is compiled."""
        self._send(Compiled(name, seconds, last=all(one.warm for one in self._members)))

    def member_says(self, member: Member, message: object) -> None:
        """Events, or a part of a hand-over."""
        if self._cluster is not None:
            self._cluster.message(member.number, message)
            self._tell_stats()

    def member_died(self, member: Member) -> None:
        """A process is gone; another follows."""
        if self._cluster is not None:
            self._cluster.died(member.number)
        if not self._stopping:
            self._later(member.start_again())

    def give_up(self, reason: str) -> None:
        """There is no engine for some part any more."""
        self._send(Died(reason))
        self.over.set()

    async def _serve(self) -> None:
        """All engines have started."""
        info = next((info for member in self._members if member.role is Role.DECODE and (info := member.info)), None)
        if info is None:  # it has died in this moment
            self._serving = False
            return
        self._info = info
        shares = self._config.shares_kv_store and info.full_attention
        if not shares and self._settings.path_mode != ClusterConfig().path_mode:
            _logger.warning(
                "path_mode=%r has no effect without a store that all engines share, or with sliding windows",
                self._settings.path_mode,
            )
        if shares:
            store = await asyncio.to_thread(
                open_store, self._config.kv_store or "", self._config.kv_store_capacity_bytes or 0
            )
            self._lookups = StoreLookups(store, self._found, self._config.kv_load_timeout)
        # Without a store of all engines, each looks into its own memory for prompts that it knows.
        mode = MODES[self._settings.path_mode] if shares else PathMode(ReadPolicy.PREFILL_ONLY)
        self._mode: str = self._settings.path_mode
        self._cluster = Cluster(
            self._scheduler(mode),
            send=lambda number, message: self._members[number].send(message),
            deliver=self._deliver,
            page_size=info.block_size,
            clock=time.monotonic,
            key_chain=self._key_chain if shares else None,
            look=self._look,
        )
        for member in self._members:
            self._join(self._cluster, member)
        self._send(Ready(info, self._stats(), warm=all(one.warm for one in self._members)))

    def _limits(self, info: EngineInfo) -> PrefillPlacement:
        """When a prefill engine or its node has enough to do. What it computes in a second is not known: an engine is
        overloaded with a few long prompts; so is a node, unless the rate of its card is.
        """
        few = 8 * info.max_model_len
        if self._settings.storage_nic_rate is None:
            return PrefillPlacement(few, few)
        read_rate = self._settings.storage_nic_rate * info.block_size / info.kv_block_bytes
        return PrefillPlacement.from_rates(read_rate, few / COMPUTE_SECONDS)

    def _key_chain(self, salt: bytes) -> KeyChain:
        root = root_key(bytes.fromhex(self._info.fingerprint), bytes.fromhex(self._info.kv_layout), salt)
        return KeyChain(root, self._info.block_size)

    def _look(self, number: int, keys: Sequence[BlockKey]) -> None:
        if self._lookups is not None:
            self._lookups.look(number, keys)

    def _found(self, number: int, blocks: int) -> None:
        if self._cluster is not None:
            self._cluster.found(number, blocks)
            self._tell_stats()

    async def _use_mode(self, number: int, mode: str) -> None:
        error: str | None = None
        if mode not in MODES:
            error = f"{mode=} must be one of {', '.join(MODES)}"
        elif self._cluster is None or self._lookups is None:
            error = "only clusters whose engines share a store have path modes"
        else:
            error = await self._switch(self._cluster, number, mode)
        self._send(Answer(number, self._stats(), error))

    async def _switch(self, cluster: Cluster, number: int, mode: str) -> str | None:
        """Has all go on in another mode, or all in the present one; why not."""
        end = time.monotonic() + _ANSWER_SECONDS
        while not len(cluster) and cluster.num_unsettled and time.monotonic() < end:
            await asyncio.sleep(0.02)  # requests have been aborted, and something of them is on its way
        try:
            cluster.hold()
        except ValueError as refused:
            return str(refused)
        prefill = [member for member in self._members if member.role is Role.PREFILL]
        scheduler: PathScheduler | None = None
        try:
            answers = await asyncio.gather(*(member.use_mode(number, mode) for member in prefill))
            error = next((answer for answer in answers if answer is not None), None)
            if error is None:
                self._mode = mode
                scheduler = self._scheduler(MODES[mode])
            else:
                await asyncio.gather(*(member.use_mode(number, self._mode) for member in prefill))
        finally:
            cluster.go_on(scheduler)
        return error

    def _scheduler(self, mode: PathMode) -> PathScheduler:
        return PathScheduler(mode, self._limits(self._info), block_tokens=self._info.block_size)

    def _join(self, cluster: Cluster, member: Member) -> None:
        if member.figures.now is not None and member.agent is not None:
            cluster.joined(member.number, member.role, member.agent, member.figures.now)

    def _deliver(self, events: list[TokenEvent]) -> None:
        self._send(Events(events, None))

    def _tell_stats(self) -> None:
        """Sends figures, now or when the next ones are due: the last ones always reach the front."""
        now = time.monotonic()
        if now >= self._stats_due:
            self._stats_due = now + _STATS_SECONDS
            self._send(Events([], self._stats()))
        elif self._stats_later is None:
            loop = asyncio.get_running_loop()
            self._stats_later = loop.call_later(self._stats_due - now, self._tell_stats_late)

    def _tell_stats_late(self) -> None:
        self._stats_later = None
        self._tell_stats()

    # Figures.

    def _stats(self) -> EngineStats:
        return cluster_figures(
            [(member.name, member.role, member.figures.total()) for member in self._members],
            num_waiting=0 if self._cluster is None else self._cluster.num_waiting,
            prompt_tokens=0 if self._cluster is None else self._cluster.prompt_tokens,
            unwanted_tokens=0 if self._cluster is None else self._cluster.unwanted_tokens,
            card_bytes={} if self._cards is None else self._cards.nbytes(),
        )

    async def _answer(self, number: int, *, check_integrity: bool) -> None:
        answers = await asyncio.gather(
            *(member.ask(number, check_integrity=check_integrity) for member in self._members)
        )
        errors = []
        for member, answer in zip(self._members, answers, strict=True):
            if answer is None:
                errors.append(f"{member.name} does not answer")
            else:
                member.figures.now = answer.stats
                errors += [f"{member.name}: {answer.error}"] if answer.error else []
        if check_integrity and self._cluster is not None:
            try:
                self._cluster.check_integrity()
            except IntegrityError as error:
                errors.append(str(error))
        self._send(Answer(number, self._stats(), "; ".join(errors) if check_integrity and errors else None))


def _name(role: Role, number: int) -> str:
    return f"{role.value} {number}"


async def serve(front: socket.socket) -> None:
    """Serves the front until it is gone or says so."""
    process = ClusterProcess()
    await asyncio.get_running_loop().create_connection(lambda: process, sock=front)
    await process.over.wait()
    await process.finish()


def main() -> int:
    """Runs the process; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
