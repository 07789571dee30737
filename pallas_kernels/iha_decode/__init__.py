"""Interleaved Head Attention of the newest token of each sequence over paged raw keys and values."""

from pallas_kernels.iha_decode.api import iha_decode

__all__ = ["iha_decode"]
