"""The device that a kernel is compiled for, how, and the layout in its shared memory that all of them use."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)

# Kinds of sm_90 for programs that are compiled where no such device is: an abstract device says no compute capability.
_HOPPER_KINDS = ("H100", "H200", "H800", "H20", "GH200")


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU: its kind as JAX names it, for example "NVIDIA H200", and its number of multiprocessors."""

    kind: str
    multiprocessors: int


def hopper() -> Target:
    """The sm_90 GPU that the program being traced is for.

    That is the abstract device of the mesh in use if it has one, else the default device.

    Raises:
      NotImplementedError: it is another device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        if abstract.platform in ("cuda", "gpu") and any(kind in abstract.device_kind for kind in _HOPPER_KINDS):
            return Target(abstract.device_kind, abstract.num_cores)
        raise NotImplementedError(f"needs an NVIDIA GPU of compute capability 9.0, not {abstract.device_kind}")
    device = jax.config.jax_default_device or jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        name = getattr(device, "device_kind", device)
        raise NotImplementedError(f"needs an NVIDIA GPU of compute capability 9.0, not {name}")
    return Target(device.device_kind, device.core_count)


def swizzled(columns: int, rows: int = 8) -> tuple[Any, ...]:
    """Layout in shared memory, for numbers of two bytes, that TMA writes and wgmma reads; one of all its operands.

    Args:
      columns: 16, 32 or 64, a divisor of the rows of each operand.
      rows: 8 for wgmma; 1 where copies begin at any row.
    """
    return plgpu.TilingTransform((rows, columns)), plgpu.SwizzleTransform(columns * 2)
