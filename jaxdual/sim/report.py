"""What a simulation reports: the measures of a replay (`offline.replay_report`), and what each card has carried."""

from __future__ import annotations

import resource
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from jaxdual.offline.time_summary import time_summary
from jaxdual.offline.trace import Session
from jaxdual.sim.cluster import ClusterSim
from jaxdual.sim.config import SimConfig
from jaxdual.sim.network import Pipe
from jaxdual.sim.nodes import Request

_PARTS = ("queue", "allocation", "read", "prefill")


class Measures:
    """Times of all requests and agents, as they end.

    Args:
      sessions: of the agents.
      starts: of the same, in seconds.
    """

    def __init__(self, sessions: Sequence[Session], starts: Sequence[float]) -> None:
        self._starts = starts
        self._left = [len(session.turns) for session in sessions]
        self.planned = sum(self._left)
        self.served = 0
        self.prompt = self.cached = self.generated = 0
        self.jct = array("d", bytes(8 * len(sessions)))
        self.ttft, self.ttst, self.tpot = array("f"), array("f"), array("f")
        self.parts = {part: array("f") for part in _PARTS}

    def take(self, request: Request, now: float) -> None:
        """A request is over."""
        self.served += 1
        self.prompt += request.prompt
        self.cached += request.hit
        self.generated += request.output
        self.ttft.append(request.first - request.arrival)
        # As in the paper's Figure 12: waiting for engines, for buffers, for the card and what it reads, and the rest.
        allocation = 0.0 if request.blocked is None else max(0.0, request.allocated - request.blocked)
        self.parts["queue"].append(request.placed - request.arrival)
        self.parts["allocation"].append(allocation)
        self.parts["read"].append(request.ready - request.placed - allocation)
        self.parts["prefill"].append(request.first - request.ready)
        if request.output > 1:
            self.ttst.append(request.second - request.first)
            self.tpot.append((now - request.first) / (request.output - 1))
        self._left[request.agent] -= 1
        if not self._left[request.agent]:
            self.jct[request.agent] = now - self._starts[request.agent]


