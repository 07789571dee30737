"""Which GPUs each engine of a cluster on this machine takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def devices_of(first: int, count: int, environment: Mapping[str, str], devices: Path = Path("/dev")) -> dict[str, str]:
    """What an engine's environment has in addition: GPUs of its own, in order; none where there is none.

    Engines share GPUs where there are fewer of these. Their memory must then be divided by `gpu_memory_utilization`.

    Args:
      first: how many the engines before it take.
      count: how many it takes.
      environment: of this process, which may name the GPUs that are to be used.
      devices: where this machine lists what it has.
    """
    if _VISIBLE in environment:
        gpus = [name.strip() for name in environment[_VISIBLE].split(",") if name.strip()]
    else:
        found = (re.fullmatch(r"nvidia(\d+)", path.name) for path in devices.glob("nvidia*"))
        gpus = [str(index) for index in sorted(int(match[1]) for match in found if match)]
    taken = [gpus[number % len(gpus)] for number in range(first, first + count)] if gpus else []
    return {_VISIBLE: ",".join(dict.fromkeys(taken))} if taken else {}
