"""Interleaved Head Attention of chunks of prompts over paged raw keys and values, a cached prefix included."""

from pallas_kernels.iha_prefill.api import iha_prefill

__all__ = ["iha_prefill"]
