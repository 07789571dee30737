"""Attention heads of the models that the named workloads are taken from."""

from typing import Any

LLAMA_8B: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}  # Llama-3.1-8B and Qwen3-8B
QWEN_MOE: dict[str, Any] = {"q_heads": 32, "kv_heads": 4, "head_dim": 128}  # Qwen3-30B-A3B
MHA_8: dict[str, Any] = {"q_heads": 8, "kv_heads": 8, "head_dim": 64}
MHA_16: dict[str, Any] = {"q_heads": 16, "kv_heads": 16, "head_dim": 64}
MHA_20: dict[str, Any] = {"q_heads": 20, "kv_heads": 20, "head_dim": 128}  # of the 2.4B model of arXiv 2602.21371
BASE: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}  # shipped, as is the MoE
SMALL: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 32}  # shipped
