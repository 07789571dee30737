"""The comparison by the clock: what its arms are, and what a run of real requests is said to have taken."""

from __future__ import annotations

import asyncio

import pytest

from bench.moe.arms import Arm
from bench.moe.wall_clock import SCALE, WALL_CLOCK_ARMS, _scaled, serve, settings_of
from bench.moe.workload import Arrival
from jaxdual import AsyncLLM, EngineConfig
from tests.engine.models import FIXTURES


def test_arms_are_engines_that_differ_in_policies_only_and_have_scaled_limits() -> None:
    assert [arm.name for arm in WALL_CLOCK_ARMS[:2]] == ["rr", "vllm_counts"]
    configs = {arm.name: EngineConfig(**settings_of(arm)) for arm in WALL_CLOCK_ARMS}
    assert len(configs) == 9
    gimbal, baseline = configs["Gimbal"], configs["rr"]
    assert (gimbal.dispatch_policy, gimbal.scheduling_policy, gimbal.expert_placement) == ("gimbal", "sjf", "edr")
    assert (gimbal.theta_load, gimbal.theta_age, gimbal.expert_interval) == (3000 // 16, 5 / 16, 3000 // 16)
    policies = {"dispatch_policy", "scheduling_policy", "expert_placement", "router_statistics"}
    policies |= {"theta_load", "theta_age", "expert_interval"}
    for config in configs.values():
        different = {name for name in config.__slots__ if getattr(config, name) != getattr(baseline, name)}
        assert different <= policies


def test_requests_have_a_sixteenth_of_the_tokens_and_fit() -> None:
    small, usual, long = _scaled([Arrival(2.0, 5, 5), Arrival(3.0, 1600, 320), Arrival(4.0, 16000, 4000)], 0.5)
    assert (small.time, small.prompt, small.output) == (1.0, 1, 2)
    assert (usual.time, usual.prompt, usual.output) == (1.5, 1600 // SCALE, 320 // SCALE)
    assert (long.prompt, long.output) == (400, 100)


def test_a_run_says_how_long_requests_took_since_they_were_due() -> None:
    async def run() -> None:
        settings = {"max_model_len": 128, "max_num_seqs": 2, "num_kv_blocks": 8, "dispatch_policy": "vllm_counts"}
        async with AsyncLLM(FIXTURES / "qwen3", **settings) as llm:
            await llm.warmed_up()
            requests = [Arrival(0.0, 20, 4), Arrival(0.3, 7, 6), Arrival(0.3, 30, 2)]
            outcome = await serve(llm, requests, list(range(300)))
        figures = outcome.figures()
        assert len(outcome.ttft) == len(outcome.tpot) == len(outcome.waited) == 3
        assert all(0 < seconds < 60 for seconds in outcome.ttft)
        assert outcome.tokens == 12
        assert outcome.seconds >= 0.3
        assert outcome.steps >= 6
        assert figures["tokens_per_s"] == pytest.approx(12 / outcome.seconds)

    asyncio.run(asyncio.wait_for(run(), 300))


def test_arms_of_the_settings_names_only() -> None:
    assert not any(arm.remaining or arm.dispatch == "affinity" for arm in WALL_CLOCK_ARMS)
    assert Arm("rr") in WALL_CLOCK_ARMS
