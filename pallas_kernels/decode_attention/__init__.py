"""Attention of one query token a sequence over paged keys and values."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
