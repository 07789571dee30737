"""What a simulated run gave, request by request, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxdual.scheduling.plan import SequenceState

_PERCENTS = (50, 95, 99)


@dataclass(slots=True)
class Outcome:
    """What a run gave, in seconds.

    Attributes:
      ttft, tpot: of each request, the latter without those of one token.
      waited: from each request's arrival to the step that took it in first.
      seconds: from the first arrival to the last token.
      tokens: given.
      aged: requests that have reached the age limit of shortest-first queues.
      probed_tokens, hit_tokens: of prompts, looked up in the prefix cache at first admission, and found.
      probed_blocks, hit_blocks: the same in whole blocks.
      branches: how often each rule has chosen an engine.
      full_share: part of the time in which some engine's KV memory was used by 90 % or more.
    """

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    waited: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    relocations: int = 0
    aged: int = 0
    probed_tokens: int = 0
    hit_tokens: int = 0
    probed_blocks: int = 0
    hit_blocks: int = 0
    imbalance: float = 1.0
    full_share: float = 0.0
    branches: dict[str, int] = field(default_factory=dict)

    def started(self, sequence: SequenceState, now: float, page: int) -> None:
        """A request has given its first token."""
        self.ttft.append(now - sequence.arrival)
        found = sequence.cached or 0
        self.hit_tokens += found
        self.hit_blocks += found // page
        if sequence.use_cache:
            self.probed_tokens += sequence.prompt_length
            self.probed_blocks += (sequence.prompt_length - 1) // page

    def ended(self, output: int, since_first: float) -> None:
        """A request has given its last token."""
        self.tokens += output
        if output > 1:
            self.tpot.append(since_first / (output - 1))

    def figures(self) -> dict[str, Any]:
        """Means, percentiles and counts, for a report."""
        return {
            **_summary("ttft", self.ttft),
            **_summary("tpot", self.tpot),
            "waited_mean_s": float(np.mean(list(self.waited.values()))),
            "waited_most_s": max(self.waited.values()),
            "tokens_per_s": self.tokens / self.seconds,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "relocations": self.relocations,
            "aged": self.aged,
            "imbalance": self.imbalance,
            "kv_full_share": self.full_share,
            "probed_tokens": self.probed_tokens,
            "hit_tokens": self.hit_tokens,
            "probed_blocks": self.probed_blocks,
            "hit_blocks": self.hit_blocks,
            "branches": dict(self.branches),
        }


def _summary(name: str, seconds: Sequence[float]) -> dict[str, float]:
    percentiles = np.percentile(seconds, _PERCENTS)
    return {
        f"{name}_s": float(np.mean(seconds)),
        **{f"{name}_p{percent}_s": float(value) for percent, value in zip(_PERCENTS, percentiles, strict=True)},
        f"{name}_most_s": max(seconds),
    }
