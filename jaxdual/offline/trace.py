"""Traces of agent sessions: what each turn appends and generates, and the files that hold it.

A line of a trace is a request in Mooncake's format, `{"timestamp": ms, "input_length": tokens, "output_length": tokens,
"hash_ids": [...]}` with one id for each `BLOCK_TOKENS` of the prompt, where equal ids are equal blocks after equal
prefixes. Lines with the same `session_id` are the turns of one session. Or a line is a whole session,
`{"session_id": ..., "turns": [{"append": tokens, "generate": tokens}, ...]}`. Blank lines are skipped.
"""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512  # tokens of the prompt that a hash id stands for
_REQUEST_KEYS = ("timestamp", "input_length", "output_length", "hash_ids", "session_id", "delay")
_SESSION_KEYS = ("session_id", "turns", "timestamp")
_TURN_KEYS = ("append", "generate", "drop", "delay")


class TraceError(ValueError):
    """A trace that can't be replayed; the message says where it is wrong and what is accepted."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request of a session.

    Its context is all that was appended and generated before and not dropped; its prompt is the context without the
    last `drop` tokens, and `append` new tokens.

    Attributes:
      append: new tokens, at least 1.
      generate: output tokens, at least 1.
      drop: tokens at the context's end that the agent does not send again, such as reasoning or long tool output.
      delay: seconds from the end of the turn before.
      block_ids: for each block of the whole prompt, what its tokens are made from; empty if the new tokens are this
        turn's own.
    """

    append: int
    generate: int
    drop: int = 0
    delay: float = 0.0
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """The turns of one agent.

    Attributes:
      session_id: unique in the trace.
      turns: at least one.
      timestamp: seconds, when it starts; None if the trace doesn't tell.
      block_tokens: tokens of a block of `Turn.block_ids`.
    """

    session_id: str
    turns: tuple[Turn, ...]
    timestamp: float | None = None
    block_tokens: float = BLOCK_TOKENS

    def prompt_lengths(self) -> Iterator[int]:
        """Tokens of each turn's prompt."""
        context = 0
        for turn in self.turns:
            prompt = context - turn.drop + turn.append
            yield prompt
            context = prompt + turn.generate


def read_trace(path: Path) -> list[Session]:
    """The sessions of a file, in the order of their first lines.

    A line without `session_id` is a session of one turn. A later turn of a session of request lines goes on from the
    context, if its prompt is longer than that and begins with the same full blocks as the last prompt; otherwise the
    agent has rewritten its context, and what the two prompts have in common is kept.

    Raises:
      TraceError: the file can't be read, or a line is not one of a trace.
    """
    # By session_id, and by line number for a line that has none.
    sessions: dict[str | int, Session | _RequestLines] = {}
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    _read_line(f"{path}: line {number}", number, raw, sessions)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    if not sessions:
        raise TraceError(f"{path}: has no requests")
    return [one if isinstance(one, Session) else one.session() for one in sessions.values()]


def write_trace(path: Path, sessions: Sequence[Session]) -> None:
    """Writes sessions, one a line, for `read_trace`.

    Raises:
      ValueError: a turn has `block_ids`, which lines of sessions don't hold.
    """
    lines = [json.dumps(_session_line(session)) + "\n" for session in sessions]
    path.write_text("".join(lines), encoding="utf-8")


def _session_line(session: Session) -> dict[str, Any]:
    turns = []
    for turn in session.turns:
        if turn.block_ids:
            raise ValueError(f"session {session.session_id!r} has block ids, which a line of a session can't hold")
        values = {"append": turn.append, "generate": turn.generate, "drop": turn.drop, "delay": turn.delay * 1000}
        turns.append({key: value for key, value in values.items() if value})
    timestamp = {} if session.timestamp is None else {"timestamp": session.timestamp * 1000}
    return {"session_id": session.session_id, **timestamp, "turns": turns}


@dataclass(slots=True)
class _RequestLines:
    """A session as its request lines come; lengths in tokens."""

    session_id: str
    timestamp: float | None
    turns: list[Turn] = field(default_factory=list)
    context: int = 0
    last_prompt: int = 0

    def add(self, prompt: int, generate: int, delay: float, block_ids: tuple[int, ...]) -> None:
        keep = self._kept(prompt, block_ids)
        self.turns.append(Turn(prompt - keep, generate, self.context - keep, delay, block_ids))
        self.context, self.last_prompt = prompt + generate, prompt

    def session(self) -> Session:
        return Session(self.session_id, tuple(self.turns), self.timestamp)

    def _kept(self, prompt: int, block_ids: tuple[int, ...]) -> int:
        last_ids = self.turns[-1].block_ids if self.turns else ()
        common = 0
        while common < min(len(last_ids), len(block_ids)) and last_ids[common] == block_ids[common]:
            common += 1
        if prompt > self.context and common >= self.last_prompt // BLOCK_TOKENS:
            return self.context
        return min(common * BLOCK_TOKENS, self.last_prompt, prompt - 1)


