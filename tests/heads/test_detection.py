"""Detection of heads: what the authors' code gave, and heads that are known to look where they should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxdual.heads import Detection, ItemPrompts, build_prompts, detect, read_items
from jaxdual.heads.attention import span_attention
from jaxdual.heads.detection import item_document_scores
from jaxdual.heads.prompts import form_of
from jaxdual.heads.scores import document_scores, ndcg10
from jaxdual.tokenizer import Tokenizer
from tests import windowed_models

RECORDED = Path(__file__).parents[1] / "fixtures" / "qrhead" / "llama_two_items"
LLAMA = form_of("llama", None, {})


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(RECORDED / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model() -> models.Decoder:
    return models.load(RECORDED, dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[ItemPrompts]:
    tokenizer = Tokenizer.from_dir(RECORDED)
    return [build_prompts(tokenizer, item, LLAMA) for item in read_items(RECORDED / "items.json")]


def test_spans_and_tokens_are_the_recorded_ones(prompts: list[ItemPrompts], expected: dict[str, np.ndarray]) -> None:
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
