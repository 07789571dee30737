"""Matrix products with weights of which N of every M neighbouring inputs are there, stored without the others."""

from pallas_kernels.sparse_matmul.api import sparse_matmul
from pallas_kernels.sparse_matmul.packing import WORD, Packed, check_pattern, pack, packed_bytes, unpack

__all__ = ["WORD", "Packed", "check_pattern", "pack", "packed_bytes", "sparse_matmul", "unpack"]
