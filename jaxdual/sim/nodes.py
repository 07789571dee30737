"""Nodes and engines of a simulated cluster: what they have, and who waits for it."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

from jaxdual.scheduling.loads import EngineReport
from jaxdual.scheduling.paths import Placement
from jaxdual.scheduling.read_side import ReadSide
from jaxdual.sim.config import SimConfig
from jaxdual.sim.decode import DecodeBatch, DecodeCost
from jaxdual.sim.network import Card, Pipe


@dataclass(slots=True, eq=False)
class Request:
    """A turn of an agent, on its way; times in seconds since the start, lengths in tokens.

    Attributes:
      agent, turn: whose.
      number: for the scheduler.
      prompt, hit, output: all, stored, to be given.
      reads: sides that have not read their part yet.
      cached: of the prompt, what is computed or read.
      prefill_part_began: whether what the prefill side reads has begun to be read.
      blocked: since when the card was free and a buffer had no room, if it was so.
      pushed: whether what the prefill side read has gone to the decode side.
    """

    agent: int
    turn: int
    number: int
    prompt: int
    hit: int
    output: int
    arrival: float
    placement: Placement | None = None
    placed: float = 0.0
    reads: int = 0
    prefill_part_began: bool = False
    blocked: float | None = None
    allocated: float = 0.0
    ready: float = 0.0
    cached: int = 0
    pushed: bool = False
    first: float = 0.0
    second: float = 0.0

    @property
    def plan(self) -> Placement:
        """Its placement, once it has one."""
        if self.placement is None:
            raise RuntimeError(f"request {self.number} is not placed")
        return self.placement


class Buffer:
    """A part of a node's memory, handed out in bytes. What is larger than all of it is let in when it is empty."""

    __slots__ = ("capacity", "most", "used")

    def __init__(self, capacity: float) -> None:
        self.capacity, self.used, self.most = capacity, 0.0, 0.0

    def fits(self, nbytes: float) -> bool:
        return not self.used or self.used + nbytes <= self.capacity

    def take(self, nbytes: float) -> None:
        self.used += nbytes
        self.most = max(self.most, self.used)

    def give_back(self, nbytes: float) -> None:
        self.used = max(0.0, self.used - nbytes)


@dataclass(slots=True, eq=False)
class Node:
    """A node: storage card, memory, buffer, and the reads that wait for the card.

    Attributes:
      queue: reads in order, with their side and tokens.
      cold: requests that have nothing to read, and wait for room in the buffer only.
      reading: whether the card is reading one that has left the queue.
    """

    snic: Card
    dram: Pipe
    buffer: Buffer
    queue: deque[tuple[Request, ReadSide, int]] = field(default_factory=deque)
    cold: deque[Request] = field(default_factory=deque)
    reading: bool = False


@dataclass(slots=True, eq=False)
class PrefillEngine:
    """A prefill engine: its card, and prompts that are ready to be computed.

    Attributes:
      memory: for keys and values of all layers of prompts, in modes where these are there together.
    """

    node: Node
    nic: Card
    report: EngineReport
    memory: Buffer
    ready: deque[Request] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class DecodeEngine:
    """A decode engine and its card.

    Attributes:
      used: tokens of KV memory of the prompts that are there.
      requests: by number, of those that decode.
      joined: numbers of those that have begun to wait for their first step.
      wakes: when `batch` changes next, as far as an event is scheduled for it; None for no event.
    """

    node: Node
    nic: Card
    report: EngineReport
    batch: DecodeBatch
    capacity: int
    used: int = 0
    requests: dict[int, Request] = field(default_factory=dict)
    joined: list[int] = field(default_factory=list)
    wakes: float | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """All that a cluster has, in the order of the engines' numbers: prefill engines first."""

    prefill_nodes: list[Node]
    decode_nodes: list[Node]
    prefill_groups: list[list[PrefillEngine]]
    decode_groups: list[list[DecodeEngine]]


def build_hardware(config: SimConfig) -> Hardware:
    """Nodes, engines and groups, all idle."""
    spec, model = config.cluster, config.model
    cost = DecodeCost(config.decode.step_seconds, config.decode.sequence_seconds, config.decode.token_seconds)
    capacity = int(config.decode.kv_bytes / model.kv_token_bytes)
    nic = spec.nic * (1 - spec.collective_share)

    def nodes(count: int, buffer: float) -> list[Node]:
        return [Node(Card(spec.snic, config.window_seconds), Pipe(spec.dram), Buffer(buffer)) for _ in range(count)]

    prefill_nodes = nodes(spec.prefill_nodes, spec.prefill_buffer)
    decode_nodes = nodes(spec.decode_nodes, spec.decode_buffer)
    prefill_groups: list[list[PrefillEngine]] = [[] for _ in range(-(-spec.prefill_nodes // spec.prefill_group_nodes))]
    decode_groups: list[list[DecodeEngine]] = [[] for _ in range(-(-spec.decode_nodes // spec.decode_group_nodes))]
    engines = itertools.count()
    for number, node in enumerate(prefill_nodes):
        group = number // spec.prefill_group_nodes
        for engine in itertools.islice(engines, spec.gpus):
            report = EngineReport(engine, number, group, 0, 0, 0)
            memory = Buffer(config.prefill.kv_bytes)
            prefill_groups[group].append(PrefillEngine(node, Card(nic), report, memory))
    for number, node in enumerate(decode_nodes):
        group = number // spec.decode_group_nodes
        for engine in itertools.islice(engines, spec.gpus):
            place = (len(prefill_nodes) + number, len(prefill_groups) + group)
            report = EngineReport(engine, *place, 0, 0, 0, capacity)
            decode_groups[group].append(DecodeEngine(node, Card(nic), report, DecodeBatch(cost), capacity))
    return Hardware(prefill_nodes, decode_nodes, prefill_groups, decode_groups)
