"""Makes what moves an engine's blocks: host memory that the KV agent shares, the agent, and the engine's side of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jaxdual.config import EngineConfig
from jaxdual.engine.runner import Runner
from jaxdual.engine.tier_copies import COPY_PAGES
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.transport.slab import SharedSlab

if TYPE_CHECKING:
    from jaxdual.agent.wire import Attach, GroupSlots
    from jaxdual.engine.cluster_part import ClusterPart
    from jaxdual.engine.transfers import Transfers

_ALIGNMENT = 4096  # of slots: files are read past the page cache into whole pages of memory


def host_memory(
    layout: KVLayout, memory: Sequence[GroupPages], *, shared: bool, ranks: int = 1
) -> tuple[tuple[np.ndarray, ...], SharedSlab | None]:
    """Blocks in host memory of each layer group, `[ranks * (host_pages + staging_pages), *block]`.

    Args:
      shared: in a slab that other processes can map, which comes with them; else in memory of this process.
    """
    dtype = jnp.dtype(layout.dtype)
    shapes = [
        (ranks * (pages.host_pages + pages.staging_pages), *layout.block_shape(group))
        for group, pages in enumerate(memory)
    ]
    if not shared:
        return tuple(np.zeros(shape, dtype) for shape in shapes), None
    sizes = [slot_bytes(layout, group) for group in range(len(memory))]
    slab = SharedSlab(sum(shape[0] * size for shape, size in zip(shapes, sizes, strict=True)))
    arrays, offset = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        inner = np.empty(shape[1:], dtype).strides
        arrays.append(np.ndarray(shape, dtype, buffer=slab.array, offset=offset, strides=(size, *inner)))
        offset += shape[0] * size
    return tuple(arrays), slab


def build_transfers(
    config: EngineConfig,
    part: ClusterPart | None,
    kv: KVManager,
    runner: Runner,
    memory: Sequence[GroupPages],
    host: Sequence[np.ndarray],
    slab: SharedSlab,
) -> Transfers:
    """Starts the KV agent on the configured store.

    Args:
      part: what the engine is to a cluster.
      host, slab: of `host_memory`.

    Raises:
      ConfigError: the store can't be opened.
    """
    # Messages to the agent need a package that an engine without a store does not.
    from jaxdual.agent.client import AgentProcess
    from jaxdual.agent.wire import GroupSlots
    from jaxdual.engine.transfers import Transfers

    groups, offset = list[GroupSlots](), 0
    for group, blocks in enumerate(host):
        size = slot_bytes(runner.device.layout, group)
        groups.append(GroupSlots(offset, size, runner.device.layout.full_block_bytes(group)))
        offset += len(blocks) * size
    attach = attach_message(config, part, groups)
    return Transfers(
        lambda: AgentProcess(attach, slab),
        kv,
        memory=memory,
        host=host,
        gather=runner.gather,
        most_pages=COPY_PAGES,
        places=groups,
        reads=config.kv_store is not None,
        load_timeout=config.kv_load_timeout,
        required=part is not None,
        clock=time.monotonic,
    )


def attach_message(config: EngineConfig, part: ClusterPart | None, groups: list[GroupSlots]) -> Attach:
    """What the KV agent of an engine is told first."""
    from jaxdual.agent.wire import Attach

    return Attach(
        config.kv_store or "",
        config.kv_store_capacity_bytes or 0,
        groups,
        config.kv_transport or "",
        config.kv_host or "127.0.0.1",
        (config.kv_secret or "").encode(),
        None if part is None else part.cards,
    )


def slot_bytes(layout: KVLayout, group: int) -> int:
    """From one staging slot of a layer group to the next."""
    return -(-layout.full_block_bytes(group) // _ALIGNMENT) * _ALIGNMENT
