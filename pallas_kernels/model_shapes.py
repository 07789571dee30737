"""Attention heads of the models that the named workloads are taken from."""

from typing import Any

LLAMA_8B: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}  # Llama-3.1-8B and Qwen3-8B
QWEN_MOE: dict[str, Any] = {"q_heads": 32, "kv_heads": 4, "head_dim": 128}  # Qwen3-30B-A3B
BASE: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}  # shipped, as is the MoE
SMALL: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 32}  # shipped
