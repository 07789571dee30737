"""DySCO's parameters, selection and dense reference: against recorded runs of the authors' code, and brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from jaxdual.decoding.dysco import HISTORY, DyscoParams, first_raised, template_mask
from jaxdual.decoding.relevance import blend, raised, select, select_above_cut, select_by_sort
from tests.decoding.dense_dysco import DenseDysco, Settings

type Select = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
FIXTURES = Path(__file__).parent.parent / "fixtures" / "dysco"
CASES = ("qwen3_hybrid", "llama_topk", "vanilla_beta1")


def meta(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / case / "meta.json").read_text())
    return found


def recorded(case: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / "expected.npz") as found:
        return dict(found)


def unpacked(packed: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    bits = np.unpackbits(packed, axis=1, bitorder="little").astype(bool)
    return [row[:count] for row, count in zip(bits, keys, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_the_dense_reference_reproduces_the_recorded_runs(case: str) -> None:
    want, of_case = recorded(case), meta(case)
    names = ("heads", "C", "I", "p", "K", "beta", "gamma", "dynamic", "template_sequences")
    of_run = Settings(**{name: of_case[name] for name in names})
    trace = DenseDysco(models.load(FIXTURES / case, dtype="float32"), of_run).run(
        want["prompt_ids"].tolist(), of_case["new_tokens"]
    )
    assert trace.generated == want["generated"].tolist()
    selected = unpacked(want["selected_packed"], want["n_keys"])
    boosted = unpacked(want["boosted_packed"], want["n_keys"])
    for step, keys in enumerate(want["n_keys"]):
        np.testing.assert_array_equal(trace.selected[step], selected[step])
        np.testing.assert_array_equal(trace.boosted[step], boosted[step])
        np.testing.assert_allclose(trace.relevance[step], want["r"][step, :keys], atol=1e-5)
        assert np.abs(trace.logits[step] - want["logits"][step]).max() <= 2e-4 * np.abs(want["logits"]).max()
    for found, row in zip(trace.observed, want["r_observed"], strict=True):
        np.testing.assert_allclose(found, row[: len(found)], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_recorded_relevance_gives_the_recorded_selections(case: str) -> None:
    want, of_case = recorded(case), meta(case)
    steps, keys = want["r"].shape
    top_k = jnp.full(steps, of_case["K"] or keys, jnp.int32)
    top_p = jnp.full(steps, math.inf if of_case["p"] is None else of_case["p"], jnp.float32)
    lengths = jnp.asarray(want["n_keys"])
    selected = select(jnp.asarray(want["r"]), lengths, top_p, top_k)
    template = np.zeros((steps, keys), bool)
    template[:, : of_case["prompt_length"]] = template_mask(want["prompt_ids"], of_case["template_sequences"])
    np.testing.assert_array_equal(template[0, : of_case["prompt_length"]], want["template_mask"])
    boosted = raised(selected, jnp.asarray(template), lengths)
    for step, count in enumerate(want["n_keys"]):
        np.testing.assert_array_equal(selected[step, :count], unpacked(want["selected_packed"], want["n_keys"])[step])
        np.testing.assert_array_equal(boosted[step, :count], unpacked(want["boosted_packed"], want["n_keys"])[step])
        assert not np.any(selected[step, count:])
        assert not np.any(boosted[step, count:])


@pytest.mark.parametrize("case", CASES)
def test_blending_the_recorded_rows_gives_the_next_ones(case: str) -> None:
    """The row that must have come between two recorded ones is a probability vector, as attention is."""
    want, of_case = recorded(case), meta(case)
    history = DyscoParams(decay=of_case["gamma"]).history
    assert history == pytest.approx(HISTORY["code"])
    for before, after in zip(want["r"], want["r"][1:], strict=False):
        row = (after - history * before) / (1 - history)
        assert row.min() > -1e-5
        assert row.sum() == pytest.approx(1, abs=1e-4)
        found = blend(*(jnp.asarray(one)[None] for one in (before, row, np.float32(history), np.bool_(False))))
        np.testing.assert_allclose(found[0], after, atol=1e-6)
    alone = blend(*(jnp.asarray(one)[None] for one in (want["r"][0], want["r"][1], np.float32(0.4), np.bool_(True))))
    np.testing.assert_array_equal(alone[0], want["r"][1])


# Multiples of a power of two: sums are exact in any order, so that a limit is met or not.
shares = arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(0, 64).map(lambda whole: whole / 64))


FORMS: tuple[Select, ...] = (
    jax.jit(select),
    jax.jit(select_by_sort),
    jax.jit(partial(select_above_cut, digit_bits=4)),  # the one of GPUs
)


@settings(deadline=None)  # the first calls compile
@given(
    relevance=shares,
    length=st.integers(1, 40),
    top_p=st.sampled_from([None, 1 / 64, 0.25, 0.5, 0.96875, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 8, 100]),
)
def test_selection_is_that_of_a_full_sort(
    relevance: np.ndarray, length: int, top_p: float | None, top_k: int | None
) -> None:
    length = min(length, len(relevance))
    order = sorted(range(length), key=lambda place: (-relevance[place], place))
    count, total = length, float(relevance[:length].sum())
    if top_p is not None:
        count = max(sum(float(relevance[order[: m + 1]].sum()) <= top_p * total for m in range(length)), 1)
    if top_k is not None:
        count = min(count, top_k)
    padded = np.concatenate([relevance, np.full(45 - len(relevance), 7.0, np.float32)])[None]
    for form in FORMS:
        found = form(
            jnp.asarray(padded),
            jnp.array([length]),
            jnp.array([math.inf if top_p is None else top_p], jnp.float32),
            jnp.array([len(relevance) if top_k is None else top_k]),
        )
        assert np.flatnonzero(found[0]).tolist() == sorted(order[:count])


KEYS = 300


def relevances(kind: str, rng: np.random.Generator, length: int) -> np.ndarray:
    """As attention may give it: of one token, of all alike, of none, or with a long tail."""
    if kind == "one":
        return np.eye(length)[rng.integers(length)]
    if kind in ("equal", "none"):
        return np.full(length, 1 / length if kind == "equal" else 0.0)
    drawn = rng.permutation(1 / np.arange(1, length + 1)) if kind == "zipf" else rng.random(length)
    if kind == "few values":
        drawn = np.ceil(drawn * 4) * 0.1
    if kind == "sparse":
        drawn *= rng.random(length) < 0.2
    return drawn / max(drawn.sum(), 1e-9)


@settings(deadline=None)  # the first calls compile
@given(
    kinds=st.lists(
        st.sampled_from(["random", "zipf", "one", "equal", "none", "few values", "sparse"]), min_size=3, max_size=3
    ),
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, KEYS), min_size=3, max_size=3),
    top_p=st.lists(st.sampled_from([1e-30, 0.1, 0.5, 0.9, 0.975, 0.999, 1.0, math.inf]), min_size=3, max_size=3),
    top_k=st.lists(st.sampled_from([1, 7, 64, KEYS, 10**6]), min_size=3, max_size=3),
)
def test_every_form_selects_the_first_of_a_full_sort_in_float64(
    kinds: list[str], seed: int, lengths: list[int], top_p: list[float], top_k: list[int]
) -> None:
    """Exactly as many as fit, but where the limit is met within what rounding makes of a sum in any order."""
    rng = np.random.default_rng(seed)
    relevance = rng.random((3, KEYS)).astype(np.float32)  # also past the end
    for row, kind, length in zip(relevance, kinds, lengths, strict=True):
        if length:
            row[:length] = relevances(kind, rng, length)
    found_by = [
        np.asarray(form(jnp.asarray(relevance), jnp.array(lengths), jnp.array(top_p, jnp.float32), jnp.array(top_k)))
        for form in FORMS
    ]
    for row, (length, share, most) in enumerate(zip(lengths, top_p, top_k, strict=True)):
        exact = relevance[row, :length].astype(np.float64)
        order = np.lexsort((np.arange(length), -exact))
        fewest = largest = length
        if share < 1:
            sums, limit = np.cumsum(exact[order]), float(np.float32(share)) * exact.sum()
            rounding = (length + 1) * 2.0**-24 * limit
            fewest, largest = (max(int((sums <= limit + slack).sum()), 1) for slack in (-rounding, rounding))
        fewest, largest = min(fewest, most, length), min(largest, most, length)
        for found in found_by:
            count = int(found[row].sum())
            assert fewest <= count <= largest
            assert np.flatnonzero(found[row]).tolist() == sorted(order[:count])


@given(
    tokens=st.lists(st.integers(0, 3), max_size=30),
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=3),
)
def test_template_masks_are_those_of_a_search_at_every_place(tokens: list[int], sequences: list[list[int]]) -> None:
    want = np.zeros(len(tokens), bool)
    for sequence in sequences:
        for start in range(len(tokens)):
            if tokens[start : start + len(sequence)] == sequence:
                want[start : start + len(sequence)] = True
    np.testing.assert_array_equal(template_mask(tokens, sequences), want)


def test_without_relevance_all_are_equal() -> None:
    nothing, lengths = jnp.zeros((2, 6)), jnp.array([4, 6])
    found = select(nothing, lengths, jnp.array([math.inf, 0.5], jnp.float32), jnp.array([6, 3]))
    assert [np.flatnonzero(row).tolist() for row in found] == [[0, 1, 2, 3], [0, 1, 2]]


def test_where_raising_begins() -> None:
    assert first_raised(1000, 7, 8) == 992
    assert first_raised(1000, 7, 0) == 993
    assert first_raised(3, 7, 8) == 0


def test_what_of_the_relevance_is_kept() -> None:
    assert DyscoParams().history == pytest.approx(3 / 7)
    assert DyscoParams(preset="rev89c").history == 0.4
    assert DyscoParams(preset="paper").history == 0.75
    assert DyscoParams(decay=0).history == 0
    assert DyscoParams(decay=3.0).history == 0.75
    assert DyscoParams(decay=math.inf).history == 1


@pytest.mark.parametrize(
    ("given_ones", "message"),
    [
        ({"heads": []}, "heads"),
        ({"heads": [(1, 2, 3)]}, "list of .layer, head. pairs"),
        ({"heads": [(1, -1)]}, "heads=-1 must be a whole number of at least 0"),
        ({"heads": [(1, 2), (1, 2)]}, "names a head twice"),
        ({"heads": [(1, 2)], "profile": "qwen3-8b"}, "exclude each other"),
        ({"profile": ""}, "profile='' must be a name or a file"),
        ({"top_p": None, "top_k": None}, "can't both be None"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"strength": 0}, "strength=0 must be above 0"),
        ({"strength": math.nan}, "strength=nan must be a number"),
        ({"strength": math.inf}, "strength=inf must be above 0 and at most 1000"),
        ({"decay": -1.0}, "decay=-1.0 must be at least 0"),
        ({"decay": 0.75, "preset": "code"}, "exclude each other"),
        ({"preset": "mine"}, "preset='mine' must be one of code, rev89c, paper"),
        ({"observe": -1}, "observe=-1 must be a whole number"),
        ({"tail": "long"}, "tail='long' must be a whole number"),
        ({"template_sequences": [[]]}, "list of lists of token ids"),
        ({"template_sequences": [[-1]]}, "template_sequences=-1"),
        ({"static": 1}, "static=1 must be true or false"),
        ({"static": True, "observe": 1}, "observe=1 leaves nothing"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused(given_ones: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyscoParams(**given_ones)
