"""The systems that the paper compares, as settings of this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxdual.scheduling.read_side import ReadPolicy


@dataclass(frozen=True, slots=True)
class PathMode:
    """A system of the paper's comparison and ablation (DualPath 7.1 and Figure 12).

    Attributes:
      read: how the read side is chosen.
      by_load: engines are chosen by Algorithm 1 and the two decode phases; else in turn, whatever their load.
      layerwise: prefill engines hold the KV of a layer, not of all layers.
      quota: prefill batches are cut at the compute quota.
      transfers: KV really moves; without, all reads and copies are skipped, which bounds what any path can reach.
    """

    read: ReadPolicy
    by_load: bool = True
    layerwise: bool = True
    quota: bool = True
    transfers: bool = True


MODES: Mapping[str, PathMode] = {
    "basic": PathMode(ReadPolicy.PREFILL_ONLY, by_load=False, layerwise=False, quota=False),
    "layerwise": PathMode(ReadPolicy.PREFILL_ONLY, by_load=False, quota=False),
    "roundrobin": PathMode(ReadPolicy.ROUND_ROBIN, by_load=False, quota=False),
    "full": PathMode(ReadPolicy.SHORTER_QUEUE),
    "split": PathMode(ReadPolicy.SPLIT),
    "oracle": PathMode(ReadPolicy.NONE, transfers=False),
}
