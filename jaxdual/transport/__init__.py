"""Moves bytes between processes: one interface, several carriers, two classes of traffic."""

from jaxdual.transport.base import (
    Channel,
    Completed,
    Event,
    Op,
    Peer,
    PeerLost,
    Received,
    Region,
    RemoteRegion,
    Status,
    Ticket,
    TrafficClass,
    Transport,
)
from jaxdual.transport.shaped import ShapedTransport
from jaxdual.transport.shaping import Direction, Nic, TokenBucket
from jaxdual.transport.shm import ShmTransport
from jaxdual.transport.slab import SharedSlab
from jaxdual.transport.tcp import TcpSettings, TcpTransport

__all__ = [
    "Channel",
    "Completed",
    "Direction",
    "Event",
    "Nic",
    "Op",
    "Peer",
    "PeerLost",
    "Received",
    "Region",
    "RemoteRegion",
    "ShapedTransport",
    "SharedSlab",
    "ShmTransport",
    "Status",
    "TcpSettings",
    "TcpTransport",
    "Ticket",
    "TokenBucket",
    "TrafficClass",
    "Transport",
]
