"""Operating points: what is simulated, before the factor on all times is fitted to the baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.moe.simulation import Cluster

_TIGHT_TOKENS = {"random": 24_000, "central": 58_000, "descending": 45_000, "two_end": 65_000, "average": 65_000}


@dataclass(frozen=True, slots=True)
class Point:
    """An operating point.

    Attributes:
      cluster: its constants.
      kv_tokens: of KV memory of an engine, by shape; the cluster's where left out.
      skew: factor on the spread of the experts' popularities.
      tilt: standard deviation over layers of how much more popular the first half of the experts is, as logits.
    """

    cluster: Cluster = field(default_factory=Cluster)
    kv_tokens: Mapping[str, int] = field(default_factory=dict)
    skew: float = 1.0
    tilt: float = 0.0

    def of_shape(self, shape: str, slow: float) -> Cluster:
        """The cluster for requests of a shape, with a factor on all times."""
        tokens = self.kv_tokens.get(shape, self.cluster.kv_tokens)
        return dataclasses.replace(self.cluster, kv_tokens=tokens, slow=slow)


# Times of a step by what they go with most: a cost of its own, the experts' tokens, or prompts.
_PROFILES = {
    "fixed": Cluster(),
    "mid": Cluster(expert_seconds=1e-4),
    "moe": Cluster(fixed_seconds=0.02, expert_seconds=2e-4),
    "prefill": Cluster(fixed_seconds=0.02, token_seconds=3e-4, expert_seconds=2e-4),
}


def make_point(profile: str, memory: float | None, tilt: float) -> Point:
    """A point of one of the profiles.

    Args:
      profile: "fixed", "mid", "moe" or "prefill".
      memory: KV memory by that of `kv_tight`, at least what the longest request takes; None for ample memory.
      tilt: of the routers.
    """
    tokens = {} if memory is None else {shape: max(int(memory * most), 22_000) for shape, most in _TIGHT_TOKENS.items()}
    return Point(_PROFILES[profile], tokens, tilt=tilt)


POINTS = {
    "kv_ample": make_point("fixed", None, 0.0),
    "kv_tight": make_point("fixed", 1.0, 0.0),
    "moe_bound": make_point("moe", 2.0, 0.25),
}
