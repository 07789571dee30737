"""Requests with a gate: what it decides by, what a refusal costs, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdual import LLM, ConfigError, SamplingParams
from jaxdual.cascade.gate import Confidence, Fusion, Gate, Platt
from jaxdual.cascade.probe import ConfidenceProbe, Probe, p_ik
from jaxdual.cascade.work import Work
from jaxdual.engine.gated_programs import GatedPrograms
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.steps import Programs
from jaxdual.kv.keys import KeyChain
from jaxdual.kv.layout import KVLayout
from jaxdual.outputs import RequestOutput
from jaxdual.scheduling.plan import Phase, SequenceState
from jaxdual.telemetry import CompileCounter
from models.attention import dense_attend
from models.fingerprint import model_fingerprint
from tests.engine.models import folder, load, logits_after

from flax import nnx  # isort: skip

pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL, TAP, PAGE, LONGEST = "qwen3", 1, 8, 64
TOKENS = 20
LETTERS = ((10, 11), (20,), (30,), (40,))
CHOICES = Confidence("choices", LETTERS)
# Of whatever engine, loop, memory and chunk: the same verdicts, tokens, and work that adds up.
SETTINGS = {
    "plain": {"async_scheduling": False, "num_kv_blocks": 200},
    "overlapped": {"num_kv_blocks": 200},
    "short chunks": {"num_kv_blocks": 200, "max_num_batched_tokens": 12},
    "recomputed": {"num_kv_blocks": 13, "max_num_batched_tokens": 24},
    "swapped": {"num_kv_blocks": 13, "preemption_mode": "swap", "host_cache_bytes": 1 << 20},
    "stored": {"num_kv_blocks": 30, "kv_store": "memory:", "kv_store_capacity_bytes": 1 << 24},
    "no cache": {"num_kv_blocks": 40, "enable_prefix_caching": False, "async_scheduling": False},
}


@cache
def probe() -> Probe:
    config = load(MODEL).config
    tokens = np.random.default_rng(3).integers(config.vocab_size, size=LONGEST).astype(np.int32)
    hidden = _dense_hidden(tokens)
    module = ConfidenceProbe(hidden.mean(axis=0), hidden.std(axis=0) / 3, rngs=nnx.Rngs(5))
    fingerprint = model_fingerprint(folder(MODEL), "float32").hex()
    return Probe(
        parameters=module.parameters(), model=MODEL, fingerprint=fingerprint, num_layers=config.num_layers, tap=TAP
    )


@pytest.fixture(scope="module")
def probe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    probe().save(file)
    return file


def engine(probe_file: Path | None, **settings: object) -> LLM:
    file = None if probe_file is None else str(probe_file)
    return LLM(folder(MODEL), probe=file, **{"block_size": PAGE, "max_num_seqs": 6, "max_model_len": 96, **settings})


@cache
def expected_p_ik(prompt: tuple[int, ...]) -> float:
    """By a dense pass through the lower layers."""
    tokens = np.zeros(LONGEST, np.int32)
    tokens[: len(prompt)] = prompt
    return float(p_ik(probe().parameters, _dense_hidden(tokens))[len(prompt) - 1])


@jax.jit
def _dense_hidden(tokens: jax.Array) -> jax.Array:
    model = load(MODEL)
    x, _ = model.run(range(TAP), model.embed(tokens), jnp.arange(LONGEST), dense_attend(1, LONGEST), None)
    return x


def expected_p_t(prompt: Sequence[int]) -> float:
    """By a dense pass through all layers."""
    logits = logits_after(MODEL, prompt).astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    return max(float(probabilities[list(letter)].sum()) for letter in LETTERS)


def random_prompts(seed: int, count: int, longest: int = 60) -> list[list[int]]:
    rng, vocab_size = random.Random(seed), load(MODEL).config.vocab_size
    stem = [rng.randrange(vocab_size) for _ in range(30)]
    return [
        stem[: rng.choice((0, 0, 20, 30))] + [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest - 30))]
        for _ in range(count)
    ]


def run(llm: LLM, prompts: Sequence[Sequence[int]], gates: Sequence[Gate | None], tokens: int) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    outputs = [
        llm.submit({"prompt_token_ids": prompt}, params, gate=gate) for prompt, gate in zip(prompts, gates, strict=True)
    ]
    while llm.has_unfinished:
        llm.step()
    llm.check_integrity()
    assert all(output.finished for output in outputs)
    return outputs


@pytest.fixture(scope="module")
def mixed() -> tuple[list[list[int]], list[Gate | None]]:
    """Prompts with gates of which each half refuses some, and others without a gate."""
    prompts = random_prompts(1, 36)
    known, sure = ([*map(score, map(tuple, prompts))] for score in (expected_p_ik, expected_p_t))
    gate = Gate(CHOICES, tau_ik=_between(known, 0.3), tau_t=_between(sure, 0.5))
    return prompts, [None if number % 4 == 3 else gate for number in range(len(prompts))]


def _between(values: Sequence[float], part: float) -> float:
    """Halfway between two neighbouring values: none is so near that the last bits decide."""
    ordered = sorted(set(values))
    place = int(part * len(ordered))
    assert ordered[place] / ordered[place - 1] > 1.01
    return (ordered[place] + ordered[place - 1]) / 2


@pytest.mark.parametrize("name", SETTINGS)
def test_verdicts_tokens_and_work_are_the_same_in_every_engine(
    name: str, probe_file: Path, mixed: tuple[list[list[int]], list[Gate | None]]
) -> None:
    prompts, gates = mixed
    llm = engine(probe_file, **SETTINGS[name])
    outputs = run(llm, prompts, gates, tokens=TOKENS)
    refused = set()
    for prompt, gate, output in zip(prompts, gates, outputs, strict=True):
        (completion,), verdict = output.outputs, output.verdict
        if gate is None:
            assert verdict is None
        else:
            assert verdict is not None
            assert verdict.p_ik == pytest.approx(expected_p_ik(tuple(prompt)), abs=1e-4)
            known = expected_p_ik(tuple(prompt)) >= gate.tau_ik
            if known:
                assert verdict.p_t == pytest.approx(expected_p_t(prompt), rel=1e-4)
            want = "p_ik" if not known else ("p_t" if expected_p_t(prompt) < gate.tau_t else None)
            assert verdict.refused_by == want
            refused.add(want)
        if gate is not None and verdict is not None and not verdict.passed:
            assert (completion.finish_reason, completion.token_ids, completion.text) == ("refused", [], "")
        else:
            assert completion.finish_reason == "length"
            assert completion.token_ids == ungated(tuple(prompt))
    assert refused == {"p_ik", "p_t", None}
    stats = llm.stats()
    if name in ("recomputed", "swapped"):
        assert stats.preemptions > 0
    assert stats.work == sum((output.work for output in outputs), Work())


@cache
def ungated(prompt: tuple[int, ...]) -> list[int]:
    return list(run(_plain_engine(), [prompt], [None], tokens=TOKENS)[0].outputs[0].token_ids)


@cache
def _plain_engine() -> LLM:
    return engine(None, num_kv_blocks=100)


def test_a_refusal_costs_the_prompt_and_no_more(probe_file: Path) -> None:
    llm, prompts = engine(probe_file, num_kv_blocks=100), random_prompts(2, 8)
    gates = {
        "p_ik": Gate(CHOICES, tau_ik=1.1, tau_t=0),
        "p_t": Gate(CHOICES, tau_ik=0, tau_t=1.1),
        None: Gate(CHOICES, tau_ik=0, tau_t=0),
    }
    for refused_by, gate in gates.items():
        for tokens in (1, 5):
            distinct = [[*prompt, number, tokens, len(refused_by or "")] for number, prompt in enumerate(prompts)]
            llm_outputs = run(llm, distinct, [gate] * len(distinct), tokens)
            for prompt, output in zip(distinct, llm_outputs, strict=True):
                computed = len(prompt) - output.num_cached_tokens
                assert output.verdict is not None
                assert output.verdict.refused_by == refused_by
                upper = {"p_ik": 0, "p_t": computed, None: computed + tokens - 1}[refused_by]
                assert output.work == Work(max(computed, upper), upper)
                reason = "refused" if refused_by else "length"
                assert output.outputs[0].finish_reason == reason


def test_stop_tokens_and_aborts_leave_the_sums_right(probe_file: Path) -> None:
    """A sequence that a stop token ends has one more step under way, which was computed for it."""
    llm, prompts = engine(probe_file, num_kv_blocks=100), random_prompts(3, 10)
    first, second = (ungated(tuple(prompts[0]))[place] for place in (0, 1))
    params = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=[first, second])
    gate = Gate(CHOICES, tau_ik=0, tau_t=0)
    outputs = [llm.submit({"prompt_token_ids": prompt}, params, gate=gate) for prompt in prompts]
    while llm.has_unfinished:
        llm.step()
    assert llm.stats().work == sum((output.work for output in outputs), Work())
    gone = [llm.submit({"prompt_token_ids": [*prompt, 5, 6]}, params, f"gone-{n}", gate=gate)
            for n, prompt in enumerate(prompts)]  # fmt: skip
    for step in range(200):
        if not llm.has_unfinished:
            break
        llm.step()
        llm.abort(f"gone-{step}")
    llm.check_integrity()
    assert outputs[0].outputs[0].finish_reason == "stop"
    # An output that the front has given up is not told of any more: its work is the engine's alone.
    spent = sum((output.work for output in (*outputs, *gone)), Work())
    assert llm.stats().work.lower >= spent.lower
    assert {output.outputs[0].finish_reason for output in gone} >= {"abort"}


def test_an_opening_is_judged_over_all_its_tokens_and_nothing_is_decoded_before(probe_file: Path) -> None:
    llm, prompts = engine(probe_file, num_kv_blocks=100), random_prompts(4, 6)
    for prompt in prompts:
        opening = ungated(tuple(prompt))[:2]
        logits = [logits_after(MODEL, [*prompt, *opening[:place]]).astype(np.float64) for place in (0, 1)]
        expected = math.prod(
            float(np.exp(row[token] - row.max()) / np.exp(row - row.max()).sum())
            for row, token in zip(logits, opening, strict=True)
        )
        confidence = Confidence("opening", tuple((token,) for token in opening))
        for tau, passed in ((expected * 0.99, True), (expected * 1.01, False)):
            (output,) = run(llm, [prompt], [Gate(confidence, tau_ik=0, tau_t=tau)], tokens=7)
            assert output.verdict is not None
            assert output.verdict.p_t == pytest.approx(expected, rel=1e-4)
            assert (output.verdict.passed, output.verdict.judged) == (passed, 2)
            assert output.outputs[0].token_ids == (ungated(tuple(prompt))[:7] if passed else [])
            assert output.work.upper == len(prompt) - output.num_cached_tokens + (6 if passed else 1)
        # One that opens otherwise is judged where it leaves the opening.
        other = Confidence("opening", ((opening[0] ^ 1,), (opening[1],)))
        (output,) = run(llm, [prompt], [Gate(other, tau_ik=0, tau_t=0.9)], tokens=7)
        assert output.verdict is not None
        assert (output.verdict.passed, output.verdict.judged) == (False, 1)
        assert output.work.upper == len(prompt) - output.num_cached_tokens


def test_calibrated_and_fused_scores_are_compared_in_place_of_raw_ones(probe_file: Path) -> None:
    llm, prompt = engine(probe_file, num_kv_blocks=100), random_prompts(5, 1)[0]
    known, sure = expected_p_ik(tuple(prompt)), expected_p_t(prompt)

    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    platt = Gate(CHOICES, tau_ik=0, tau_t=0, platt_ik=Platt(2, 0.5), platt_t=Platt(0.5, -1))
    (output,) = run(llm, [prompt], [platt], tokens=2)
    assert output.verdict is not None
    assert output.verdict.p_ik is not None
    assert output.verdict.p_t is not None
    assert logit(output.verdict.p_ik) == pytest.approx(2 * logit(known) + 0.5, abs=1e-3)
    assert logit(output.verdict.p_t) == pytest.approx(0.5 * logit(sure) - 1, abs=1e-3)
    fused = 1 / (1 + math.exp(-(logit(sure) + 0.3 * logit(known) + 1)))
    for tau, passed in ((fused * 0.999, True), (fused * 1.001, False)):
        gate = Gate(CHOICES, tau_ik=1.1, fusion=Fusion(1, 0.3, 1, tau))
        (output,) = run(llm, [prompt], [gate], tokens=2)
        assert output.verdict is not None
        assert output.verdict.refused_by == (None if passed else "fusion")


def test_p_t_alone_needs_no_probe_and_p_ik_alone_no_letters(probe_file: Path) -> None:
    prompt = random_prompts(6, 1)[0]
    (output,) = run(_plain_engine(), [prompt], [Gate(CHOICES, tau_t=1.1, uses_probe=False)], tokens=3)
    assert output.verdict is not None
    assert (output.verdict.refused_by, output.verdict.p_ik) == ("p_t", None)
    (output,) = run(engine(probe_file), [prompt], [Gate(None, tau_ik=0)], tokens=3)
    assert output.verdict is not None
    assert (output.verdict.passed, output.verdict.p_t) == (True, None)
    assert len(output.outputs[0].token_ids) == 3


def test_what_cannot_be_gated_is_refused_with_the_reason(probe_file: Path, tmp_path: Path) -> None:
    prompt, gate = {"prompt_token_ids": [1, 2, 3]}, Gate(CHOICES)
    with pytest.raises(ValueError, match="asks for a score"):
        Gate(None, uses_probe=False)
    with pytest.raises(ValueError, match="has no probe"):
        _plain_engine().submit(prompt, gate=gate)
    llm = engine(probe_file)
    with pytest.raises(ValueError, match="one output"):
        llm.submit(prompt, SamplingParams(n=2), gate=gate)
    with pytest.raises(ValueError, match=r"token ids in \[0, "):
        llm.submit(prompt, gate=Gate(Confidence("choices", ((1,), (10**6,)))))
    other = tmp_path / "other.safetensors"
    dataclasses.replace(probe(), fingerprint="00" * 32).save(other)
    with pytest.raises(ConfigError, match="probe of a model with fingerprint 0000"):
        engine(other)
    with pytest.raises(ConfigError, match="don't see all tokens"):
        LLM(folder("mistral"), probe=str(probe_file), block_size=8)
    with pytest.raises(ConfigError, match="on one device"):
        engine(probe_file, tensor_parallel_size=2)


def test_two_halves_give_the_bits_of_a_whole_pass() -> None:
    """At equal shapes: residual stream and keys and values of all layers."""
    model = load(MODEL)
    layout = KVLayout.of_layers(
        [None] * model.config.num_layers,
        kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        page_size=PAGE,
        dtype="float32",
        itemsize=4,
    )
    programs = Programs(model, layout)
    gated = GatedPrograms(programs, TAP, PAGE)
    rng = np.random.default_rng(0)
    tokens = rng.integers(model.config.vocab_size, size=(2, 32)).astype(np.int32)
    starts, counts = np.zeros(2, np.int32), np.array([32, 21], np.int32)
    tables = (GroupTable(np.array([[3, 1, 7, 5], [0, 2, 4, 6]], np.int32)),)
    whole = programs.prefill(programs.leaves, _arena(layout), tokens, starts, counts, tables)
    stash = jnp.zeros((8, PAGE, model.config.hidden_size))
    arenas, stash, _ = gated.lower(
        programs.leaves, probe().parameters, _arena(layout), stash, tokens, starts, counts, tables
    )
    arenas, _, last = gated.upper(programs.leaves, arenas, stash, starts, counts, tables, chunk=32)
    np.testing.assert_array_equal(np.asarray(last), np.asarray(whole[2]))
    np.testing.assert_array_equal(np.asarray(arenas[0]), np.asarray(whole[0][0]))


def _arena(layout: KVLayout) -> tuple[jax.Array, ...]:
    return (jnp.zeros(layout.arena_shape(8, 0)),)


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(probe_file: Path, mixed: tuple[list[list[int]], list[Gate | None]]) -> None:
    llm = engine(probe_file, num_kv_blocks=13, max_num_batched_tokens=64)
    llm.warmup()
    prompts, gates = mixed
    run(llm, prompts[:1], [None], 1)
    compiles = CompileCounter()
    run(llm, prompts, gates, tokens=5)
    assert compiles.compilations == 0


@pytest.mark.parametrize(
    ("phase", "lowered", "part"),
    [(Phase.RUNNING, 5, "upper"), (Phase.RUNNING, 3, "whole"), (Phase.WAITING, 5, "whole")],
)
def test_a_verdict_that_comes_after_its_prompt_gave_way_opens_all_layers(phase: Phase, lowered: int, part: str) -> None:
    sequence = SequenceState(0, [1, 2, 3, 4, 5], 5, 1, frozenset(), KeyChain(b"", 8), part="lower")
    sequence.phase, sequence.lowered = phase, lowered
    sequence.open()
    assert sequence.part == part


def test_a_prompt_that_gives_way_between_two_chunks_is_lowered_anew(probe_file: Path) -> None:
    """The first one takes all pages while the second is in its lower layers, three tokens a step."""
    llm = engine(probe_file, num_kv_blocks=12, max_num_seqs=2, max_num_batched_tokens=4, enable_prefix_caching=False)
    gate, rng = Gate(CHOICES, tau_ik=0, tau_t=0), random.Random(8)
    prompts = [[rng.randrange(250) for _ in range(length)] for length in (22, 60)]
    outputs = [
        llm.submit(
            {"prompt_token_ids": prompt}, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), gate=one
        )
        for prompt, tokens, one in zip(prompts, (60, 5), (None, gate), strict=True)
    ]
    while llm.has_unfinished:
        llm.step()
    llm.check_integrity()
    first, second = outputs
    assert llm.stats().preemptions == 1
    assert first.work == Work(22 + 59, 22 + 59)
    assert second.work.lower > second.work.upper == 60 + 4, "it gave way in the lower layers"
    assert second.verdict is not None
    assert second.verdict.p_ik == pytest.approx(expected_p_ik(tuple(prompts[1])), abs=1e-4)
    assert second.outputs[0].token_ids == ungated(tuple(prompts[1]))[:5]
    assert llm.stats().work == first.work + second.work


def test_what_waits_between_the_layers_takes_part_of_the_kv_memory(probe_file: Path) -> None:
    config = load(MODEL).config
    block = config.num_layers * 2 * PAGE * config.num_kv_heads * config.head_dim * 4
    stash = PAGE * config.hidden_size * 4
    memory = 12 * (block + stash)  # one sequence of 96 tokens
    assert engine(probe_file, kv_cache_memory_bytes=memory).stats().kv_blocks == 12
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes gives 11 KV pages"):
        engine(probe_file, kv_cache_memory_bytes=memory - 1)
    assert engine(None, kv_cache_memory_bytes=12 * block).stats().kv_blocks == 12
