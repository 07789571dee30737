"""Matrix products of rows sorted by group with one matrix a group, and the permutation around them."""

from pallas_kernels.grouped_matmul.api import gated_grouped_matmul, grouped_matmul
from pallas_kernels.grouped_matmul.permutation import combine, dispatch

__all__ = ["combine", "dispatch", "gated_grouped_matmul", "grouped_matmul"]
