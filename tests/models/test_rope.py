"""Rotary frequencies against the published formulas, written independently in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from models.config import RopeConfig
from models.rope import attention_factor, frequencies, rope_table, rotate

HEAD_DIM = 64


def plain(theta: float) -> list[float]:
    return [theta ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]


def llama3(theta: float, factor: float, low: float, high: float, original: int) -> list[float]:
    out = []
    for frequency in plain(theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            out.append(frequency)
        elif wavelength > original / low:
            out.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return out


def yarn(theta: float, factor: float, original: int, fast: float, slow: float) -> list[float]:
    def dimension(rotations: float) -> float:
        return HEAD_DIM * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), HEAD_DIM - 1)
    out = []
    for i, frequency in enumerate(plain(theta)):
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append(frequency / factor * ramp + frequency * (1 - ramp))
    return out


def test_default_frequencies() -> None:
    np.testing.assert_allclose(frequencies(RopeConfig(theta=5e5), HEAD_DIM), plain(5e5), rtol=1e-6)


def test_linear_frequencies() -> None:
    config = RopeConfig(type="linear", theta=1e4, factor=4.0)
    np.testing.assert_allclose(frequencies(config, HEAD_DIM), np.array(plain(1e4)) / 4, rtol=1e-6)


def test_llama3_frequencies_of_llama_3_1() -> None:
    config = RopeConfig(
        type="llama3",
        theta=5e5,
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1,
        high_freq_factor=4,
    )
    wanted = llama3(5e5, 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(frequencies(config, HEAD_DIM), wanted, rtol=1e-6)
    kept = np.isclose(wanted, plain(5e5))
    assert kept.any()
    assert not kept.all()


@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (16.0, 2.0)])
def test_yarn_frequencies_of_qwen3(fast: float, slow: float) -> None:
    config = RopeConfig(
        type="yarn", theta=1e6, factor=4.0, original_max_position_embeddings=32768, beta_fast=fast, beta_slow=slow
    )
    np.testing.assert_allclose(frequencies(config, HEAD_DIM), yarn(1e6, 4.0, 32768, fast, slow), rtol=1e-6)


def test_yarn_scales_cos_and_sin() -> None:
    config = RopeConfig(type="yarn", theta=1e6, factor=4.0, original_max_position_embeddings=32768)
    assert attention_factor(config) == pytest.approx(0.1 * math.log(4) + 1)
    cos, sin, _ = rope_table(config, HEAD_DIM, jnp.array([0, 7]))
    np.testing.assert_allclose(cos**2 + sin**2, attention_factor(config) ** 2, rtol=1e-5)
    assert attention_factor(RopeConfig()) == 1.0


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    config = RopeConfig(theta=100.0)
    x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    positions = np.array([0, 5, 1000])
    found = np.asarray(rotate(jnp.asarray(x), rope_table(config, 4, jnp.asarray(positions))))
    for t, position in enumerate(positions):
        for pair in range(2):
            turn = np.exp(1j * position * 100.0 ** (-pair / 2))
            wanted = (x[t, :, pair] + 1j * x[t, :, pair + 2]) * turn
            np.testing.assert_allclose(found[t, :, pair], wanted.real, atol=1e-4)
            np.testing.assert_allclose(found[t, :, pair + 2], wanted.imag, atol=1e-4)
    np.testing.assert_array_equal(found[0], x[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "longrope"}, "longrope"),
        ({"theta": 1.0}, "theta is 1.0"),
        ({"factor": 0.5}, "factor is 0.5"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"type": "yarn"}, "original_max_position_embeddings is None"),
        ({"type": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({"type": "yarn", "original_max_position_embeddings": 8, "attention_factor": 0.0}, "attention_factor is 0.0"),
    ],
)
def test_rope_values_out_of_range_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)
