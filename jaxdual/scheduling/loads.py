"""What the path scheduler knows of engines and nodes: their reports, and its own count of what it has given them.

An engine's report is older than the scheduler's count of what it assigned, and knows nothing of requests that still
wait for their other engine. The count in turn knows nothing of work that others gave to the engine, as after a restart
of the scheduler. So an engine's load is the larger of both when it reports, and moves with assignments and events from
there until the next report.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from jaxdual.kv.slots import IntegrityError


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class PathRequest:
    """What the choice of engines and read side needs to know of a request.

    Attributes:
      request_id: unique among the requests that are not over.
      prompt_tokens: tokens of the prompt, at least 1: the request's length wherever load is counted in tokens.
      hit_tokens: tokens of the prompt whose KV is in the store.
      output_tokens: expected output, in tokens; it counts only where KV memory is promised.
      arrival: seconds.

    Raises:
      ValueError: a number is out of range.
    """

    request_id: int
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int
    arrival: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ValueError(f"{self.prompt_tokens=} must be at least 1")
        if not 0 <= self.hit_tokens <= self.prompt_tokens:
            raise ValueError(f"{self.hit_tokens=} must be 0 to {self.prompt_tokens}, the prompt's tokens")
        if self.output_tokens < 0:
            raise ValueError(f"{self.output_tokens=} must be at least 0")

    @property
    def kv_tokens(self) -> int:
        """KV memory that it will need on its decode engine, in tokens."""
        return self.prompt_tokens + self.output_tokens


@dataclass(slots=True)  # not frozen: two are made for each engine at every fetch
class EngineReport:
    """One engine's load, as its group reports it at a fetch (DualPath 6.1).

    Attributes:
      engine: unique among all engines, of both roles.
      node, group: where it is; all engines of a group have one role.
      seq: its requests that are not over: not prefilled on a prefill engine, not finished on a decode engine.
      tok: prompt tokens of those requests.
      read_q: tokens that its node has yet to read from the store; the same for all engines of a node.
      free_tokens: KV memory that holds nothing now, in tokens; of decode engines only.
    """

    engine: int
    node: int
    group: int
    seq: int
    tok: int
    read_q: int
    free_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Engine:
    """An engine's counts.

    `seq`, `tok` and `promised` are those of the requests assigned to it; `promised` is the KV memory that these will
    still take. `other_seq` and `other_tok` are what its last report held beyond them.
    """

    engine: int
    node: int
    group: int
    role: Role
    seq: int = 0
    tok: int = 0
    promised: int = 0
    other_seq: int = 0
    other_tok: int = 0
    free_tokens: int = 0
    requests: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Node:
    unread: int = 0
    other: int = 0
    engines: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Group:
    role: Role
    tok: int = 0
    engines: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Holding:
    """What one live request counts for on one engine, in tokens."""

    engine: int
    request_id: int
    tok: int
    promised: int = 0


class ClusterLoads:
    """Loads of all engines, groups and nodes that have reported and are not lost."""

    def __init__(self) -> None:
        self._engines: dict[int, _Engine] = {}
        self._by_role: dict[Role, list[int]] = {role: [] for role in Role}
        self._groups: dict[int, _Group] = {}
        self._nodes: dict[int, _Node] = {}

    def report(self, role: Role, group: int, reports: Sequence[EngineReport]) -> None:
        """Takes a group's report; the first one of an engine makes it known.

        Raises:
          ValueError: the report is empty, has an engine twice, or contradicts an earlier one in its place or role.
        """
        if not reports:
            raise ValueError(f"group {group} reports no engine")
        if len({report.engine for report in reports}) < len(reports):
            raise ValueError(f"group {group} reports an engine twice")
        if group in self._groups and self._groups[group].role is not role:
            raise ValueError(f"group {group} fetches as {role.value}, and is {self._groups[group].role.value}")
        for report in reports:
            self._check_place(role, group, report)
        # Every engine of a large cluster passes here at every fetch: hence no calls of `max`.
        engines, read_q = self._engines, dict[int, int]()
        for report in reports:
            engine = engines.get(report.engine) or self._add(role, report)
            tok, seq = report.tok - engine.tok, report.seq - engine.seq
            other_tok = tok if tok > 0 else 0
            if other_tok != engine.other_tok:
                self._groups[group].tok += other_tok - engine.other_tok
                engine.other_tok = other_tok
            engine.other_seq = seq if seq > 0 else 0
            engine.free_tokens = report.free_tokens
            if report.read_q >= read_q.get(report.node, 0):
                read_q[report.node] = report.read_q
        for number, tokens in read_q.items():
            node = self._nodes[number]
            node.other = max(0, tokens - node.unread)

    def now(self, engines: Iterable[int]) -> list[EngineReport]:
        """Loads of these engines, with all that was assigned since they reported."""
        nodes = self._nodes
        return [
            EngineReport(
                load.engine,
                load.node,
                load.group,
                load.seq + load.other_seq,
                load.tok + load.other_tok,
                nodes[load.node].unread + nodes[load.node].other,
                load.free_tokens - load.promised if load.free_tokens > load.promised else 0,
            )
            for load in map(self._engines.__getitem__, engines)
        ]

    def read_q(self, node: int) -> int:
        """Tokens that a node has yet to read from the store."""
        return self._nodes[node].unread + self._nodes[node].other

    def node_of(self, engine: int) -> int:
        return self._engines[engine].node

    def knows(self, engine: int) -> bool:
        return engine in self._engines

    def requests_of(self, engine: int) -> frozenset[int]:
        """Requests that count on an engine."""
        return frozenset(self._engines[engine].requests)

    def free_tokens(self, engine: int) -> int:
        """KV memory of an engine that is neither used nor promised, in tokens."""
        load = self._engines[engine]
        return max(0, load.free_tokens - load.promised)

    def engines(self, role: Role) -> Sequence[int]:
        """All engines of a role, lowest number first."""
        return self._by_role[role]

    def group_totals(self, role: Role) -> dict[int, int]:
        """Tokens of the requests on each group's engines."""
        return {number: group.tok for number, group in self._groups.items() if group.role is role}

    def hold(self, holding: Holding) -> None:
        """A request counts on an engine from now on."""
        engine = self._engines[holding.engine]
        engine.requests.add(holding.request_id)
        self._count(engine, 1, holding)

    def release(self, holding: Holding) -> None:
        """A request counts on an engine no more.

        Raises:
          IntegrityError: it did not.
        """
        engine = self._engines[holding.engine]
        if holding.request_id not in engine.requests:
            raise IntegrityError(f"request {holding.request_id} does not count on engine {holding.engine}")
        engine.requests.remove(holding.request_id)
        self._count(engine, -1, holding)

    def keep_promise(self, holding: Holding, tokens: int) -> Holding:
        """A request has taken promised KV memory: its engine's next report has that much less of it free.

        Returns:
          What it counts for from now on.
        """
        engine = self._engines[holding.engine]
        engine.promised -= tokens
        engine.free_tokens -= tokens
        return Holding(holding.engine, holding.request_id, holding.tok, holding.promised - tokens)

    def add_unread(self, node: int, tokens: int) -> None:
        """A node has that much more to read; less if negative."""
        self._nodes[node].unread += tokens

    def lose(self, engine: int) -> bool:
        """Forgets an engine that holds nothing any more; whether it was the last one of its group.

        Raises:
          IntegrityError: requests still count on it.
        """
        lost = self._engines.pop(engine)
        if lost.requests:
            raise IntegrityError(f"engine {engine} is lost and still holds requests {sorted(lost.requests)}")
        self._by_role[lost.role].remove(engine)
        node, group = self._nodes[lost.node], self._groups[lost.group]
        node.engines.remove(engine)
        if not node.engines:
            del self._nodes[lost.node]
        group.engines.remove(engine)
        group.tok -= lost.other_tok
        if not group.engines:
            del self._groups[lost.group]
        return not group.engines

    def check(self, holdings: Iterable[Holding], unread: Iterable[tuple[int, int]]) -> None:
        """Raises `IntegrityError` unless all counts are the sums over live requests.

        Args:
          holdings: all that counts on engines.
          unread: node and tokens, of each read that is not over.
        """
        seq, tok, promised = (dict.fromkeys(self._engines, 0) for _ in range(3))
        requests: dict[int, set[int]] = {number: set() for number in self._engines}
        for holding in holdings:
            if holding.engine not in self._engines:
                raise IntegrityError(f"request {holding.request_id} is on engine {holding.engine}, which is not known")
            seq[holding.engine] += 1
            tok[holding.engine] += holding.tok
            promised[holding.engine] += holding.promised
            requests[holding.engine].add(holding.request_id)
        for number, engine in self._engines.items():
            counted = (engine.seq, engine.tok, engine.promised, engine.requests)
            summed = (seq[number], tok[number], promised[number], requests[number])
            if counted != summed:
                raise IntegrityError(f"engine {number} counts {counted}, its requests give {summed}")
        for number, group in self._groups.items():
            total = sum(self._engines[e].tok + self._engines[e].other_tok for e in group.engines)
            if group.tok != total:
                raise IntegrityError(f"group {number} counts {group.tok} tokens, its engines give {total}")
        reads = dict.fromkeys(self._nodes, 0)
        for node, tokens in unread:
            reads[node] = reads.get(node, 0) + tokens
        counts = {number: node.unread for number, node in self._nodes.items()}
        if counts != reads:
            raise IntegrityError(f"nodes count {counts} tokens to read, their requests give {reads}")

    def _check_place(self, role: Role, group: int, report: EngineReport) -> None:
        if report.group != group:
            raise ValueError(f"engine {report.engine} of group {report.group} is in the report of group {group}")
        known = self._engines.get(report.engine)
        if known is not None and (known.node != report.node or known.group != group or known.role is not role):
            raise ValueError(f"{report} of {role.value} engine contradicts what is known: {known}")

    def _add(self, role: Role, report: EngineReport) -> _Engine:
        engine = _Engine(report.engine, report.node, report.group, role)
        self._engines[report.engine] = engine
        bisect.insort(self._by_role[role], report.engine)
        self._groups.setdefault(report.group, _Group(role)).engines.add(report.engine)
        self._nodes.setdefault(report.node, _Node()).engines.add(report.engine)
        return engine

    def _count(self, engine: _Engine, sign: int, holding: Holding) -> None:
        engine.seq += sign
        engine.tok += sign * holding.tok
        engine.promised += sign * holding.promised
        self._groups[engine.group].tok += sign * holding.tok
