"""Configuration texts that give the model's traffic the network's priority over KV.

`python -m jaxdual.transport.qos --fabric infiniband|roce [--out FILE]`. For InfiniBand these are options of OpenSM with
the arbitration of the DualPath paper's appendix A.1: lane 2, KV's, has no weight in the high-priority table and one
packet's at a time in the low one, which gets a turn after 240 * 4096 bytes of the others. With the others saturated
that leaves it under a percent; it takes what they leave idle. For RoCE v2 the paper names the mechanism only (code
points to four lossless classes, weights); the numbers here are a starting point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdual.transport.base import TrafficClass
from jaxdual.transport.lanes import DSCP, LANES, SERVICE_LEVEL

_SERVICE_LEVELS = 16
_PRIORITIES = 8
_HIGH_LIMIT = 240  # of 4096 bytes each
_WEIGHT = 192  # of 64 bytes each
_KV_WEIGHT = 64  # 4096 bytes: one packet of the largest MTU
_KV_SHARE = 1  # percent


def infiniband() -> str:
    """Options for `opensm.conf`."""
    (kv,) = (lane for lane in LANES if lane.traffic is TrafficClass.KV)
    high = ",".join(f"{lane.virtual_lane}:{0 if lane is kv else _WEIGHT}" for lane in LANES)
    low = ",".join(f"{lane.virtual_lane}:{_KV_WEIGHT if lane is kv else _WEIGHT}" for lane in LANES)
    lanes = {lane.service_level: lane.virtual_lane for lane in LANES}
    levels = ",".join(str(lanes.get(level, kv.virtual_lane)) for level in range(_SERVICE_LEVELS))
    return f"""\
# OpenSM: virtual lane {kv.virtual_lane} is KV's, of low priority; the others are the model's.
# Service levels that nobody here uses go to KV's lane. Restart OpenSM, then check with smpquery sl2vl and vlarb.
# Collectives: NCCL_IB_SL={SERVICE_LEVEL[TrafficClass.MODEL]}.
# KV transfers: service level {SERVICE_LEVEL[TrafficClass.KV]}.
qos TRUE
qos_max_vls {len(LANES)}
qos_high_limit {_HIGH_LIMIT}
qos_vlarb_high {high}
qos_vlarb_low {low}
qos_sl2vl {levels}
"""


def roce() -> str:
    """A shell script for each host's NIC, whose comments say what the switches need."""
    lossless = {lane.priority for lane in LANES}
    kv = {lane.priority for lane in LANES if lane.traffic is TrafficClass.KV}
    shares = _shares(sorted(lossless - kv), sorted(kv))
    flags = ",".join(str(int(priority in lossless)) for priority in range(_PRIORITIES))
    classes = ",".join(str(priority) for priority in range(_PRIORITIES))
    weights = ",".join(str(shares[priority]) for priority in range(_PRIORITIES))
    lines = [
        "#!/bin/sh -eu",
        "# RoCE v2: code points to lossless classes, weights. Usage: $0 NETDEV RDMADEV, as root, on each host.",
        "# Switches: the same code points, the same priorities lossless (PFC), the same weights on every port.",
        "# Adapt the weights to the fabric: they are a template, not measured.",
        'netdev="$1"',
        'rdmadev="$2"',
        'mlnx_qos -i "$netdev" --trust dscp',
    ]
    for lane in LANES:
        lines.append(f"# {lane.traffic.name}: DSCP {lane.dscp}, traffic class byte {lane.dscp << 2}")
        lines.append(f'mlnx_qos -i "$netdev" --dscp2prio set,{lane.dscp},{lane.priority}')
    lines += [
        f'mlnx_qos -i "$netdev" --prio_tc {classes}',
        f'mlnx_qos -i "$netdev" --pfc {flags}',
        f'mlnx_qos -i "$netdev" --tsa {",".join(["ets"] * _PRIORITIES)} --tcbw {weights}',
        "# Connections made by rdma_cm, unless they say otherwise, are KV's.",
        f'cma_roce_tos -d "$rdmadev" -t {DSCP[TrafficClass.KV] << 2}',
        f"# Collectives: NCCL_IB_TC={DSCP[TrafficClass.MODEL] << 2}.",
        f"# KV transfers: traffic class {DSCP[TrafficClass.KV] << 2}.",
    ]
    return "\n".join(lines) + "\n"


def _shares(model: list[int], kv: list[int]) -> dict[int, int]:
    """Percent of each priority: KV's and everything else's are small, the model's share the rest; 100 together."""
    shares = {priority: _KV_SHARE if priority in kv or priority == 0 else 0 for priority in range(_PRIORITIES)}
    left = 100 - sum(shares.values())
    for index, priority in enumerate(model):
        shares[priority] = left // (len(model) - index)
        left -= shares[priority]
    return shares


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the configuration; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxdual.transport.qos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fabric", choices=("infiniband", "roce"), required=True)
    parser.add_argument("--out", metavar="FILE", help="standard output if left out")
    options = parser.parse_args(arguments)
    text = infiniband() if options.fabric == "infiniband" else roce()
    if options.out is None:
        sys.stdout.write(text)
    else:
        Path(options.out).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
