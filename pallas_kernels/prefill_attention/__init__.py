"""Causal attention of chunks of prompts over paged keys and values, a cached prefix included."""

from pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
