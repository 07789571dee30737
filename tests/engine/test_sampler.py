"""The sampler against plain float64 arithmetic, and the independence of its rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxdual.engine import sampler
from jaxdual.engine.sampler import Logprobs, SamplerState, SlotSampling
from jaxdual.sampling_params import MAX_LOGPROBS, SamplingParams

VOCAB = 23
SLOTS = 8
ROWS = 64


@functools.cache
def jitted() -> Any:
    return jax.jit(sampler.sample)


def sample_few(
    logits: Sequence[np.ndarray], state: SamplerState, rows: Sequence[tuple[int, int, SlotSampling] | None]
) -> tuple[SamplerState, jax.Array, Logprobs]:
    """A step of a few rows, padded to one common size."""
    batch = np.zeros((SLOTS, VOCAB), np.float32)
    batch[: len(logits)] = logits
    padded = [*rows, *[None] * (SLOTS - len(rows))]
    result: tuple[SamplerState, jax.Array, Logprobs] = jitted()(batch, state, sampler.pack(padded, SLOTS, VOCAB))
    return result


def logits_of(seed: int, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


def sampling_of(seed: int = 0, suppressed: Sequence[int] = (), **params: Any) -> SlotSampling:
    return SlotSampling(SamplingParams(**params), (seed, 77), tuple(suppressed))


def state_of(
    slot: int = 0,
    counts: Mapping[int, int] | None = None,
    prompt: Sequence[int] = (),
    bias: Mapping[int, float] | None = None,
    state: SamplerState | None = None,
) -> SamplerState:
    output_counts, in_prompt, biases = np.zeros(VOCAB, np.int32), np.zeros(VOCAB, bool), np.zeros(VOCAB, np.float32)
    in_prompt[list(prompt)] = True
    for token, count in (counts or {}).items():
        output_counts[token] = count
    for token, value in (bias or {}).items():
        biases[token] = value
    state = sampler.new_state(SLOTS + 1, VOCAB) if state is None else state
    return sampler.set_slot(
        state, jnp.int32(slot), jnp.asarray(output_counts), jnp.asarray(in_prompt), jnp.asarray(biases)
    )


def reference(
    logits: np.ndarray,
    sampling: SlotSampling,
    output_index: int = 0,
    counts: Mapping[int, int] | None = None,
    prompt: Sequence[int] = (),
) -> np.ndarray:
    """Probabilities of the tokens, one after another as the documentation of the parameters has it."""
    params = sampling.params
    x = [float(value) for value in logits]
    counts = counts or {}
    for token in range(VOCAB):
        if token in counts or token in prompt:
            r = params.repetition_penalty
            x[token] = x[token] / r if x[token] > 0 else x[token] * r
        if token in counts:
            x[token] -= params.frequency_penalty * counts[token] + params.presence_penalty
        x[token] += (params.logit_bias or {}).get(token, 0.0)
        if output_index < params.min_tokens and token in sampling.suppressed:
            x[token] = -np.inf
    values = np.array(x)
    if params.temperature == 0:
        return (np.arange(VOCAB) == values.argmax()).astype(np.float64)
    p = softmax(values / params.temperature)
    allowed = p >= params.min_p * p.max()
    p = np.where(allowed, p, 0)
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    total, kept = 0.0, np.zeros(VOCAB, bool)
    for token in order:
        if total < params.top_p or params.top_p == 1:
            kept[token] = p[token] > 0
        total += p[token]
    p = np.where(kept, p, 0)
    return p / p.sum()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def draw(
    logits: np.ndarray, state: SamplerState, sampling: SlotSampling, batches: int, first_index: int = 0
) -> np.ndarray:
    """Tokens of `batches * ROWS` successive output indices."""
    tokens = []
    batch = np.tile(logits, (ROWS, 1))
    for number in range(batches):
        rows = [(0, first_index + number * ROWS + row, sampling) for row in range(ROWS)]
        tokens.append(np.asarray(jitted()(batch, state, sampler.pack(rows, SLOTS, VOCAB))[1]))
    return np.concatenate(tokens)


CASES = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 4},
    "top_k_1": {"top_k": 1},
    "top_p": {"top_p": 0.6},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "top_k_then_top_p": {"top_k": 6, "top_p": 0.7, "temperature": 1.5},
    "min_p_top_k_top_p": {"min_p": 0.05, "top_k": 9, "top_p": 0.9, "temperature": 2.0},
    "repetition": {"repetition_penalty": 1.8},
    "repetition_below_1": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "negative": {"frequency_penalty": -0.4, "presence_penalty": -1.0},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0}},
    "suppressed": {"min_tokens": 10_000, "max_tokens": 10_000, "suppressed": (0, 7, 22)},
    "all": {
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "logit_bias": {1: 2.0},
        "min_tokens": 10_000,
        "max_tokens": 10_000,
        "suppressed": (2,),
    },
}
COUNTS = {1: 3, 4: 1, 9: 2}
PROMPT = (4, 6, 13)


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_the_reference_distribution(case: str) -> None:
    sampling = sampling_of(seed=sum(map(ord, case)), **CASES[case])
    logits = logits_of(3)
    bias = sampling.params.logit_bias
    want = reference(logits, sampling, 0, COUNTS, PROMPT)
    tokens = draw(logits, state_of(0, COUNTS, PROMPT, bias), sampling, 48)
    seen = np.bincount(tokens, minlength=VOCAB)
    assert not seen[want == 0].any(), "a token outside the support was drawn"
    expected = want * tokens.size
    common = expected >= 5
    parts = [*zip(seen[common], expected[common], strict=True), (seen[~common].sum(), expected[~common].sum())]
    parts = [(s, e) for s, e in parts if e >= 1]
    statistic = sum((s - e) ** 2 / e for s, e in parts)
    assert len(parts) == 1 or chi2.sf(statistic, len(parts) - 1) > 1e-4, (seen, expected)


@pytest.mark.parametrize("case", CASES)
def test_temperature_zero_takes_the_likeliest_after_penalties_and_biases(case: str) -> None:
    for seed in range(5):
        sampling = sampling_of(**{**CASES[case], "temperature": 0.0})
        logits = logits_of(seed)
        state = state_of(0, COUNTS, PROMPT, sampling.params.logit_bias)
        tokens = draw(logits, state, sampling, 1)
        assert set(tokens) == {int(reference(logits, sampling, 0, COUNTS, PROMPT).argmax())}


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 2e-38, 1e-42])
def test_a_very_small_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[2, 5, 9]] = 10.0, 20.0, 15.0
    assert set(draw(logits, sampler.new_state(SLOTS + 1, VOCAB), sampling_of(temperature=temperature), 1)) == {5}


def test_a_very_large_temperature_gives_every_token_but_suppressed_ones() -> None:
    sampling = sampling_of(temperature=1e30, min_tokens=9999, max_tokens=9999, suppressed=(0,))
    tokens = draw(logits_of(0), sampler.new_state(SLOTS + 1, VOCAB), sampling, 10)
    assert set(tokens) == set(range(1, VOCAB))


def test_suppressed_tokens_come_back_after_min_tokens() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[7] = 50
    sampling = sampling_of(temperature=0.0, min_tokens=3, suppressed=(7,))
    tokens = draw(logits, sampler.new_state(SLOTS + 1, VOCAB), sampling, 1)
    assert 7 not in tokens[:3]
    assert set(tokens[3:]) == {7}


KINDS = [
    sampling_of(1),
    sampling_of(2, temperature=0.0),
    sampling_of(3, top_k=5),
    sampling_of(4, top_p=0.5, temperature=1.4),
    sampling_of(5, min_p=0.1, logprobs=3),
    sampling_of(6, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5),
    sampling_of(7, logit_bias={2: 5.0, 3: -5.0}),
    sampling_of(8, min_tokens=100, max_tokens=100, suppressed=(1, 5, 6)),
]


def state_for_kinds() -> SamplerState:
    state = sampler.new_state(SLOTS + 1, VOCAB)
    for slot, kind in enumerate(KINDS):
        state = state_of(slot, {slot: 2, 3: 1}, (slot + 1, 8), kind.params.logit_bias, state)
    return state


def test_a_row_gives_the_same_token_alone_and_in_any_batch() -> None:
    state = state_for_kinds()
    logits = [logits_of(40 + slot) for slot in range(SLOTS)]
    for index in (0, 1, 17):
        alone = []
        for slot, kind in enumerate(KINDS):
            inputs = sampler.pack([(slot, index, kind)], SLOTS, VOCAB)
            alone.append(int(jitted()(logits[slot][None], state, inputs)[1][0]))
        for seed in range(12):
            places = np.random.default_rng(seed).permutation(SLOTS)
            present = [place if (seed + place) % 4 else None for place in places]
            rows = [None if slot is None else (int(slot), index, KINDS[slot]) for slot in present]
            batch = np.stack([np.full(VOCAB, np.nan, np.float32) if s is None else logits[s] for s in present])
            tokens = jitted()(batch, state, sampler.pack(rows, SLOTS, VOCAB))[1]
            for row, slot in enumerate(present):
                if slot is not None:
                    assert int(tokens[row]) == alone[slot], (index, seed, slot)


def test_what_a_slot_s_former_sequence_left_is_not_used() -> None:
    plain, biased = sampling_of(temperature=0.0), KINDS[6]
    penalised = sampling_of(temperature=0.0, frequency_penalty=1.0)
    state = state_of(0, {5: 9}, (5,), {3: 90.0})
    state = state_of(1, {}, (), {7: 90.0}, state)
    logits = np.zeros(VOCAB, np.float32)
    logits[5] = 8.0
    rows = [(0, 0, plain), (1, 0, penalised), (2, 0, biased)]
    assert np.asarray(sample_few([logits] * 3, state, rows)[1])[:2].tolist() == [5, 5]


def test_state_changes_only_in_the_rows_that_sample() -> None:
    state = state_for_kinds()
    rows = [(3, 0, KINDS[3]), None, (6, 0, KINDS[6]), None]
    after, tokens, _ = sample_few([logits_of(i) for i in range(4)], state, rows)
    counts, last = np.array(state.output_counts), np.array(state.last_token)
    for row, slot in ((0, 3), (2, 6)):
        counts[slot, int(tokens[row])] += 1
        last[slot] = int(tokens[row])
    np.testing.assert_array_equal(after.output_counts[:SLOTS], counts[:SLOTS])
    np.testing.assert_array_equal(after.last_token[:SLOTS], last[:SLOTS])
    np.testing.assert_array_equal(after.in_prompt, state.in_prompt)
    np.testing.assert_array_equal(after.bias, state.bias)


def test_penalties_see_the_tokens_sampled_before() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[:3] = 3.0, 2.9, 2.8
    sampling = sampling_of(temperature=0.0, frequency_penalty=1.0)
    state, got = state_of(0), []
    for index in range(4):
        state, tokens, _ = sample_few([logits], state, [(0, index, sampling)])
        got.append(int(tokens[0]))
    assert got == [0, 1, 2, 0]


def test_a_new_sequence_in_a_slot_starts_from_what_it_is_given() -> None:
    state = state_of(2, {1: 5}, (2,), {3: 1.0})
    fresh = state_of(2, {}, (4,), {}, state)
    assert not np.asarray(fresh.output_counts).any()
    assert np.flatnonzero(fresh.in_prompt[2]).tolist() == [4]
    assert not np.asarray(fresh.bias).any()


def test_seeds_and_output_indices_draw_independently() -> None:
    logits, state = np.zeros(VOCAB, np.float32), sampler.new_state(SLOTS + 1, VOCAB)
    runs = [draw(logits, state, SlotSampling(SamplingParams(), s, ()), 2) for s in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for one, other in itertools.combinations(runs, 2):
        assert 0 < np.mean(one == other) < 4 / VOCAB
    np.testing.assert_array_equal(runs[0], draw(logits, state, SlotSampling(SamplingParams(), (0, 0), ()), 2))
    assert len(set(runs[0].tolist())) == VOCAB


@pytest.mark.parametrize("top_k", [0, -1, VOCAB, VOCAB + 5, 10**12])
def test_top_k_of_all_tokens_is_no_top_k(top_k: int) -> None:
    inputs = sampler.pack([(0, 0, sampling_of(top_k=top_k))], SLOTS, VOCAB)
    assert inputs.top_k[0] == VOCAB


def test_top_p_of_one_keeps_the_least_likely_token() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[4] = -12.0
    kept = sampler._top_k_top_p(jnp.asarray(logits)[None], sampler.pack([(0, 0, sampling_of())], SLOTS, VOCAB))
    assert np.isfinite(kept).all()


def test_logprobs_are_those_of_the_unchanged_distribution() -> None:
    logits = logits_of(9)
    sampling = sampling_of(temperature=0.3, top_k=2, logit_bias={5: 60.0}, logprobs=4)
    state = state_of(0, bias={5: 60.0})
    rows = [(0, 0, sampling), None]
    _, tokens, logprobs = sample_few([logits, logits], state, rows)
    want = np.log(softmax(logits.astype(np.float64)))
    assert int(tokens[0]) == 5
    np.testing.assert_allclose(logprobs.chosen[0], want[5], atol=1e-5)
    assert int(logprobs.rank[0]) == 1 + int((want > want[5]).sum())
    assert np.asarray(logprobs.top_tokens[0]).tolist() == np.argsort(-want)[:MAX_LOGPROBS].tolist()
    np.testing.assert_allclose(logprobs.top[0], np.sort(want)[::-1][:MAX_LOGPROBS], atol=1e-5)


def test_logprobs_of_a_vocabulary_smaller_than_the_greatest_number_of_them() -> None:
    logprobs: Logprobs = sampler.token_logprobs(jnp.asarray([[1.0, 3.0, 2.0]]), jnp.asarray([2], jnp.int32))
    assert logprobs.top_tokens.tolist() == [[1, 2, 0]]
    assert logprobs.rank.tolist() == [2]


def test_nobody_wants_logprobs_so_none_are_computed() -> None:
    _, _, logprobs = sample_few([logits_of(1)], sampler.new_state(SLOTS + 1, VOCAB), [(0, 0, sampling_of())])
    assert not any(np.asarray(part).any() for part in logprobs)