class _Fields:
    """A JSON object of a trace, and where it stands.

    Raises:
      TraceError: it is no object, or lacks a key, or has an unknown one.
    """

    def __init__(self, where: str, values: Any, required: Collection[str], known: Collection[str]) -> None:
        if not isinstance(values, dict):
            raise TraceError(f"{where}: must be a JSON object with {', '.join(known)}, got {_short(values)}")
        for key in values:
            if key not in known:
                raise TraceError(f"{where}: unknown key {_short(key)}; known are {', '.join(known)}")
        for key in required:
            if key not in values:
                raise TraceError(f"{where}: {key} is missing; required are {', '.join(required)}")
        self.where, self._values = where, values

    def whole(self, key: str, low: int, default: int = 0) -> int:
        value = self._values.get(key, default)
        if not _is_whole(value) or value < low:
            raise self.error(key, f"must be a whole number of at least {low}")
        return int(value)

    def seconds(self, key: str) -> float | None:
        """A value in milliseconds, in seconds; None if it isn't there."""
        if key not in self._values:
            return None
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self.error(key, "must be a number of milliseconds, at least 0")
        return float(value / 1000)

    def items(self, key: str) -> list[Any]:
        value = self._values[key]
        if not isinstance(value, list) or not value:
            raise self.error(key, "must be a list that is not empty")
        return value

    def session_id(self) -> str | None:
        if "session_id" not in self._values:
            return None
        value = self._values["session_id"]
        if not _is_whole(value) and not (isinstance(value, str) and value):
            raise self.error("session_id", "must be a whole number, or a string that is not empty")
        return str(value)

    def error(self, key: str, accepted: str) -> TraceError:
        return TraceError(f"{self.where}: {key} {_short(self._values.get(key))} {accepted}")


def _read_line(where: str, number: int, raw: bytes, sessions: dict[str | int, Session | _RequestLines]) -> None:
    values = _decode(where, raw)
    if isinstance(values, dict) and "turns" in values:
        fields = _Fields(where, values, ("session_id", "turns"), _SESSION_KEYS)
        name = fields.session_id() or ""
        if name in sessions:
            raise fields.error("session_id", "was already used; a session's line holds all of its turns")
        sessions[name] = Session(name, _turns(fields), fields.seconds("timestamp"))
        return
    fields = _Fields(where, values, ("input_length", "output_length", "hash_ids"), _REQUEST_KEYS)
    session_id = fields.session_id()
    new = _RequestLines(session_id or f"line {number}", fields.seconds("timestamp"))
    lines = sessions.setdefault(session_id or number, new)
    if isinstance(lines, Session):
        raise fields.error("session_id", "was already used; a session's line holds all of its turns")
    prompt, generate = fields.whole("input_length", 1), fields.whole("output_length", 1)
    lines.add(prompt, generate, fields.seconds("delay") or 0.0, _block_ids(fields, prompt))


def _turns(session: _Fields) -> tuple[Turn, ...]:
    turns, context = [], 0
    for index, values in enumerate(session.items("turns")):
        fields = _Fields(f"{session.where}: turns[{index}]", values, ("append", "generate"), _TURN_KEYS)
        append, generate, drop = fields.whole("append", 1), fields.whole("generate", 1), fields.whole("drop", 0)
        if drop > context:
            raise fields.error("drop", f"must be at most {context}, the tokens of the context")
        turns.append(Turn(append, generate, drop, fields.seconds("delay") or 0.0))
        context += append + generate - drop
    return tuple(turns)


def _block_ids(fields: _Fields, prompt: int) -> tuple[int, ...]:
    ids, count = fields.items("hash_ids"), -(-prompt // BLOCK_TOKENS)
    if len(ids) != count or not all(_is_whole(one) and one >= 0 for one in ids):
        accepted = f"one for each {BLOCK_TOKENS} tokens of input_length {prompt}"
        raise fields.error("hash_ids", f"must be {count} whole numbers of at least 0, {accepted}; it has {len(ids)}")
    return tuple(ids)


def _decode(where: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TraceError(f"{where}: not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not usable JSON: {error}") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
