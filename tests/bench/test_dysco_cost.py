"""The models of what DySCO costs, by hand."""

import pytest

from bench.dysco_cost import Sizes, StepShape, byte_ratio, flop_ratio, kv_bytes, vanilla_bytes

KEYS = 131072
# 36 layers of 32 heads and 8 of keys and values, each of 128, hidden size 4096, SwiGLU of 12288, 151936 tokens.
QWEN3_8B = Sizes(
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    layer_weights=36 * (4096 * 128 * 80 + 3 * 4096 * 12288),
    head_weights=151936 * 4096,
    weight_bytes=2,
    kv_bytes=2,
)
LLAMA_8B = Sizes(
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    layer_weights=32 * (4096 * 128 * 80 + 3 * 4096 * 14336),
    head_weights=128256 * 4096,
    weight_bytes=2,
    kv_bytes=2,
)


def one(keys: int) -> StepShape:
    return StepShape(sequences=1, keys=keys, peeked=1, raised=1)


def test_published_models_at_128k() -> None:
    """Keys and values of 18 and 16 GiB, 34.5 and 32.2 GB a token; the first pass adds 67 and 61 %."""
    assert kv_bytes(QWEN3_8B, KEYS) == 18 * 2**30
    assert kv_bytes(LLAMA_8B, KEYS) == 16 * 2**30
    assert vanilla_bytes(QWEN3_8B, 1, KEYS) == pytest.approx(34.5e9, rel=2e-3)
    assert vanilla_bytes(LLAMA_8B, 1, KEYS) == pytest.approx(32.2e9, rel=2e-3)
    assert round(byte_ratio(QWEN3_8B, one(KEYS), 24, 16), 2) == 1.67
    assert round(byte_ratio(LLAMA_8B, one(KEYS), 19, 16), 2) == 1.61
    assert round(byte_ratio(QWEN3_8B, one(16384), 24, 16), 2) == 1.65


def test_a_small_model_by_hand() -> None:
    """2 layers of 10 weights, a head of 20, 4-byte numbers; keys and values of 5 keys are 2 * 2 * 3 * 4 * 5 = 240."""
    sizes = Sizes(
        layers=2, heads=2, kv_heads=1, head_dim=3, layer_weights=20, head_weights=20, weight_bytes=4, kv_bytes=4
    )
    assert vanilla_bytes(sizes, 3, 5) == 160 + 3 * 240
    peeked = StepShape(sequences=3, keys=5, peeked=2, raised=2)
    # Half of 80 bytes of layers; half of 240 for two; 5 keys of 4 + 8 bytes, and 5 bits in 2 layers, for two.
    assert byte_ratio(sizes, peeked, 0, 1) == pytest.approx(1 + (40 + 240 + 120 + 2.5) / 880)
    # A token: 2 * 40 of weights and 4 * 2 * 2 * 3 * 5 of attention; half of 2 * 20 and of the same for two.
    assert flop_ratio(sizes, peeked, 0) == pytest.approx(1 + 2 * (20 + 120) / (3 * (80 + 240)))
    passed = StepShape(sequences=3, keys=5, peeked=0, raised=3)
    assert byte_ratio(sizes, passed, 0, 1) == pytest.approx(1 + 3 * (60 + 1.25) / 880)
    assert flop_ratio(sizes, passed, 0) == 1
    sometimes = StepShape(sequences=3, keys=5, peeked=3, raised=0, every=4)
    assert byte_ratio(sizes, sometimes, 0, 1) == pytest.approx(1 + (40 + 360) / 4 / 880)
    assert flop_ratio(sizes, sometimes, 0) == pytest.approx(1 + 3 * (20 + 120) / 4 / (3 * (80 + 240)))
