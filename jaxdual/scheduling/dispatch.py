"""Which of several data-parallel engines gets a request.

"DPLB" of arXiv 2602.21626, Algorithm 1, both ways in which it can be read, and what it is compared with. Engines report
their loads now and then, so a choice is made on what they said last; what was sent to an engine since then is added.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, get_args

LoadScope = Literal["literal", "relaxed"]
LoadDefinition = Literal["context", "remaining"]
Branch = Literal["kv", "affinity", "load", "round_robin"]
DISPATCH_POLICIES = ("rr", "vllm_counts", "gimbal", "gimbal_relaxed", "score")

_BASIS_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine reports.

    Attributes:
      kv_used, kv_capacity: pages of KV memory, those that hold nothing but what the prefix cache keeps not counted as
        used.
      num_waiting, num_running: requests.
      context_tokens: tokens of running sequences that are computed or generated, and of waiting prompts.
      remaining_tokens: prompt tokens not computed yet, running and waiting, and one for each decoding sequence.
    """

    kv_used: int
    kv_capacity: int
    num_waiting: int
    num_running: int
    context_tokens: int
    remaining_tokens: int


@dataclass(frozen=True, slots=True)
class DispatchRequest:
    """What a choice may depend on.

    Attributes:
      request_id: unique among those under way.
      prompt_tokens: its length.
      outputs: that are wanted of it; each is a sequence.
      user: who asks; None if that is not known.
      prefix_shares: part of the prompt that each engine has cached, where that is known.
    """

    request_id: str
    prompt_tokens: int
    user: str | None = None
    outputs: int = 1
    prefix_shares: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class GimbalThresholds:
    """Limits of Algorithm 1; the defaults are the paper's.

    Attributes:
      theta_kv: KV usage, in [0, 1], from which an engine counts as saturated.
      theta_diff: difference of KV usages from which engines count as different.
      theta_load: tokens above which a difference of loads does.
      user_ttl: seconds after a user's last request for which the engine is remembered; not given in the paper.
      max_users: that are remembered; the longest silent are forgotten first.

    Raises:
      ValueError: a value out of its range.
    """

    theta_kv: float = 0.9
    theta_diff: float = 0.10
    theta_load: int = 3000
    user_ttl: float = 600.0
    max_users: int = 100_000

    def __post_init__(self) -> None:
        for name in ("theta_kv", "theta_diff"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name, least in (("theta_load", 0), ("user_ttl", 0), ("max_users", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class LoadBoard:
    """The latest reports of all engines, and what was sent to each since its own.

    Args:
      engines: how many there are.
      correct: adds what was sent; False leaves reports as they are.

    Raises:
      ValueError: there is no engine.
    """

    def __init__(self, engines: int, *, correct: bool = True) -> None:
        if engines < 1:
            raise ValueError(f"{engines=} must be at least 1")
        self._correct = correct
        self._reports: list[EngineLoad | None] = [None] * engines
        self._sent: list[dict[str, tuple[int, int]]] = [{} for _ in range(engines)]  # sequences, and their tokens
        self._sent_tokens = [0] * engines
        self._sent_count = [0] * engines
        self._kv = [0] * engines

    @property
    def engines(self) -> int:
        return len(self._reports)

    @property
    def is_known(self) -> bool:
        """Whether every engine has reported."""
        return None not in self._reports

    def report(self, engine: int, load: EngineLoad | None) -> None:
        """An engine says how it is, or is taken to be unknown (None), as a new one is."""
        self._reports[engine] = load
        self._sent[engine].clear()
        self._sent_tokens[engine] = self._sent_count[engine] = 0
        self._kv[engine] = 0 if load is None else load.kv_used * _BASIS_POINTS // max(load.kv_capacity, 1)

    def sent(self, engine: int, request: DispatchRequest) -> None:
        """A request goes to an engine."""
        if self._correct:
            tokens = request.outputs * request.prompt_tokens
            self._sent[engine][request.request_id] = (request.outputs, tokens)
            self._sent_tokens[engine] += tokens
            self._sent_count[engine] += request.outputs

    def withdrawn(self, engine: int, request_id: str) -> None:
        """A request has ended; nothing is left of it where the engine hasn't reported since it was sent."""
        outputs, tokens = self._sent[engine].pop(request_id, (0, 0))
        self._sent_tokens[engine] -= tokens
        self._sent_count[engine] -= outputs

    def kv_usage(self) -> list[int]:
        """Of all engines, in basis points, so that 90 % less 80 % is 10 %."""
        return self._kv

    def tokens(self, definition: LoadDefinition) -> list[int]:
        """Running and waiting tokens of all engines."""
        reports = [report for report in self._reports if report is not None]
        if definition == "context":
            return [report.context_tokens + sent for report, sent in zip(reports, self._sent_tokens, strict=True)]
        return [report.remaining_tokens + sent for report, sent in zip(reports, self._sent_tokens, strict=True)]

    def counts(self) -> list[tuple[int, int]]:
        """Waiting and running requests of all engines."""
        reports = [report for report in self._reports if report is not None]
        return [
            (load.num_waiting + sent, load.num_running) for load, sent in zip(reports, self._sent_count, strict=True)
        ]


class DispatchPolicy(Protocol):
    """Chooses an engine for each request.

    Attributes:
      branches: how often each rule has decided.
      uses_prefixes: whether it looks at `DispatchRequest.prefix_shares`.
    """

    branches: Counter[str]
    uses_prefixes: ClassVar[bool]

    def select(self, request: DispatchRequest, board: LoadBoard, now: float) -> int:
        """The engine of a request, which the caller then tells the board.

        Args:
          now: seconds, on any clock that only goes forward.
        """


class _Turns:
    """Engines in turn."""

    def __init__(self) -> None:
        self._next = 0

    def peek(self, engines: int) -> int:
        return self._next % engines

    def take(self, engines: int) -> int:
        engine = self._next % engines
        self._next = engine + 1
        return engine


@dataclass(slots=True)
class RoundRobinDispatch:
    """Engines in turn, whatever they do: the baseline that the paper names."""

    uses_prefixes: ClassVar[bool] = False
    branches: Counter[str] = field(default_factory=Counter)
    _turns: _Turns = field(default_factory=_Turns)

    def select(self, request: DispatchRequest, board: LoadBoard, now: float) -> int:
        """See `DispatchPolicy`."""
        self.branches["round_robin"] += 1
        return self._turns.take(board.engines)


@dataclass(slots=True)
class CountsDispatch:
    """The engine with the fewest waiting requests, of those the one with the fewest running: what vLLM does.

    Without reports, engines in turn.
    """

    uses_prefixes: ClassVar[bool] = False
    branches: Counter[str] = field(default_factory=Counter)
    _turns: _Turns = field(default_factory=_Turns)

    def select(self, request: DispatchRequest, board: LoadBoard, now: float) -> int:
        """See `DispatchPolicy`."""
        if not board.is_known:
            self.branches["round_robin"] += 1
            return self._turns.take(board.engines)
        self.branches["load"] += 1
        counts = board.counts()
        return counts.index(min(counts))


class GimbalDispatch:
    """Algorithm 1: engines in turn, but away from full KV memory, then from long queues, and users to where they were.

    Args:
      thresholds: its limits.
      load_scope: "literal" compares token loads only where some engine's KV memory is saturated, as the listing is
        nested; "relaxed" also where none is, for requests that no remembered engine claims, as the text says it.
      load: which tokens count.
      advance_on_call: moves the turn on with every request, not only with those that take it.
    """

    uses_prefixes: ClassVar[bool] = False

    def __init__(
        self,
        thresholds: GimbalThresholds = GimbalThresholds(),
        *,
        load_scope: LoadScope = "literal",
        load: LoadDefinition = "context",
        advance_on_call: bool = True,
    ) -> None:
        if load_scope not in get_args(LoadScope):
            raise ValueError(f"{load_scope=} must be one of {', '.join(get_args(LoadScope))}")
        if load not in get_args(LoadDefinition):
            raise ValueError(f"{load=} must be one of {', '.join(get_args(LoadDefinition))}")
        self.branches: Counter[str] = Counter()
        self._thresholds = thresholds
        self._saturated = round(thresholds.theta_kv * _BASIS_POINTS)
        self._different = round(thresholds.theta_diff * _BASIS_POINTS)
        self._relaxed = load_scope == "relaxed"
        self._load: LoadDefinition = load
        self._advance_on_call = advance_on_call
        self._turns = _Turns()
        self._users: OrderedDict[str, tuple[int, float]] = OrderedDict()  # engine, and when the user came last

    def select(self, request: DispatchRequest, board: LoadBoard, now: float) -> int:
        """See `DispatchPolicy`."""
        turn = self._turns.take(board.engines) if self._advance_on_call else self._turns.peek(board.engines)
        engine, branch = self._rule(request, board, now) or (turn, "round_robin")
        if branch == "round_robin" and not self._advance_on_call:
            self._turns.take(board.engines)
        self.branches[branch] += 1
        self._remember(request.user, engine, now)
        return engine

    def _rule(self, request: DispatchRequest, board: LoadBoard, now: float) -> tuple[int, Branch] | None:
        """The engine that a rule names, and which rule."""
        if not board.is_known:
            return None
        usage = board.kv_usage()
        if max(usage) >= self._saturated:
            if max(usage) - min(usage) >= self._different:
                return usage.index(min(usage)), "kv"
            return self._least_loaded(board)
        home = self._home(request.user, now)
        if home is not None and home < board.engines:
            return home, "affinity"
        return self._least_loaded(board) if self._relaxed else None

    def _least_loaded(self, board: LoadBoard) -> tuple[int, Branch] | None:
        tokens = board.tokens(self._load)
        if max(tokens) - min(tokens) > self._thresholds.theta_load:
            return tokens.index(min(tokens)), "load"
        return None

    def _home(self, user: str | None, now: float) -> int | None:
        known = None if user is None else self._users.get(user)
        if known is None or now - known[1] > self._thresholds.user_ttl:
            return None
        return known[0]

    def _remember(self, user: str | None, engine: int, now: float) -> None:
        if user is None:
            return
        self._users[user] = (engine, now)
        self._users.move_to_end(user)
        if len(self._users) > self._thresholds.max_users:
            self._users.popitem(last=False)


@dataclass(slots=True)
class ScoreDispatch:
    """The best weighted sum of cached prefix, load and KV usage, as llm-d weighs them; engines in turn without reports.

    Attributes:
      prefix, load, kv: weights. Loads count relative to the greatest one.
    """

    uses_prefixes: ClassVar[bool] = True
    prefix: float = 3.0
    load: float = 2.0
    kv: float = 2.0
    branches: Counter[str] = field(default_factory=Counter)
    _turns: _Turns = field(default_factory=_Turns)

    def select(self, request: DispatchRequest, board: LoadBoard, now: float) -> int:
        """See `DispatchPolicy`."""
        if not board.is_known:
            self.branches["round_robin"] += 1
            return self._turns.take(board.engines)
        tokens, usage = board.tokens("remaining"), board.kv_usage()
        most = max(*tokens, 1)
        shares = request.prefix_shares or [0.0] * board.engines
        scores = [
            self.prefix * share - self.load * load / most - self.kv * used / _BASIS_POINTS
            for share, load, used in zip(shares, tokens, usage, strict=True)
        ]
        engine = scores.index(max(scores))
        self.branches["affinity" if shares[engine] else "load"] += 1
        return engine


def dispatch_policy(name: str, thresholds: GimbalThresholds = GimbalThresholds()) -> DispatchPolicy:
    """The policy that a configuration names.

    Raises:
      ValueError: another name.
    """
    match name:
        case "rr":
            return RoundRobinDispatch()
        case "vllm_counts":
            return CountsDispatch()
        case "gimbal":
            return GimbalDispatch(thresholds)
        case "gimbal_relaxed":
            return GimbalDispatch(thresholds, load_scope="relaxed")
        case "score":
            return ScoreDispatch()
    raise ValueError(f"dispatch policy {name!r} must be one of {', '.join(DISPATCH_POLICIES)}")
