"""Logits of small checkpoints against numbers that transformers computed."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.attention import dense_attend

HF = Path(__file__).parent.parent / "fixtures" / "hf"
CASES = [
    "llama",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "llama3_rope",
    "llama_biases",
    "qwen3_yarn",
    "qwen3_moe_mixed",
]
TOLERANCE = 2e-4


def expected(case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    with np.load(HF / case / "expected.npz") as data:
        return [(data[f"prompt{i}"], data[f"logits{i}"]) for i in (0, 1) if f"prompt{i}" in data]


def assert_close(found: jax.Array, wanted: np.ndarray | jax.Array) -> None:
    assert np.abs(np.asarray(found) - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    # All prompts in one batch, padded at the end: no row may see another or the padding.
    pairs = expected(case)
    width = max(len(prompt) for prompt, _ in pairs)
    batch = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt, _ in pairs])
    found = models.load(HF / case, dtype="float32").logits(batch)
    for row, (prompt, logits) in zip(found, pairs, strict=True):
        assert_close(row[: len(prompt)], logits)


def test_layer_by_layer_in_separate_programs_is_the_fused_forward() -> None:
    model = models.load(HF / "qwen3_moe_mixed", dtype="float32")
    prompt, logits = (jnp.asarray(part[:24]) for part in expected("qwen3_moe_mixed")[0])
    attend = dense_attend(1, len(prompt))
    positions = jnp.arange(len(prompt))
    x, rope = model.embed(prompt), model.rope(positions)

    @partial(jax.jit, static_argnums=0)
    def one_layer(graphdef, state, x):
        return nnx.merge(graphdef, state)(x, rope, partial(attend, 0), None)[0]

    for layer in model.layers:
        x = one_layer(*nnx.split(layer), x)
    # Layers of the same kind, dense or sparse, share a program.
    assert one_layer._cache_size() == 2
    graphdef, state = nnx.split(model)
    fused = jax.jit(lambda state: nnx.merge(graphdef, state)(prompt, positions, attend, None)[0])(state)
    np.testing.assert_allclose(x, fused, atol=1e-4)
    assert_close(model.head(x), logits)
    np.testing.assert_allclose(model.unembed(model.final_norm(x)), model.head(x), atol=1e-6)


def test_flat_leaves_outside_and_merge_inside_jit() -> None:
    model = models.load(HF / "qwen3_yarn", dtype="float32")
    prompt, logits = (jnp.asarray(part) for part in expected("qwen3_yarn")[0])
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)

    @jax.jit
    def step(leaves, tokens, positions):
        merged = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        return merged.head(merged(tokens, positions, dense_attend(1, len(prompt)), None)[0])

    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert_close(step(leaves, prompt, jnp.arange(len(prompt))), logits)


def test_differentiable_experts_give_the_same_result_and_gradients() -> None:
    model = models.load(HF / "qwen3_moe_mixed", dtype="float32")
    moe = model.layers[1].mlp
    x = jax.random.normal(jax.random.key(0), (10, model.config.hidden_size))
    served = moe(x)
    model.set_expert_implementation("reference")
    np.testing.assert_allclose(moe(x), served, atol=1e-5)
    graphdef, state = nnx.split(moe)
    gradients = jax.jit(jax.grad(lambda state: nnx.merge(graphdef, state)(x).var()))(state)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_logits_follow_changed_parameters() -> None:
    model = models.load(HF / "llama3_rope", dtype="float32")
    before = model.logits([[1, 2, 3]])
    model.norm.scale[...] = model.norm.scale[...] * 2
    np.testing.assert_allclose(model.logits([[1, 2, 3]]), before * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 2], "batch, length"), ([[0.5]], "integers"), ([[96]], "0 to 95"), ([[-1]], "0 to 95")],
)
def test_wrong_tokens_are_refused(tokens: list, message: str) -> None:
    model = models.load(HF / "llama3_rope", dtype="float32")
    with pytest.raises(ValueError, match=message):
        model.logits(tokens)


def test_bfloat16_parameters_give_float32_logits_near_the_exact_ones() -> None:
    model = models.load(HF / "llama3_rope", dtype="bfloat16")
    prompt, logits = expected("llama3_rope")[0]
    found = model.logits(prompt[None])[0]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - logits).max() < 0.1 * np.abs(logits).max()
