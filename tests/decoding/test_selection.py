"""Selection beside a full sort, for relevance of many shapes, and what templates leave of it."""

from __future__ import annotations

import math

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.decoding.relevance import raised, select

_WIDTH = 1024
_ROUNDING = 1e-5  # of sums over a thousand float32, in another order


@st.composite
def relevances(draw: st.DrawFn) -> np.ndarray:
    """A probability vector in float32."""
    size, seed = draw(st.integers(1, 1000)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["random", "peaked", "zipf", "one hot", "equal", "few", "rounded"]))
    if kind == "random":
        weights = rng.random(size)
    elif kind == "peaked":
        weights = np.exp(rng.normal(0, 4, size))
    elif kind == "zipf":
        weights = rng.permutation(np.arange(1, size + 1) ** -draw(st.sampled_from([0.8, 1.2, 2.0])))
    elif kind == "one hot":
        weights = np.arange(size) == rng.integers(size)
    elif kind == "equal":
        weights = np.ones(size)
    elif kind == "few":
        weights = rng.random(size) * (rng.random(size) < 0.05)
        weights[rng.integers(size)] = 1
    else:  # with many ties
        weights = np.ceil(4 * rng.random(size))
    return (weights / weights.sum()).astype(np.float32)


def selected(relevance: np.ndarray, top_p: float | None, top_k: int | None) -> np.ndarray:
    """Positions that `select` takes, from a row with more behind its end."""
    padded = np.full((1, _WIDTH), 7.0, np.float32)
    padded[0, : len(relevance)] = relevance
    found = _select(
        padded,
        np.array([len(relevance)], np.int32),
        np.array([math.inf if top_p is None else top_p], np.float32),
        np.array([_WIDTH if top_k is None else top_k], np.int32),
    )
    return np.flatnonzero(found[0])


_select, _raised = jax.jit(select), jax.jit(raised)


@settings(deadline=None, max_examples=300)  # the first calls compile
@given(
    relevance=relevances(),
    top_p=st.one_of(st.none(), st.sampled_from([1.0, 0.975, 0.5, 1e-3, 1e-30]), st.floats(1e-6, 1.0)),
    top_k=st.one_of(st.none(), st.integers(1, 1200)),
)
def test_selected_are_the_first_of_a_full_sort_as_long_as_the_limits_allow(
    relevance: np.ndarray, top_p: float | None, top_k: int | None
) -> None:
    """As many as fit: one more would be above a limit. A sum may be off by its rounding, a number of tokens not."""
    order = np.argsort(-relevance, kind="stable")
    found = selected(relevance, top_p, top_k)
    count = len(found)
    assert found.tolist() == sorted(order[:count].tolist())
    most = len(relevance) if top_k is None else min(top_k, len(relevance))
    assert 1 <= count <= most
    if top_p is None or top_p == 1:
        assert count == most
        return
    mass = np.cumsum(relevance[order].astype(np.float64)) / relevance.sum(dtype=np.float64)
    assert count == 1 or mass[count - 1] <= top_p + _ROUNDING
    assert count == most or mass[count] > top_p - _ROUNDING


@settings(deadline=None)
@given(relevance=relevances(), top_k=st.integers(1, 20), seed=st.integers(0, 99))
def test_what_a_template_takes_away_is_not_made_up_for(relevance: np.ndarray, top_k: int, seed: int) -> None:
    """The most relevant token is part of it: it counts for the limit, and the next one behind the limit stays out."""
    chosen = selected(relevance, None, top_k)
    template = np.random.default_rng(seed).random((1, _WIDTH)) < 0.2
    template[0, np.argmax(relevance)] = True
    bits = np.zeros((1, _WIDTH), bool)
    bits[0, chosen] = True
    found = _raised(bits, template, np.array([len(relevance)], np.int32))
    want = (set(chosen.tolist()) - set(np.flatnonzero(template).tolist())) | {len(relevance) - 1}
    assert set(np.flatnonzero(found[0]).tolist()) == want
    assert len(want) <= min(top_k, len(relevance))
