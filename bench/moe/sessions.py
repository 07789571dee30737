"""Users who come back: conversations like ShareGPT's, with prefixes kept, for the choice of an engine by user.

Every run has the same conversations; only when they begin differs from run to run. A user is a conversation, as the
data set has no users. Most conversations have one turn, so that few prompts are found in the cache, as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bench.moe.arms import SESSION_ARMS, Arm
from bench.moe.campaign import router_trace, run_all
from bench.moe.simulation import Cluster, simulate
from bench.moe.workload import Arrival
from bench.report import table

REQUESTS = 10_000
RATE = 1.4  # requests a second
SEVERAL_TURNS = 0.001  # of conversations: engines in turn then find about as much as published
TURNS = (2, 10)
THINK_SECONDS = 30.0
_TOKEN_SECONDS = 0.06  # that an answer takes, before its reader thinks
_VOCABULARY = 32_000


@dataclass(frozen=True, slots=True)
class Conversation:
    """New tokens and answers of each turn, and seconds from the turn before."""

    user: str
    texts: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    gaps: tuple[float, ...]


@cache
def conversations(requests: int, several: float = SEVERAL_TURNS) -> tuple[Conversation, ...]:
    """Conversations of so many turns in all, the same at every call.

    Args:
      several: part of them that have 2 to 10 turns; all others have one.
    """
    rng, made, left = np.random.default_rng(12), [], requests
    while left:
        turns = min(int(rng.integers(TURNS[0], TURNS[1] + 1)) if rng.random() < several else 1, left)
        left -= turns
        lengths = np.clip(np.exp(rng.normal(math.log(60), 1.0, turns)), 4, 2000).astype(int)
        answers = np.clip(np.exp(rng.normal(math.log(170), 0.8, turns)), 2, 2000).astype(int)
        texts = tuple(tuple(rng.integers(1, _VOCABULARY, length).tolist()) for length in lengths)
        gaps = np.concatenate([[0.0], rng.exponential(THINK_SECONDS, turns - 1) + _TOKEN_SECONDS * answers[:-1]])
        made.append(Conversation(f"user {len(made)}", texts, tuple(answers.tolist()), tuple(gaps.tolist())))
    return tuple(made)


def session_arrivals(requests: int, rate: float, seed: int, several: float = SEVERAL_TURNS) -> list[Arrival]:
    """The conversations' turns; those of `seed` begin at Poisson times of their own, in the same order.

    A turn's prompt is all that was said before, answers as the simulation gives them, and its new text.
    """
    of = conversations(requests, several)
    rng = np.random.default_rng((seed, 12))
    begins = np.cumsum(rng.exponential(requests / rate / len(of), len(of)))
    turns = []
    for conversation, begin in zip(of, begins, strict=True):
        said: list[int] = []
        at = float(begin)
        for text, answer, gap in zip(conversation.texts, conversation.answers, conversation.gaps, strict=True):
            at += gap
            said = [*said, *text]
            turns.append(Arrival(at, len(said), answer, conversation.user, said))
            said = [*said, *([0] * answer)]
    return sorted(turns, key=lambda turn: turn.time)


@dataclass(frozen=True, slots=True)
class SessionCase:
    """One simulation of the affinity test."""

    arm: Arm
    seed: int
    requests: int = REQUESTS


def run_sessions(case: SessionCase) -> dict[str, Any]:
    """Figures of one simulation, and which it is."""
    cluster = Cluster(prefix_caching=True)
    served, profile = (router_trace(seed, 1.0, 0.0) for seed in (0, 1))
    requests = session_arrivals(case.requests, RATE, case.seed)
    return {"arm": case.arm.name, "seed": case.seed} | simulate(cluster, case.arm, requests, served, profile).figures()


def session_report(pool: Executor, seeds: int, requests: int = REQUESTS) -> dict[str, Any]:
    """Prefix hits of each arm over runs, printed and returned."""
    cases = [SessionCase(arm, seed, requests) for seed in range(seeds) for arm in SESSION_ARMS]
    runs = run_all(pool, run_sessions, cases)
    rows = [hit_row(runs, arm.name, SESSION_ARMS[0].name) for arm in SESSION_ARMS]
    print("prefix hits; the paper has +2.9 % hits, 3.64 to 3.80 % of what is looked up, and no variance")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    return {
        "requests": requests,
        "rate": RATE,
        "several_turns": SEVERAL_TURNS,
        "cluster": dataclasses.asdict(Cluster(prefix_caching=True)),
        "summary": rows,
        "runs": [{name: one[name] for name in _KEPT} for one in runs],
    }


_KEPT = ("arm", "seed", "hit_tokens", "hit_blocks", "probed_tokens", "probed_blocks", "ttft_s", "tpot_s", "branches")


def hit_row(runs: Sequence[dict[str, Any]], arm: str, baseline: str) -> dict[str, Any]:
    """An arm's prefix hits: means over runs, their spread, and the gain over the baseline."""
    of_arm, of_base = ([one for one in runs if one["arm"] == name] for name in (arm, baseline))
    blocks, base = (np.array([one["hit_blocks"] for one in group], float) for group in (of_arm, of_base))
    mean = {name: float(np.mean([one[name] for one in of_arm])) for name in _KEPT[2:6]}
    return {
        "arm": arm,
        "hits, blocks": round(float(blocks.mean()), 1),
        "deviation": round(float(blocks.std(ddof=1)), 1) if len(blocks) > 1 else 0.0,
        "probes, blocks": round(mean["probed_blocks"]),
        "rate": f"{mean['hit_blocks'] / mean['probed_blocks']:.2%}",
        "hits, tokens": round(mean["hit_tokens"]),
        "probes, tokens": round(mean["probed_tokens"]),
        "rate of tokens": f"{mean['hit_tokens'] / mean['probed_tokens']:.2%}",
        "gain": f"{blocks.mean() / base.mean() - 1:+.1%}",
        "TTFT, ms": round(1000 * float(np.mean([one["ttft_s"] for one in of_arm])), 1),
    }
