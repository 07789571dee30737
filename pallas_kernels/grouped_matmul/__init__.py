"""Matrix products of rows sorted by group with one matrix a group, and the permutation around them."""

from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul
from pallas_kernels.grouped_matmul.permutation import combine, dispatch

__all__ = ["IMPLEMENTATIONS", "combine", "dispatch", "grouped_matmul"]
