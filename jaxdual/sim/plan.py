"""How many nodes a load needs: simulates larger and larger clusters until the promised times are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxdual.config import ConfigError
from jaxdual.sim.config import SimConfig
from jaxdual.sim.run import run_simulation

SLO_KEYS = ("ttft", "tpot")


@dataclass(frozen=True, slots=True)
class Trial:
    """A simulated cluster.

    Attributes:
      prefill, decode: its nodes.
      times: mean seconds, by what is promised.
      excess: the largest of these over what is promised: above 1 a promise is broken.
      uses: part of each resource that is used, most used first.
    """

    prefill: int
    decode: int
    times: Mapping[str, float]
    excess: float
    uses: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found.

    Attributes:
      chosen: the cluster that keeps the promises; None if no tried one does.
      tried: all of them, in order.
      next_prefill, next_decode: the chosen one with a node, or group, more; None without it.
    """

    chosen: Trial | None
    tried: tuple[Trial, ...]
    next_prefill: Trial | None = None
    next_decode: Trial | None = None


def parse_slo(text: str) -> dict[str, float]:
    """Promised mean times, from `ttft=4,tpot=0.05`.

    Raises:
      ConfigError: it is something else.
    """
    slo = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if name not in SLO_KEYS or not 0 < seconds < float("inf"):
            raise ConfigError(f"--slo {text!r} must be seconds above 0 of {' and '.join(SLO_KEYS)}: ttft=4,tpot=0.05")
        slo[name] = seconds
    return slo


def make_plan(config: SimConfig, slo: Mapping[str, float], most_nodes: int, on_trial: Callable[[Trial], None]) -> Plan:
    """Adds the node, or group of nodes, that helps most until all promises are kept, and takes away what is not needed.

    The way is greedy: a smaller cluster that keeps the promises may exist where neither node alone brings one closer.

    Args:
      config: load, model and rates; begins with a node of each role, or a group where the model is expert-parallel.
      slo: of `parse_slo`.
      most_nodes: of both roles together.
      on_trial: called with each simulated cluster.

    Raises:
      ConfigError, TraceError: it can't be simulated.
    """
    known: dict[tuple[int, int], Trial] = {}

    def trial(prefill: int, decode: int) -> Trial:
        if (prefill, decode) not in known:
            known[prefill, decode] = _simulate(config, slo, prefill, decode)
            on_trial(known[prefill, decode])
        return known[prefill, decode]

    # Experts are spread over the nodes of a group: fewer would not hold them.
    whole = config.model.expert_parallel
    prefill_step = config.cluster.prefill_group_nodes if whole else 1
    decode_step = config.cluster.decode_group_nodes if whole else 1
    if prefill_step + decode_step > most_nodes:
        raise ConfigError(
            f"--most-nodes {most_nodes} must be at least {prefill_step + decode_step}: a node or group of each role"
        )
    steps = ((prefill_step, 0), (0, decode_step))

    def larger(than: Trial) -> list[Trial | None]:
        """With a step more of either role, as far as there may be so many nodes."""
        wanted = [(than.prefill + prefill, than.decode + decode) for prefill, decode in steps]
        return [trial(*nodes) if sum(nodes) <= most_nodes else None for nodes in wanted]

    best = trial(prefill_step, decode_step)
    while best.excess > 1:
        found = [one for one in larger(best) if one is not None]
        if not found:
            break
        best = min(found, key=lambda one: one.excess)
    if best.excess > 1:
        return Plan(None, tuple(known.values()))
    shrinks = True
    while shrinks:
        shrinks = False
        for prefill, decode in ((best.prefill - prefill_step, best.decode), (best.prefill, best.decode - decode_step)):
            if prefill and decode and trial(prefill, decode).excess <= 1:
                best, shrinks = trial(prefill, decode), True
                break
    more = larger(best)
    return Plan(best, tuple(known.values()), *more)


def format_plan(plan: Plan, slo: Mapping[str, float], most_nodes: int) -> str:
    """The plan for people."""
    promised = ", ".join(f"{name.upper()} {seconds:g} s" for name, seconds in slo.items())
    if plan.chosen is None:
        last = min(plan.tried, key=lambda one: one.excess)
        return f"no cluster of up to {most_nodes} nodes that was tried keeps {promised}; nearest: {_line(last)}"
    lines = [f"{_line(plan.chosen)} keeps {promised}"]
    busiest = ", ".join(f"{name} {part:.0%}" for name, part in plan.chosen.uses[:3])
    lines.append(f"most used: {busiest}")
    for kind, one in (("prefill", plan.next_prefill), ("decode", plan.next_decode)):
        if one is not None:
            lines.append(f"more {kind} nodes: {_line(one)}")
    return "\n".join(lines)


def _line(trial: Trial) -> str:
    times = ", ".join(f"{name.upper()} {seconds:.3f} s" for name, seconds in trial.times.items())
    return f"{trial.prefill}P{trial.decode}D: {times}"


def _simulate(config: SimConfig, slo: Mapping[str, float], prefill: int, decode: int) -> Trial:
    cluster = msgspec.structs.replace(config.cluster, prefill_nodes=prefill, decode_nodes=decode)
    report = run_simulation(msgspec.structs.replace(config, cluster=cluster))
    for name in slo:
        if not report[f"{name}_s"]:
            raise ConfigError(f"--slo {name}: no request of this load has a {name.upper()}")
    times = {name: report[f"{name}_s"]["mean"] for name in slo}
    return Trial(prefill, decode, times, max(times[name] / slo[name] for name in slo), _uses(report))


def _uses(report: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    uses = {
        f"{name} {direction}": carried["utilisation"]
        for name, directions in report["nics"]["kinds"].items()
        for direction, carried in directions.items()
    }
    uses["prefill engines"] = report["engines"]["prefill_busy"]
    uses["decode memory"] = report["engines"]["decode_memory_promised"]
    return tuple(sorted(uses.items(), key=lambda item: -item[1]))
