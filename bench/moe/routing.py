"""Choices of routers, drawn from a model of topics: skewed in some layers, and linked from layer to layer.

Stands in where no trace of a real router is given: a token has one of 16 topics; an expert's logit is its layer's
popularity (wider in the layers that arXiv 2602.21626 found skewed), the topic's liking for it, and Gumbel noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from jaxdual.scheduling.expert_figures import transitions_of
from jaxdual.scheduling.expert_policies import RouterWindow, expert_policy
from jaxdual.scheduling.experts import Placement, linear_placement

LAYERS, EXPERTS, TOP_K = 48, 128, 8
SKEWED_LAYERS = (16, 18, 44, 45, 46)
_TOPICS = 16


@dataclass(frozen=True, slots=True, eq=False)
class RouterTrace:
    """Experts that tokens chose, `[layers, tokens, k]`."""

    choices: np.ndarray
    experts: int

    def window(self, devices: int) -> RouterWindow:
        """All of it, as an engine's counters would show it; tokens come from devices in turn."""
        layers, tokens, _ = self.choices.shape
        sources = np.zeros((layers, devices, self.experts), np.int64)
        for layer in range(layers):
            for device in range(devices):
                of_device = self.choices[layer, device::devices].ravel()
                sources[layer, device] = np.bincount(of_device, minlength=self.experts)
        return RouterWindow(tokens, sources, transitions_of(self.choices, self.experts))


def draw_trace(
    tokens: int,
    seed: int,
    *,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    skew: float = 1.0,
    tilt: float = 0.0,
) -> RouterTrace:
    """Tokens of one model: its popularities and likings are the same for every seed.

    Args:
      skew: factor on the spread of popularities.
      tilt: standard deviation over layers of how much more popular the first half of the experts is, as logits.
    """
    model = np.random.default_rng(0)
    spread = np.where(np.isin(np.arange(layers), SKEWED_LAYERS), 1.6, 0.6)
    popularity = skew * model.normal(0, spread[:, None], (layers, experts))
    liking = model.normal(0, 1.5, (layers, _TOPICS, experts))
    popularity[:, : experts // 2] += tilt * model.normal(size=(layers, 1))
    rng = np.random.default_rng((seed, 1))
    topics = rng.integers(0, _TOPICS, tokens)
    choices = np.empty((layers, tokens, top_k), np.int16)
    for layer in range(layers):
        logits = popularity[layer] + liking[layer][topics] + rng.gumbel(size=(tokens, experts))
        choices[layer] = np.argpartition(-logits, top_k, axis=1)[:, :top_k]
    return RouterTrace(choices, experts)


@cache
def place(policy: str, devices: int, profile: RouterTrace) -> Placement:
    """Experts as a policy places them by a profile."""
    layers = len(profile.choices)
    seen = profile.window(devices)
    chosen = expert_policy(policy, devices, profile=seen)
    return linear_placement(layers, profile.experts, devices) if chosen is None else chosen(seen)


@cache
def load_sums(trace: RouterTrace, policy: str, devices: int, profile: RouterTrace) -> np.ndarray:
    """Load `[tokens + 1, layers, devices]` of the first so many tokens of a trace, experts being placed by a profile.

    Of several copies of an expert, each takes its part.
    """
    layers = len(trace.choices)
    placement = place(policy, devices, profile)
    share = placement.device_shares()
    loads = np.stack([share[layer][trace.choices[layer]].sum(axis=1) for layer in range(layers)], axis=1)
    return np.concatenate([np.zeros((1, *loads.shape[1:])), np.cumsum(loads, axis=0)])


class StepImbalance:
    """How uneven the devices' experts are loaded in a step of so many tokens, which come from a trace in turn.

    Args:
      sums: of the trace's loads, from `load_sums`.
    """

    def __init__(self, sums: np.ndarray) -> None:
        self._sums, self._tokens, self._at = sums, len(sums) - 1, 0
        self._mean = float(sums[-1, 0].mean()) / self._tokens  # load of a device for each token, in every layer

    def next(self, tokens: int) -> float:
        """Mean over layers of the busiest device's load by the mean, of the next tokens."""
        if not tokens:
            return 1.0
        rounds, rest = divmod(tokens, self._tokens)
        end = self._at + rest
        loads = self._sums[min(end, self._tokens)] - self._sums[self._at] + rounds * self._sums[-1]
        if end > self._tokens:
            loads = loads + self._sums[end - self._tokens]
        self._at = end % self._tokens
        return float(loads.max(axis=1).mean()) / (self._mean * tokens)
