"""Figures of what routers choose: uneven loads, pairs that follow each other, and what placements make of them.

Layers are those with experts, by their numbers in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdual.scheduling.expert_figures import cut, imbalance
from jaxdual.scheduling.expert_policies import RouterWindow, expert_policy
from jaxdual.scheduling.experts import Placement, Pool, build_pool, linear_placement

PLACEMENTS = ("linear", "eplb", "edr")
_LISTED = 5  # of the most skewed layers, and of the most frequent pairs


def relative_loads(window: RouterWindow) -> np.ndarray:
    """Load `[layers, experts]` of each expert by the mean of its layer."""
    activations = window.activations.astype(float)
    relative: np.ndarray = activations / activations.mean(axis=1, keepdims=True)
    return relative


def pair_shares(window: RouterWindow) -> np.ndarray:
    """Part `[layers - 1, experts, experts]` of all tokens that chose expert i in a layer and j in the next one.

    Raises:
      ValueError: transitions were not counted.
    """
    shares: np.ndarray = _transitions(window) / window.tokens
    return shares


def pools(window: RouterWindow, devices: int) -> dict[str, Pool]:
    """Pools by what makes them: "threshold" pairs of at least `PAIR_SHARE` of all tokens, "top" the `TOP_EDGES` most
    frequent ones, both of any size; "edr" what is pinned where a layer's experts are shared by `devices`.

    Raises:
      ValueError: transitions were not counted.
    """
    transitions, tokens = _transitions(window), window.tokens
    experts = transitions.shape[1]
    return {
        "threshold": build_pool(transitions, tokens, experts, top_edges=0),
        "top": build_pool(transitions, tokens, experts, share=float("inf")),
        "edr": build_pool(transitions, tokens, experts // devices),
    }


def placement_of(name: str, window: RouterWindow, devices: int) -> Placement:
    """One of `PLACEMENTS`, as it is made of these choices."""
    layers, _, experts = window.sources.shape
    policy = expert_policy(name, devices, profile=window)
    return linear_placement(layers, experts, devices) if policy is None else policy(window)


def figures(window: RouterWindow, layers: Sequence[int], devices: int) -> dict[str, Any]:
    """Figures of one workload, as JSON data.

    Args:
      layers: numbers of the window's layers.
      devices: that would share each layer's experts.
    """
    loads, shares = relative_loads(window), pair_shares(window)
    busiest = np.argsort(-loads.max(axis=1), kind="stable")[:_LISTED].tolist()
    frequent = np.argsort(-shares.reshape(-1), kind="stable")[:_LISTED]
    pairs = zip(*(axis.tolist() for axis in np.unravel_index(frequent, shares.shape)), strict=True)
    return {
        "tokens": window.tokens,
        "relative_loads": loads.tolist(),
        "most_skewed": [
            {"layer": layers[row], "expert": int(loads[row].argmax()), "load": float(loads[row].max())}
            for row in busiest
        ],
        "pairs": [
            {
                "layers": [layers[gap], layers[gap + 1]],
                "experts": [before, after],
                "share": float(shares[gap, before, after]),
            }
            for gap, before, after in pairs
        ],
        "pools": {name: _of_pool(pool) for name, pool in pools(window, devices).items()},
        "placements": {name: _worth(placement_of(name, window, devices), window) for name in PLACEMENTS},
    }


def comparison(first: RouterWindow, second: RouterWindow, devices: int) -> dict[str, Any]:
    """How two workloads differ, as JSON data: correlation of each layer's loads (None where one is even), experts in
    either and in both of their pools, and what placements made of one are worth for the other.

    Args:
      devices: see `figures`.
    """
    both = zip(pools(first, devices).items(), pools(second, devices).values(), strict=True)
    return {
        "correlation": [
            _correlation(one, other) for one, other in zip(first.activations, second.activations, strict=True)
        ],
        "pools": {
            name: {
                "both": int((one.experts & other.experts).sum()),
                "either": int((one.experts | other.experts).sum()),
            }
            for (name, one), other in both
        },
        "placements": {
            "of_second_for_first": _worths(second, first, devices),
            "of_first_for_second": _worths(first, second, devices),
        },
    }


def _transitions(window: RouterWindow) -> np.ndarray:
    if window.transitions is None:
        raise ValueError("figures of pairs need transitions, which were not counted")
    return window.transitions


def _of_pool(pool: Pool) -> dict[str, Any]:
    by_layer = pool.experts.sum(axis=1)
    return {
        "pairs": pool.edges,
        "experts": int(by_layer.sum()),
        "most_in_a_layer": int(by_layer.max()),
        "rarest_share": pool.threshold,
    }


def _worths(made_of: RouterWindow, judged_by: RouterWindow, devices: int) -> Mapping[str, Any]:
    return {name: _worth(placement_of(name, made_of, devices), judged_by) for name in PLACEMENTS if name != "linear"}


def _worth(placement: Placement, window: RouterWindow) -> dict[str, Any]:
    uneven = imbalance(window.activations, placement)
    return {
        "imbalance": {"mean": float(uneven.mean()), "worst": float(uneven.max()), "by_layer": uneven.tolist()},
        "cut": cut(_transitions(window), placement),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    return None if np.ptp(one) == 0 or np.ptp(other) == 0 else float(np.corrcoef(one, other)[0, 1])
