"""How the network tells the classes of traffic apart.

The four virtual lanes are those of the DualPath paper's appendix A.1: three for the model's traffic, one, of low
priority, for KV. The paper prints neither service levels nor DSCP: those here are this project's, with the code points
that NICs map to the priority of the same name (DSCP / 8) as they come.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxdual.transport.base import TrafficClass


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane: InfiniBand virtual lane and service level, DSCP and priority of RoCE v2."""

    traffic: TrafficClass
    virtual_lane: int
    service_level: int
    dscp: int

    @property
    def priority(self) -> int:
        """Of priority flow control; also the hardware's traffic class."""
        return self.dscp // 8


LANES = (
    Lane(TrafficClass.MODEL, 0, 0, 26),
    Lane(TrafficClass.MODEL, 1, 1, 34),
    Lane(TrafficClass.KV, 2, 2, 10),
    Lane(TrafficClass.MODEL, 3, 3, 42),
)

# What a transport uses: the first lane of each class.
DSCP = {lane.traffic: lane.dscp for lane in reversed(LANES)}
SERVICE_LEVEL = {lane.traffic: lane.service_level for lane in reversed(LANES)}
