"""Experts placed by how likely a step has them at work, not by how many tokens choose them."""

from __future__ import annotations

import numpy as np

from jaxdual.scheduling.experts import Placement, pack, replicate

DECODE_TOKENS = 32  # of a step of all devices that only decodes, where nothing is known of it


def activity(loads: np.ndarray, tokens: float, step_tokens: float) -> np.ndarray:
    """Probability `[layers, experts]` that a step has an expert at work: `1 - (1 - p) ** step_tokens` where each token
    chooses it with probability p.

    Args:
      loads: tokens that chose each expert.
      tokens: that were routed.
      step_tokens: tokens of a step.
    """
    share = np.clip(loads / tokens, 0.0, 1.0) if tokens else np.zeros_like(loads, float)
    found: np.ndarray = 1.0 - (1.0 - share) ** step_tokens
    return found


def metro(
    loads: np.ndarray, tokens: float, devices: int, *, step_tokens: float = DECODE_TOKENS, redundant: int = 0
) -> Placement:
    """Balances how many distinct experts a device has at work in a step, not how many tokens.

    A step that decodes few tokens takes as long as reading the weights of the experts that they choose. METRO (arXiv
    2512.09277) balances those by choosing among the copies of an expert, token by token. Of it this has the objective
    only, and places experts by it: copies are given as `eplb` gives them, and packed by descending activity, of equal
    ones the busiest first. Only the abstract was at hand.

    Args:
      loads: `[layers, experts]` tokens that chose each.
      tokens: that were routed.
      devices: that share each layer's experts.
      step_tokens: tokens of a step, of all devices.
      redundant: slots of a layer beyond one for each expert.

    Raises:
      ValueError: sizes that can't be divided.
    """
    layers, experts = loads.shape
    slots = experts + redundant
    if slots % devices:
        raise ValueError(f"{slots} slots can't be divided by {devices} devices")
    placed = np.empty((layers, slots), np.int32)
    for layer in range(layers):
        held = replicate(loads[layer].astype(float), slots)
        each = loads[layer, held] / np.bincount(held, minlength=experts)[held]
        busiest_first = np.argsort(-each, kind="stable")
        device_of = np.empty(slots, np.int32)
        device_of[busiest_first] = pack(activity(each[busiest_first], tokens, step_tokens), devices)
        placed[layer] = held[np.argsort(device_of, kind="stable")]
    return Placement(placed, devices, experts)
