"""Dense attention with sliding windows against a plain float64 forward pass."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.attention import causal_attention
from tests.windowed_models import KINDS, WINDOW, config_of, reference_logits, write


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_plain_forward_pass(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    assert models.load_config(tmp_path) == config_of(name)
    tokens = np.random.default_rng(3).integers(0, 96, 3 * WINDOW + 5)
    want = reference_logits(tmp_path, config_of(name), tokens.tolist())
    found = models.load(tmp_path, dtype="float32").logits(tokens[None])[0]
    assert np.abs(found - want).max() <= 2e-4 * np.abs(want).max()


def test_the_window_changes_logits_from_its_first_hidden_key_on(tmp_path: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 96, (1, 2 * WINDOW))
    windowed, full = (
        models.load(write(name, tmp_path / name), dtype="float32").logits(tokens)[0]
        for name in ("mistral", "mistral_full")
    )
    np.testing.assert_array_equal(windowed[:WINDOW], full[:WINDOW])
    assert np.abs(windowed[WINDOW] - full[WINDOW]).max() > 1e-3


@pytest.mark.parametrize("window", [1, 2, 5, 9, 100])
def test_a_query_sees_its_window_and_no_more(window: int) -> None:
    q = jnp.zeros((1, 9, 1, 2))  # equal scores: the mean of what is seen
    v = jnp.arange(18.0).reshape(1, 9, 1, 2)
    out = causal_attention(q, q, v, window)
    for position in range(9):
        want = v[0, max(0, position - window + 1) : position + 1].mean(axis=0)
        np.testing.assert_allclose(out[0, position], want, rtol=1e-6)
