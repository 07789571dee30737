"""Load on a server: when requests are sent, what is kept of each, and what is made of that.

Definitions: TTFT is from sending a request to its first streamed output, ITL are the gaps between streamed outputs, E2E
is from sending to the last one, and TPOT = (E2E - TTFT) / (tokens - 1). A server may merge tokens into one output.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from bench.report import percentiles

Status = Literal["ok", "refused", "error"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request: prompt as token ids or text, and how many tokens are to be generated."""

    prompt: list[int] | str
    output: int


@dataclass(slots=True)
class Record:
    """What became of a request. Times are seconds of the monotonic clock.

    Attributes:
      sent: when it was sent.
      status: "refused" for a full queue (429, RESOURCE_EXHAUSTED).
      outputs: when each streamed output arrived.
      ended: when the answer was complete.
      tokens: generated, as the server counts them.
      detail: what a refusal or error said.
    """

    sent: float
    status: Status = "error"
    outputs: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    detail: str = ""

    @property
    def ttft(self) -> float:
        return self.outputs[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.outputs[-1] - self.sent

    @property
    def tpot(self) -> float:
        return (self.e2e - self.ttft) / (self.tokens - 1)


_WORDS = (
    *("def", "class", "return", "import", "for", "while", "if", "else", "with", "try", "self", "value", "index"),
    *("count", "name", "list", "dict", "open", "read", "write", "close", "error", "raise", "yield", "async", "await"),
    *("lambda", "print", "range", "len", "key", "item", "node", "path", "text", "data", "size", "time"),
)


class Client(Protocol):
    """Sends requests of one kind."""

    async def send(self, request: LoadRequest) -> Record:
        """Streams one request to its end; failures are in the record."""

    async def close(self) -> None:
        """Closes its connections."""


def make_requests(
    count: int,
    *,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    vocab_size: int,
    as_text: bool,
    seed: int,
) -> list[LoadRequest]:
    """Seeded requests whose lengths are log-uniform; prompts share no prefix but by chance.

    Args:
      count: requests.
      prompt_tokens, output_tokens: fewest and most. Of text prompts, words, which are about as many tokens.
      vocab_size: prompt tokens are below it.
      as_text: prompts are text.
      seed: of all of it.
    """
    rng = random.Random(seed)

    def length(bounds: tuple[int, int]) -> int:
        return round(math.exp(rng.uniform(*map(math.log, bounds))))

    def prompt() -> list[int] | str:
        tokens = [rng.randrange(vocab_size) for _ in range(length(prompt_tokens))]
        return " ".join(_WORDS[token % len(_WORDS)] for token in tokens) if as_text else tokens

    return [LoadRequest(prompt(), length(output_tokens)) for _ in range(count)]


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests are sent, at `rate` a second on average; all at 0 for inf."""
    rng, now = random.Random(seed), 0.0
    arrivals = []
    for _ in range(count):
        arrivals.append(now)
        now += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    return arrivals


async def run_load(
    client: Client,
    requests: Sequence[LoadRequest],
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None = None,
    deadline: float = 600.0,
) -> list[Record]:
    """Sends each request at its time, or later where `max_concurrency` are under way already.

    Args:
      client: sends them.
      requests: to send.
      arrivals: seconds from now, ascending, one for each request.
      max_concurrency: requests under way at once at most.
      deadline: seconds after the last arrival at which unfinished requests are given up as errors.

    Returns:
      A record for each request, in order.
    """
    slots = asyncio.Semaphore(max_concurrency or len(requests) + 1)
    start = time.monotonic()

    async def one(request: LoadRequest) -> Record:
        sent = time.monotonic()
        try:
            async with asyncio.timeout(deadline):
                return await client.send(request)
        except TimeoutError:
            return Record(sent, "error", ended=time.monotonic(), detail=f"no end after {deadline:g} s")
        finally:
            slots.release()

    tasks = []
    for request, arrival in zip(requests, arrivals, strict=True):
        await asyncio.sleep(max(0.0, start + arrival - time.monotonic()))
        await slots.acquire()
        tasks.append(asyncio.create_task(one(request)))
    return await asyncio.gather(*tasks)


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Counts, rates and percentiles (seconds) of a run."""
    served = [record for record in records if record.status == "ok"]
    refused = [record for record in records if record.status == "refused"]
    errors = [record for record in records if record.status == "error"]
    first = min((record.sent for record in records), default=0.0)
    seconds = max((record.ended for record in records), default=0.0) - first
    gaps = [later - earlier for record in served for earlier, later in pairwise(record.outputs)]
    return {
        "requests": len(records),
        "ok": len(served),
        "refused": len(refused),
        "errors": len(errors),
        "error_details": dict(Counter(record.detail for record in errors).most_common(5)),
        "seconds": seconds,
        "offered_per_second": _rate(len(records), max((record.sent for record in records), default=0.0) - first),
        "requests_per_second": _rate(len(served), seconds),
        "output_tokens": sum(record.tokens for record in served),
        "output_tokens_per_second": _rate(sum(record.tokens for record in served), seconds),
        "streamed_outputs": sum(len(record.outputs) for record in served),
        "ttft_seconds": percentiles([record.ttft for record in served]),
        "tpot_seconds": percentiles([record.tpot for record in served if record.tokens > 1]),
        "itl_seconds": percentiles(gaps),
        "e2e_seconds": percentiles([record.e2e for record in served]),
        "refusal_seconds": percentiles([record.ended - record.sent for record in refused]),
        "error_seconds": percentiles([record.ended - record.sent for record in errors]),
    }


def steady_rate(records: Sequence[Record]) -> float:
    """Completed requests a second in the middle half of a run, without its ramps.

    Raises:
      ValueError: fewer than eight requests were served.
    """
    ends = sorted(record.ended for record in records if record.status == "ok")
    if len(ends) < 8:
        raise ValueError(f"{len(ends)} requests were served; a rate needs at least 8")
    low, high = len(ends) // 4, 3 * len(ends) // 4
    return (high - low) / (ends[high] - ends[low])


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None
