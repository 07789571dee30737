"""Detection of heads: what the authors' code gave, and a head that is known to look where it should."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxdual.heads import Detection, ItemPrompts, build_prompts, detect, read_items
from jaxdual.heads.attention import _attend, span_attention
from jaxdual.heads.detection import item_document_scores
from jaxdual.heads.prompts import form_of
from jaxdual.heads.scores import document_scores, ndcg10
from jaxdual.tokenizer import Tokenizer
from models import ModelConfig, RopeConfig
from tests import windowed_models

RECORDED = Path(__file__).parents[1] / "fixtures" / "qrhead" / "llama_two_items"
PLANTED = (1, 2)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(RECORDED / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model() -> models.Decoder:
    return models.load(RECORDED, dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[ItemPrompts]:
    tokenizer, form = Tokenizer.from_dir(RECORDED), form_of("llama", None, {})
    return [build_prompts(tokenizer, item, form) for item in read_items(RECORDED / "items.json")]


def test_tokens_and_spans_are_the_recorded_ones(prompts: list[ItemPrompts], expected: dict[str, np.ndarray]) -> None:
    for t, item in enumerate(prompts):
        assert list(item.tokens) == expected[f"prompt{t}"].tolist()
        assert list(item.null_tokens) == expected[f"null_prompt{t}"].tolist()
        assert [item.query_start, len(item.tokens) - 1] == expected[f"query_span{t}"].tolist()
        assert [item.null_query_start, len(item.null_tokens) - 1] == expected[f"null_query_span{t}"].tolist()
        assert [[begin, end - 1] for begin, end in item.documents] == expected[f"doc_spans{t}"].tolist()
        assert list(item.gold) == expected[f"gold{t}"].tolist()


def test_attention_and_document_scores_are_the_recorded_ones(
    model: models.Decoder, prompts: list[ItemPrompts], expected: dict[str, np.ndarray]
) -> None:
    for t, item in enumerate(prompts):
        spans = item.tokens, item.query_start, item.null_tokens, item.null_query_start
        asked, unasked = (np.stack(means) for means in zip(*span_attention(model, *spans, 3), strict=True))
        np.testing.assert_allclose(asked, expected[f"attn{t}"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(unasked, expected[f"null_attn{t}"], atol=1e-6, rtol=0)
        scores = np.stack(item_document_scores(model, item, 3))
        np.testing.assert_allclose(scores, expected[f"doc_scores{t}"], atol=1e-6, rtol=0)


def test_head_scores_and_ranking_are_the_recorded_ones(
    model: models.Decoder, prompts: list[ItemPrompts], expected: dict[str, np.ndarray]
) -> None:
    found = detect(model, prompts, 3)
    np.testing.assert_allclose(found.mean("sum"), expected["head_score_sum"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.mean("ndcg10"), expected["head_score_ndcg10"], atol=1e-6, rtol=0)
    assert found.ranking("sum") == [tuple(head) for head in expected["head_ranking"].tolist()]


def attention_alone(model: models.Decoder, tokens: np.ndarray, start: int) -> list[np.ndarray]:
    """Of one prompt, all scores at once: `[heads, tokens]` of each layer."""
    means = []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None]:
        group, size = q.shape[1] // k.shape[1], len(tokens)
        keys, values = (np.repeat(np.asarray(x, np.float64), group, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", np.asarray(q, np.float64), keys) / np.sqrt(q.shape[2])
        ahead = np.arange(size)[:, None] - np.arange(size)
        seen = (ahead >= 0) & (ahead < (model.config.window_of(layer) or size))
        weights = np.exp(np.where(seen, scores, -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        means.append(weights[:, start:].mean(axis=1))
        return jnp.asarray(np.einsum("hqk,khd->qhd", weights, values), jnp.float32), cache

    model(jnp.asarray(tokens), jnp.arange(len(tokens)), attend, None)
    return means


@pytest.mark.parametrize("alike", [60, 40, 0, 90])
def test_prompts_that_begin_alike_are_as_if_computed_alone(alike: int, tmp_path: Path) -> None:
    """Whether they part within the span, before it, at once, or one goes on where the other ends; also in windows."""
    model = models.load(windowed_models.write("mistral_mixed", tmp_path), dtype="float32")
    rng = np.random.default_rng(1)
    first = rng.integers(0, 96, 300)
    second = np.concatenate([first[:alike], (first[alike:90] + 1) % 96])
    found = zip(*span_attention(model, first.tolist(), 50, second.tolist(), 47, 3), strict=True)
    for means, (tokens, start) in zip(found, ((first, 50), (second, 47)), strict=True):
        np.testing.assert_allclose(np.stack(means), np.stack(attention_alone(model, tokens, start)), atol=2e-6)


def test_memory_of_attention_grows_with_the_prompt_and_not_with_its_square() -> None:
    """Of 32 heads and 16,384 tokens, all scores would be 32 GiB."""
    size = 16384
    q, k = (jax.ShapeDtypeStruct((size, heads, 64), jnp.float32) for heads in (32, 8))
    positions = jax.ShapeDtypeStruct((size,), jnp.int32)
    program = _attend.lower(q, k, k, positions, jax.ShapeDtypeStruct((2, size), jnp.float32), 9000, 8000, size)
    memory = program.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 << 30


def planted_model() -> models.Decoder:
    """Layers leave the embedding as it is; one head's queries match the keys of equal tokens, others' are random."""
    config = ModelConfig(
        family="llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope=RopeConfig(theta=1e6),
    )
    model, rng = models.init(config), np.random.default_rng(0)
    model.embedding[...] = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    matched = np.zeros((64, 32), np.float32)
    slow = [*range(8, 16), *range(24, 32)]  # dimensions that hardly turn within a prompt
    matched[:, slow] = np.linalg.qr(rng.standard_normal((64, 16)))[0]
    for layer in model.layers:
        attention = layer.attention
        for kernel in (attention.o.kernel, layer.mlp.down.kernel):
            kernel[...] = jnp.zeros_like(kernel[...])
        for kernel in (attention.q.kernel, attention.k.kernel):
            kernel[...] = jnp.asarray(0.1 * rng.standard_normal(kernel[...].shape), jnp.float32)
    layer, head = PLANTED
    attention, kv_head = model.layers[layer].attention, head // 2
    attention.q.kernel[...] = attention.q.kernel[...].at[:, 32 * head : 32 * head + 32].set(4 * matched)
    attention.k.kernel[...] = attention.k.kernel[...].at[:, 32 * kv_head : 32 * kv_head + 32].set(matched)
    return model


def planted_prompts(seed: int) -> ItemPrompts:
    """Eight documents, each with a token of its own; the query names that of one of them."""
    rng = np.random.default_rng(seed)
    tokens, documents, own = [0, 1], [], rng.permutation(np.arange(40, 64))[:8]
    for key in own:
        document = rng.integers(10, 40, 12)
        document[rng.integers(12)] = key
        documents.append((len(tokens), len(tokens) + 12))
        tokens += document.tolist()
    gold = int(rng.integers(8))
    query, null = [2, 3, 4, int(own[gold]), 7], [2, 3, 4, 6, 7]
    return ItemPrompts(str(seed), tokens + query, tokens + null, len(tokens), len(tokens), tuple(documents), (gold,))


def test_a_head_that_looks_for_the_query_s_token_is_ranked_first() -> None:
    found = detect(planted_model(), [planted_prompts(seed) for seed in range(6)], 2)
    for score in ("sum", "ndcg10"):
        assert found.ranking(score)[0] == PLANTED
    assert found.mean("ndcg10")[PLANTED] == 1
    others = np.delete(found.mean("sum").reshape(-1), 4 * PLANTED[0] + PLANTED[1])
    assert found.mean("sum")[PLANTED] > 5 * others.max()
    assert detect(planted_model(), [planted_prompts(0)], 1).mean("sum").shape == (1, 4)


def test_attention_that_is_not_finite_is_told() -> None:
    model = planted_model()
    model.embedding[...] = model.embedding[...].at[2].set(jnp.nan)
    with pytest.raises(ValueError, match="item '3': attention of layer 0 is not finite, computed in float32"):
        detect(model, [planted_prompts(3)], 2)


def test_document_scores_leave_out_low_tokens_and_what_the_null_query_sees() -> None:
    attention = np.array([[0.5, *[0.4] * 9, 0.1, 0.7, 0.2]], np.float32)
    null = np.array([[0.1, *[0.1] * 9, 0.2, 0.1]], np.float32)
    # The second document: nine of 0.3 and one of -0.1, whose mean is 0.26 and deviation 0.126.
    scores = document_scores(attention, null, [(0, 1), (1, 11), (11, 13)])
    np.testing.assert_allclose(scores, [[0.4, 2.7, 0.6]], atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "gold", "wanted"),
    [
        ([3, 2, 1], [0], 1.0),
        ([3, 2, 1], [2], 0.5),
        ([3, 2, 1], [0, 2], 1.5 / (1 + 1 / np.log2(3))),
        ([1, 1, 1], [1], 1 / np.log2(3)),
        (list(range(12)), [1], 0.0),
        (list(range(12)), [2], 1 / np.log2(11)),
        ([1] * 12, list(range(12)), 1.0),
    ],
)
def test_ndcg_of_known_rankings(scores: list[float], gold: list[int], wanted: float) -> None:
    assert ndcg10(np.array([scores], float), gold)[0] == pytest.approx(wanted)


def test_stability_compares_halves_with_each_other_and_with_random_heads() -> None:
    even, odd = np.array([[9.0, 8, 0], [1, 2, 4]]), np.array([[5.0, 1, 6], [0, 0, 2]])
    found = Detection({"sum": np.stack([even, odd]), "ndcg10": np.stack([even, odd])})
    assert found.ranking("sum") == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]
    stability = found.stability("sum", 2, 0)
    assert stability.overlap == 1
    # The first half's best are (0, 0) and (0, 1), the second's (0, 2) and (0, 0).
    assert stability.held_out == pytest.approx(((5 + 1) / 2 + (0 + 9) / 2) / 2)
    assert stability.top == pytest.approx((7 + 4.5) / 2)
    assert stability.random_mean == pytest.approx(found.mean("sum").mean(), abs=0.5)
    assert stability.random_mean < stability.random_best <= stability.top
    alone = Detection({"sum": even[None], "ndcg10": even[None]}).stability("sum", 2, 0)
    assert (alone.overlap, alone.held_out) == (None, None)