def build_report(
    config: SimConfig, sim: ClusterSim, measures: Measures, seconds: float, own: Mapping[str, float]
) -> dict[str, Any]:
    """The report as JSON data; times in simulated seconds, but those of `simulation`.

    Args:
      seconds: that were simulated.
      own: what the simulation took itself.
    """
    return {
        "config": msgspec.to_builtins(config),
        "mode": config.mode,
        "seconds": seconds,
        "requests": {"planned": measures.planned, "ok": measures.served},
        "jct_s": seconds,
        "jct_agents_s": time_summary(measures.jct),
        "ttft_s": time_summary(measures.ttft),
        "ttft_parts_s": {part: time_summary(times) for part, times in measures.parts.items()},
        "ttst_s": time_summary(measures.ttst),
        "tpot_s": time_summary(measures.tpot),
        "tokens": {"prompt": measures.prompt, "cached": measures.cached, "generation": measures.generated},
        "hit_rate": measures.cached / measures.prompt,
        "throughput": {
            "requests_per_s": measures.served / seconds,
            "prompt_tokens_per_s": measures.prompt / seconds,
            "generation_tokens_per_s": measures.generated / seconds,
        },
        "nics": _nics(sim, seconds),
        "snic_max_over_avg": _unevenness([node.snic.write for node in (*sim.prefill_nodes, *sim.decode_nodes)]),
        "attention_max_over_avg": _attention(sim),
        "engines": {
            "prefill_busy": sum(group.figures.seconds for group in sim.forwards) / (seconds * len(sim.forwards)),
            "decode_memory_promised": sim.promised_seconds
            / (seconds * sum(engine.capacity for engine in sim.decode_engines)),
        },
        "over_time": {
            "storage_read_bytes": {
                side: _windows([node.snic.write for node in nodes])
                for side, nodes in (("prefill", sim.prefill_nodes), ("decode", sim.decode_nodes))
            },
            "requests": sim.samples,
        },
        "buffers": {
            side: {"bytes": nodes[0].buffer.capacity, "most_used": max(node.buffer.most for node in nodes)}
            for side, nodes in (("prefill", sim.prefill_nodes), ("decode", sim.decode_nodes))
        },
        "simulation": {
            **own,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table for people."""
    cluster, simulation = report["config"]["cluster"], report["simulation"]
    rows = [
        (
            "cluster",
            f"{cluster['prefill_nodes']}P{cluster['decode_nodes']}D of {cluster['gpus']} GPUs, {report['mode']}",
        ),
        ("requests", f"{report['requests']['ok']} of {report['requests']['planned']}"),
        ("JCT", f"{report['jct_s']:.1f} s"),
        *(
            (
                name,
                f"mean {times['mean']:.3f}  p50 {times['p50']:.3f}  p90 {times['p90']:.3f}  p99 {times['p99']:.3f} s",
            )
            for name, times in (
                ("TTFT", report["ttft_s"]),
                *((f"  {part}", times) for part, times in report["ttft_parts_s"].items()),
                ("TTST", report["ttst_s"]),
                ("TPOT", report["tpot_s"]),
            )
            if times is not None
        ),
        ("hit rate", f"{report['hit_rate']:.1%}"),
        ("generation", f"{report['throughput']['generation_tokens_per_s']:.0f} tokens/s"),
        *(
            (f"{name} {direction}", f"{nic['bytes'] / 1e9:.1f} GB, {nic['utilisation']:.1%} busy")
            for name, directions in report["nics"]["kinds"].items()
            for direction, nic in directions.items()
        ),
        ("prefill engines", f"{report['engines']['prefill_busy']:.1%} busy"),
        ("decode memory", f"{report['engines']['decode_memory_promised']:.1%} used or promised"),
        (
            "storage cards",
            "-" if report["snic_max_over_avg"] is None else f"max / mean {report['snic_max_over_avg']:.3f}",
        ),
        ("simulation", f"{simulation['wall_seconds']:.1f} s, {simulation['peak_bytes'] / 1e6:.0f} MB"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _nics(sim: ClusterSim, seconds: float) -> dict[str, Any]:
    """Bytes and utilisation: by kind of card all bytes and the mean, and of each card its own."""
    cards = {
        "prefill storage": [node.snic for node in sim.prefill_nodes],
        "decode storage": [node.snic for node in sim.decode_nodes],
        "prefill compute": [engine.nic for engine in sim.prefill_engines],
        "decode compute": [engine.nic for engine in sim.decode_engines],
    }
    kinds = {
        name: {
            direction: _carried([getattr(card, direction) for card in group], seconds)
            for direction in ("read", "write")
        }
        for name, group in cards.items()
    }
    memories = {"prefill memory": sim.prefill_nodes, "decode memory": sim.decode_nodes}
    kinds |= {name: {"both": _carried([node.dram for node in nodes], seconds)} for name, nodes in memories.items()}
    each = {
        f"{name} {number} {direction}": _carried([getattr(card, direction)], seconds)
        for name, group in cards.items()
        for number, card in enumerate(group)
        for direction in ("read", "write")
    }
    return {"kinds": kinds, "each": each}


def _carried(pipes: Sequence[Pipe], seconds: float) -> dict[str, float]:
    """All bytes; those that are still to pass when the last agent is done; use of the time until then."""
    nbytes = sum(pipe.nbytes for pipe in pipes)
    left = sum(pipe.left(seconds) for pipe in pipes)
    used = (nbytes - left) / (seconds * sum(pipe.rate for pipe in pipes))
    return {"bytes": nbytes, "left_bytes": left, "utilisation": used}


def _unevenness(pipes: Sequence[Pipe]) -> float | None:
    """Mean over the windows of the busiest storage card's bytes over the mean card's; of windows in which the mean card
    has carried at least a tenth of what it has at its busiest.
    """
    carried = np.array(_windows(pipes))
    if not carried.size or len(pipes) < 2:
        return None
    mean = carried.mean(axis=0)
    busy = mean > 0.1 * mean.max()
    return float((carried.max(axis=0)[busy] / mean[busy]).mean()) if busy.any() else None


def _windows(pipes: Sequence[Pipe]) -> list[list[float]]:
    """Bytes of each pipe in each window, as many for all."""
    length = max(len(pipe.windows) for pipe in pipes)
    return [pipe.windows + [0.0] * (length - len(pipe.windows)) for pipe in pipes]


def _attention(sim: ClusterSim) -> float | None:
    count = sum(group.figures.count for group in sim.forwards)
    if not any(group.figures.unevenness for group in sim.forwards):
        return None
    return sum(group.figures.unevenness for group in sim.forwards) / count if count else None
