"""One request's way through a simulated cluster, in the trace format that Perfetto opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxdual.sim.nodes import Request


def write_spans(path: Path, request: Request, end: float) -> None:
    """Writes what a request did when, and where.

    Args:
      request: that is over.
      end: when it was, in seconds.
    """
    plan = request.plan
    sides = " and ".join(
        side for side, tokens in (("prefill", plan.read.prefill_tokens), ("decode", plan.read.decode_tokens)) if tokens
    )
    second = request.second or end
    spans = [
        ("scheduler", "waits for engines", request.arrival, request.placed),
        ("store", "waits for its card, and for buffers", request.placed, request.allocated),
        ("store", f"read on the {sides} side" if sides else "nothing is read", request.allocated, request.ready),
        (f"prefill engine {plan.prefill_engine}", "waits and is computed", request.ready, request.first),
        (f"decode engine {plan.decode_engine}", "handed over, second token", request.first, second),
        (f"decode engine {plan.decode_engine}", "further tokens", second, end),
    ]
    tracks = list(dict.fromkeys(track for track, *_ in spans))
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}
        for number, track in enumerate(tracks, start=1)
    ]
    name = f"agent {request.agent}, turn {request.turn}"
    events.append({"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": name}})
    tokens = {"prompt": request.prompt, "stored": request.hit, "output": request.output}
    events += [
        # Microseconds.
        {"ph": "X", "pid": 1, "tid": tracks.index(track) + 1, "name": name, "ts": begin * 1e6}
        | {"dur": (over - begin) * 1e6, "args": tokens}
        for track, name, begin, over in spans
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
