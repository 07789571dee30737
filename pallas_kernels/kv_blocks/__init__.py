"""Moves Full Blocks and Layer Blocks between the arena and staging buffers."""

from pallas_kernels.kv_blocks.api import gather_blocks, scatter_blocks

__all__ = ["gather_blocks", "scatter_blocks"]
