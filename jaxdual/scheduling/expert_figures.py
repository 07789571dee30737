"""What a placement of experts is worth: balance, the paper's cut, copies of tokens that travel, experts at work.

Arrays: loads `[layers, experts]`, transitions `[layers - 1, experts, experts]`, choices `[layers, tokens, k]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxdual.scheduling.experts import Placement


def device_loads(loads: np.ndarray, placement: Placement) -> np.ndarray:
    """Load `[layers, devices]` of each device in each layer, an expert's split evenly over its copies."""
    each = loads / placement.copies()
    by_slot = np.take_along_axis(each, placement.experts, axis=1)
    return by_slot.reshape(len(loads), placement.devices, -1).sum(axis=2)


def imbalance(loads: np.ndarray, placement: Placement) -> np.ndarray:
    """The busiest device's load by the mean, of each layer (phi, `[layers]`); 1 where a layer has no load."""
    by_device = device_loads(loads, placement)
    mean = by_device.mean(axis=1)
    return np.where(mean > 0, by_device.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)


def cut(transitions: np.ndarray, placement: Placement) -> float:
    """Part of all transitions between neighbouring layers whose experts lie on different devices; 0 without any."""
    total = transitions.sum()
    if not total:
        return 0.0
    devices = placement.devices_of()
    apart = devices[:-1, :, None] != devices[1:, None, :]
    return float((transitions * apart).sum() / total)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of tokens that engines send to experts, layer by layer.

    Attributes:
      remote_copies: copies of a token that leave its engine's device for a layer, on average: one for each other device
        that holds a chosen expert.
      active_experts: distinct experts at work on the device that has most, on average over layers and steps.
    """

    remote_copies: float
    active_experts: float


def traffic(choices: np.ndarray, homes: np.ndarray, placement: Placement) -> Traffic:
    """Traffic of one step; of several copies of an expert, tokens take one after another.

    Args:
      choices: experts of each token in each layer.
      homes: `[tokens]` device of each token's engine.
    """
    layers, tokens, _ = choices.shape
    slots, copies = placement.slots_of()
    layer, token = np.arange(layers)[:, None, None], np.arange(tokens)[:, None]
    device_of = placement.device_of_slot[slots[layer, choices, token % copies[layer, choices]]]
    touched = np.zeros((layers, tokens, placement.devices), bool)
    np.put_along_axis(touched, device_of, True, axis=2)
    touched[:, np.arange(tokens), homes] = False
    at_work = np.zeros((layers, placement.devices, placement.num_experts), bool)
    at_work[layer, device_of, choices] = True
    most = at_work.sum(axis=2).max(axis=1)
    return Traffic(float(touched.sum() / (layers * tokens)), float(most.mean()))


def transitions_of(choices: np.ndarray, experts: int) -> np.ndarray:
    """Counts `[layers - 1, experts, experts]`: for each token all pairs of its experts in neighbouring layers."""
    layers, _, k = choices.shape
    counts = np.zeros((max(layers - 1, 0), experts * experts), np.int64)
    for gap in range(layers - 1):
        before = np.repeat(choices[gap].astype(np.int64), k, axis=1)
        after = np.tile(choices[gap + 1].astype(np.int64), (1, k))
        counts[gap] = np.bincount((before * experts + after).ravel(), minlength=experts * experts)
    return counts.reshape(-1, experts, experts)
