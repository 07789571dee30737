"""Experts that move while an engine runs: what is counted, where weights end up, and that no token changes."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdual import LLM, AsyncLLM, EngineConfig, SamplingParams
from jaxdual.config import ClusterConfig, ConfigError
from jaxdual.engine.expert_balancer import ExpertBalancer
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.router_log import RouterLog
from jaxdual.scheduling.expert_figures import transitions_of
from jaxdual.scheduling.experts import Placement, eplb
from jaxdual.telemetry import CompileCounter
from models.attention import dense_attend
from models.moe import MoE
from tests.engine.models import FIXTURES, TieCounter, expected, folder, load

SETTINGS: dict[str, Any] = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 256}
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(320) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def balancer_of(llm: LLM) -> ExpertBalancer:
    balancer = llm._engine.balancer
    assert balancer is not None
    return balancer


def stacks(llm: LLM, row: int) -> list[np.ndarray]:
    programs = llm._engine.runner.device.programs
    return [np.asarray(programs.leaves[place]) for place in programs._stacks[programs._sparse[row]]]  # type: ignore[attr-defined]


def chosen_experts(name: str, tokens: list[int]) -> np.ndarray:
    """Experts that the dense forward pass of one sequence chooses, `[sparse layers, tokens, k]`."""
    model, found = load(name), []

    def mix(layer: int, mlp: nnx.Module, x: jax.Array) -> jax.Array:
        experts, weights = mlp.route(x)
        found.append(np.asarray(experts))
        return mlp.apply(x, experts, weights)

    positions = jnp.arange(len(tokens))
    attend = dense_attend(1, len(tokens), model.config.layer_windows)
    model(jnp.array(tokens), positions, attend, None, mix)
    return np.stack(found)


@pytest.mark.parametrize(
    "sizes", [{}, {"expert_parallel_size": 2}, {"data_parallel_size": 2, "expert_parallel_size": 2}]
)
def test_counts_are_what_the_dense_forward_pass_chooses(sizes: dict[str, Any]) -> None:
    """Prompts in chunks, and their outputs; the last token of each output is never routed, padding never counts."""
    llm = LLM(FIXTURES / "qwen3_moe", **SETTINGS, **sizes, router_statistics="transitions", enable_prefix_caching=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(5)], GREEDY)
    counts = llm._engine.runner.take_router_counts()
    assert counts is not None
    assert counts.transitions is not None
    sequences = [[*p, *o.outputs[0].token_ids[:-1]] for p, o in zip(prompts(5), outputs, strict=True)]
    chosen = np.concatenate([chosen_experts("qwen3_moe", tokens) for tokens in sequences], axis=1)
    # The overlapped loop may compute a row after the last token; with a limit it never does.
    assert counts.tokens.sum() == chosen.shape[1]
    activations = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in chosen])
    # Ties of the router's logits in the last bits may turn out either way.
    assert np.abs(counts.activations.sum(axis=0) - activations).sum() <= 4
    assert np.abs(counts.transitions.sum(axis=0) - transitions_of(chosen, 8)).sum() <= 16
    again = llm._engine.runner.take_router_counts()
    assert again is not None
    assert again.tokens.sum() == again.activations.sum() == 0


@pytest.mark.parametrize("devices", [1, 2])
def test_figures_of_a_window_are_those_of_its_counts(devices: int) -> None:
    settings: dict[str, Any] = {"expert_parallel_size": devices, "router_statistics": "transitions", "expert_window": 8}
    llm = LLM(FIXTURES / "qwen3_moe", **SETTINGS, **settings)
    assert llm.stats().routers is None
    assert llm.stats().expert_imbalance is None
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(5)], GREEDY)
    window, figures = llm.router_statistics(), llm.stats().routers
    assert window is not None
    assert window.transitions is not None
    assert figures is not None
    assert figures.layers == tuple(range(len(window.activations)))
    assert figures.tokens == window.tokens
    activations = window.activations
    np.testing.assert_allclose(figures.loads, activations * 8 / activations.sum(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(figures.strongest_pairs, window.transitions.max(axis=(1, 2)) / window.tokens)
    if devices == 1:
        assert figures.traffic == ()
        return
    chosen = window.sources.reshape(len(activations), 2, 2, 4).sum(axis=(0, 3))  # experts lie in order
    np.testing.assert_allclose(figures.traffic, chosen / chosen.sum(axis=1, keepdims=True), atol=1e-4)
    assert llm.stats().expert_imbalance is not None


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_parallel_size": 4},
        {"expert_parallel_size": 2, "tensor_parallel_size": 2},
        {"data_parallel_size": 2, "expert_parallel_size": 2, "redundant_experts": 4},
    ],
)
def test_experts_that_move_while_tokens_come_change_none(sizes: dict[str, Any], overlap: bool) -> None:
    alone = LLM(folder("qwen3_moe"), **SETTINGS)
    want = alone.generate([{"prompt_token_ids": prompt} for prompt in prompts(12)], GREEDY)
    llm = LLM(folder("qwen3_moe"), **SETTINGS, **sizes, async_scheduling=overlap)
    balancer, rng = balancer_of(llm), np.random.default_rng(3)
    outputs = [llm.submit({"prompt_token_ids": prompt}, GREEDY) for prompt in prompts(12)]
    steps = 0
    while llm.has_unfinished:
        if steps % 5 == 2:
            loads = rng.gamma(0.3, 1.0, (*balancer.placement.experts.shape[:1], 8))
            balancer.relocate(eplb(loads, balancer.placement.devices, redundant=int(sizes.get("redundant_experts", 0))))
        llm.step()
        steps += 1
    ties = TieCounter("qwen3_moe")
    for prompt, one, other in zip(prompts(12), want, outputs, strict=True):
        ties.compare(prompt, one.outputs[0].token_ids, other.outputs[0].token_ids)
    ties.check()
    assert llm.stats().experts_moved > 20
    llm.check_integrity()
    weights = [layer.mlp.experts for layer in load("qwen3_moe").layers if isinstance(layer.mlp, MoE)]
    while balancer.is_moving:
        balancer.before_step(None)
    for row, experts in enumerate(weights):
        held = balancer.placement.experts[row]
        for found, name in zip(stacks(llm, row), ("gate", "up", "down"), strict=True):
            np.testing.assert_array_equal(found, np.asarray(getattr(experts, name)[...])[held])


@pytest.mark.parametrize("policy", ["eplb", "edr", "edr_column", "source", "metro"])
def test_policies_place_experts_anew_every_so_many_steps(policy: str) -> None:
    want = expected("qwen3_moe")
    llm = LLM(
        FIXTURES / "qwen3_moe",
        **SETTINGS,
        expert_parallel_size=2,
        expert_placement=policy,
        expert_interval=10,
        expert_window=5,
    )
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    for _ in range(3):
        for i, output in enumerate(
            llm.generate([{"prompt_token_ids": want[f"prompt{i}"].tolist()} for i in (0, 1)], params)
        ):
            assert output.outputs[0].token_ids == want[f"greedy{i}"].tolist()
    stats = llm.stats()
    assert stats.expert_relocations >= 8
    assert stats.experts_moved > 0
    assert 1 <= stats.expert_imbalance <= stats.expert_imbalance_worst <= 2


def test_after_warm_up_moves_of_any_number_compile_nothing() -> None:
    llm = LLM(folder("qwen3_moe"), **SETTINGS, expert_parallel_size=4, expert_placement="eplb")
    llm.warmup()
    balancer = balancer_of(llm)
    there = balancer.placement
    swapped = there.experts.copy()
    swapped[:, [0, 7]] = swapped[:, [7, 0]]
    few, all_of_them = Placement(swapped, 4, 8), Placement(np.roll(there.experts, 1, axis=1), 4, 8)
    with CompileCounter() as counter:
        for placement in (few, all_of_them, there):
            balancer.relocate(placement)
            llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(2)], GREEDY)
    assert counter.compilations == 0


def test_settings_of_experts_that_do_not_go_together_are_refused() -> None:
    for settings, message in (
        ({"expert_placement": "eplb"}, "needs expert_parallel_size above 1"),
        ({"expert_placement": "best", "expert_parallel_size": 2}, "must be one of linear, eplb"),
        ({"expert_placement": "edr", "expert_parallel_size": 2, "router_statistics": "activations"}, "transitions"),
        ({"expert_placement": "eplb", "expert_parallel_size": 2, "router_statistics": "off"}, "needs them"),
        ({"expert_placement": "edr", "expert_parallel_size": 2, "redundant_experts": 2}, "no use"),
        ({"expert_interval": 0}, "at least 1"),
        ({"expert_interval": 5, "expert_parallel_size": 2, "expert_placement": "eplb"}, "expert_window=1000 must be"),
        ({"expert_interval": 5}, "expert_interval=5 needs another expert_placement"),
        ({"dispatch_policy": "rr"}, "dispatch_policy='rr' needs several"),
        ({"theta_kv": 0.5, "expert_parallel_size": 2}, "theta_kv=0.5 needs dispatch_policy"),
        ({"user_ttl": 60.0, "expert_parallel_size": 2}, "user_ttl=60.0 needs dispatch_policy"),
        ({"user_ttl": -1, "dispatch_policy": "gimbal", "expert_parallel_size": 2}, "user_ttl=-1.0 must be at least 0"),
        ({"user_ttl": "nan", "dispatch_policy": "gimbal", "expert_parallel_size": 2}, "user_ttl=nan must be at"),
        ({"theta_age": 2.0}, "theta_age=2.0 needs scheduling_policy"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(FIXTURES / "qwen3_moe", **settings)
    with pytest.raises(ConfigError, match="router_statistics='activations': the model has no experts"):
        LLM(FIXTURES / "qwen3", router_statistics="activations")
    with pytest.raises(ConfigError, match="scheduling_policy='sjf' is that of an engine by itself"):
        AsyncLLM.from_config(EngineConfig(scheduling_policy="sjf"), cluster=ClusterConfig(prefill=1, decode=1))


@pytest.mark.parametrize("sizes", [{}, {"expert_parallel_size": 2}])
def test_statistics_are_those_of_the_last_window(sizes: dict[str, Any]) -> None:
    llm = LLM(FIXTURES / "qwen3_moe", **SETTINGS, **sizes, router_statistics="activations", expert_window=4)
    assert llm.router_statistics() is None
    assert LLM(FIXTURES / "qwen3_moe", **SETTINGS).router_statistics() is None
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(3)], GREEDY)
    seen = llm.router_statistics()
    assert seen is not None
    assert seen is llm.router_statistics()
    assert seen.transitions is None
    assert seen.sources.shape[1] == (2 if sizes else 1)
    assert 0 < seen.tokens <= 4 * 3, "the last window held decode steps only"
    assert seen.activations.sum(axis=1).tolist() == [2 * seen.tokens] * len(seen.sources)


class Counted:
    """A runner that counts tokens, of which each step has another number."""

    def __init__(self) -> None:
        self.tokens = 0

    def take_router_counts(self) -> RouterCounts:
        taken, self.tokens = self.tokens, 0
        return RouterCounts(np.array([taken]), np.zeros((1, 1, 2), np.int32), None)  # type: ignore[arg-type]


def test_windows_end_where_they_should_and_hold_their_steps_only() -> None:
    for window, period in ((3, None), (3, 5), (5, 5)):
        runner, steps = Counted(), period or window
        log = RouterLog(runner, 1, window, period)  # type: ignore[arg-type]
        for step in range(1, 21):
            ended = log.before_step()
            assert (ended is not None) == (step > 1 and (step - 1) % steps == 0)
            if ended is not None:
                assert ended is log.window
                assert (ended.tokens, ended.steps) == (sum(range(step - window, step)), window)
            runner.tokens += step


def test_a_window_that_is_ended_early_holds_its_steps_so_far_and_a_whole_one_follows() -> None:
    for window, period in ((3, None), (3, 5), (5, 5)):
        steps = period or window
        for early in range(2 * steps + 1):
            runner = Counted()
            log = RouterLog(runner, 1, window, period)  # type: ignore[arg-type]
            for step in range(early):
                log.before_step()
                runner.tokens += 2**step
            full, begin = log.window, steps - window
            phase = (early - 1) % steps + 1 if early else 0
            found = log.end_early()
            assert log.window is full
            if phase <= begin:
                assert found is None
                continue
            assert found is not None
            assert found.tokens == sum(2**step for step in range(early - phase + begin, early))
            assert log.end_early() is None
            for step in range(steps):
                assert log.before_step() is None
                runner.tokens += 2**step
            ended = log.before_step()
            assert ended is not None
            assert ended.tokens == sum(2**step for step in range(begin, steps))


@pytest.mark.parametrize("sizes", [{}, {"expert_parallel_size": 2}])
def test_statistics_so_far_are_of_all_tokens_since_the_window_began(sizes: dict[str, Any]) -> None:
    llm = LLM(FIXTURES / "qwen3_moe", **SETTINGS, **sizes, router_statistics="transitions")
    assert llm.router_statistics(so_far=True) is None
    assert LLM(FIXTURES / "qwen3_moe", **SETTINGS).router_statistics(so_far=True) is None
    for count in (1, 3):
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(count, seed=count)], GREEDY)
        found = llm.router_statistics(so_far=True)
        assert found is not None
        assert found.tokens == sum(len(prompt) + 23 for prompt in prompts(count, seed=count))
        assert found.activations.sum(axis=1).tolist() == [2 * found.tokens] * 3
        assert found.transitions is not None
        assert found.transitions.sum(axis=(1, 2)).tolist() == [4 * found.tokens] * 2
        assert llm.router_statistics() is None
