"""Matrix products with weights of which square blocks are there, as many for every block of outputs."""

from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.packing import Blocks, block_bytes, check_block, pack_blocks, unpack_blocks

__all__ = ["Blocks", "block_bytes", "block_sparse_matmul", "check_block", "pack_blocks", "unpack_blocks"]
