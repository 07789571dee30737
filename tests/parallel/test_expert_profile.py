"""Experts that are placed by a profile while an engine loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual import LLM, AsyncLLM, EngineConfig
from jaxdual.config import ConfigError
from jaxdual.engine.loading import load_model
from jaxdual.routers import RouterProfile, read_profile, write_profile
from jaxdual.scheduling.expert_policies import RouterWindow
from jaxdual.scheduling.experts import eplb
from models.errors import ModelError
from models.moe import MoE
from tests.engine.models import FIXTURES, TieCounter, load
from tests.parallel.test_expert_balancer import GREEDY, SETTINGS, balancer_of, prompts, stacks
from tests.parallel.test_processes import PROCESSES, free_port, generate, in_a_loop, running

MODEL = FIXTURES / "qwen3_moe"
EDR: dict[str, Any] = {"expert_placement": "edr", "expert_interval": 6, "expert_window": 3}
POOL = {(0, 2), (1, 5), (2, 1), (1, 7), (2, 0)}  # layers and experts of the pairs that `profile` has most of


def profile(seed: int = 0) -> RouterProfile:
    """Made up: the same pairs are frequent whatever the seed, all else is chosen at random."""
    rng = np.random.default_rng(seed)
    transitions = rng.integers(0, 20, (2, 8, 8))
    for gap, before, after in ((0, 2, 5), (1, 5, 1), (1, 7, 0)):
        transitions[gap, before, after] = 50
    fingerprint = LLM(MODEL, **SETTINGS).info.fingerprint
    return RouterProfile(RouterWindow(100, rng.integers(0, 50, (3, 1, 8)), transitions), fingerprint)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "profile.npz"
    write_profile(path, profile())
    return str(path)


@pytest.mark.parametrize("sizes", [{"expert_parallel_size": 2}, {"data_parallel_size": 2, "expert_parallel_size": 2}])
def test_the_pool_of_a_profile_lies_on_the_anchor_from_the_start_and_never_moves(
    sizes: dict[str, Any], file: str
) -> None:
    alone = LLM(MODEL, **SETTINGS).generate([{"prompt_token_ids": prompt} for prompt in prompts(8)], GREEDY)
    llm = LLM(MODEL, **SETTINGS, **sizes, **EDR, expert_profile=file, expert_anchor=1)
    balancer = balancer_of(llm)
    first = balancer.placement
    of_device = {(layer, expert) for layer in range(3) for expert in first.experts[layer, 4:].tolist()}
    assert of_device > POOL
    weights = [layer.mlp.experts for layer in load("qwen3_moe").layers if isinstance(layer.mlp, MoE)]
    for row, experts in enumerate(weights):
        for found, name in zip(stacks(llm, row), ("gate", "up", "down"), strict=True):
            np.testing.assert_array_equal(found, np.asarray(getattr(experts, name)[...])[first.experts[row]])
    outputs = [llm.submit({"prompt_token_ids": prompt}, GREEDY) for prompt in prompts(8)]
    slots = {place: np.flatnonzero(first.experts[place[0]] == place[1]).item() for place in POOL}
    while llm.has_unfinished:
        llm.step()
        assert all(balancer.placement.experts[layer, slots[layer, expert]] == expert for layer, expert in POOL)
    assert llm.stats().expert_relocations >= 3
    assert llm.stats().experts_moved > 0
    ties = TieCounter("qwen3_moe")
    for prompt, one, other in zip(prompts(8), alone, outputs, strict=True):
        ties.compare(prompt, one.outputs[0].token_ids, other.outputs[0].token_ids)
    ties.check()


def test_a_profile_pins_the_same_experts_of_all_layers_in_one_column(file: str) -> None:
    settings = SETTINGS | EDR | {"expert_parallel_size": 2, "expert_placement": "edr_column"}
    llm = LLM(MODEL, **settings, expert_profile=file, expert_anchor=1)
    balancer, window = balancer_of(llm), read_profile(Path(file)).window
    assert window.transitions is not None
    before, after = np.unravel_index(window.transitions.sum(axis=0).argmax(), (8, 8))
    for _ in range(2):
        for row in balancer.placement.experts:
            assert row.tolist() == balancer.placement.experts[0].tolist()
            assert {int(before), int(after)} <= set(row[4:].tolist())
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(8)], GREEDY)
    assert llm.stats().expert_relocations >= 3


def test_without_a_profile_the_pool_lies_on_the_anchor_from_the_first_window_on() -> None:
    llm = LLM(MODEL, **SETTINGS, **EDR, expert_parallel_size=2, expert_anchor=1)
    balancer = balancer_of(llm)
    assert balancer.placement.experts.tolist() == [list(range(8))] * 3
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(8)], GREEDY)
    assert balancer._policy is not None
    pool: np.ndarray = balancer._policy._pool  # type: ignore[attr-defined]
    assert pool.any()
    assert (balancer.placement.devices_of()[pool] == 1).all()


def test_eplb_begins_with_the_loads_of_a_profile(file: str) -> None:
    llm = LLM(
        MODEL, **SETTINGS, expert_parallel_size=2, expert_placement="eplb", redundant_experts=2, expert_profile=file
    )
    want = eplb(read_profile(Path(file)).window.activations, 2, redundant=2)
    np.testing.assert_array_equal(balancer_of(llm).placement.experts, want.experts)


def test_profiles_that_cannot_be_used_are_refused(file: str, tmp_path: Path) -> None:
    good, other = read_profile(Path(file)), str(tmp_path / "other.npz")
    window = good.window
    edr: dict[str, Any] = {"expert_placement": "edr", "expert_parallel_size": 2}
    for changed, settings, message in (
        (dataclasses.replace(good, fingerprint="00"), edr, "is of another model or number type than .*qwen3_moe"),
        (good, edr | {"dtype": "bfloat16"}, "is of another model or number type than .*qwen3_moe in bfloat16"),
        (
            dataclasses.replace(good, window=RouterWindow(100, window.sources[:2], window.transitions[:1])),  # type: ignore[index]
            edr,
            "is of 2 layers of 8 experts, and the model has 3 of 8",
        ),
        (
            dataclasses.replace(good, window=RouterWindow(100, window.sources[:, :, :4])),
            edr | {"expert_placement": "eplb"},
            "is of 3 layers of 4 experts",
        ),
        (
            dataclasses.replace(good, window=RouterWindow(100, window.sources)),
            edr | {"expert_placement": "edr_column"},
            "has no transitions, which expert_placement='edr_column' needs",
        ),
        (good, {}, 'needs expert_placement="eplb", "metro", "edr" or "edr_column"'),
        (good, edr | {"expert_placement": "source"}, 'needs expert_placement="eplb", "metro", "edr" or "edr_column"'),
    ):
        write_profile(Path(other), changed)
        with pytest.raises(ConfigError, match=f"expert_profile='{other}' {message}"):
            LLM(MODEL, **SETTINGS, **settings, expert_profile=other)
    with pytest.raises(ConfigError, match="missing: can't be read"):
        LLM(MODEL, **SETTINGS, **edr, expert_profile="missing")
    for settings, message in (
        (edr | {"expert_anchor": 2}, "expert_anchor=2 must be below expert_parallel_size=2"),
        (edr | {"expert_anchor": -1}, "expert_anchor=-1 must be at least 0"),
        (edr | {"expert_placement": "eplb", "expert_anchor": 1}, 'expert_anchor=1 needs expert_placement="edr" or'),
    ):
        with pytest.raises(ConfigError, match=message):
            EngineConfig(**settings)


class Others:
    """Other processes that agree to everything."""

    def __init__(self) -> None:
        self.agreed: dict[str, bytes] = {}

    def agree(self, what: str, identity: bytes) -> None:
        self.agreed[what] = identity


def test_processes_agree_on_the_first_placement(file: str, tmp_path: Path) -> None:
    """Whatever else is in their profiles."""
    placed = []
    loads = read_profile(Path(file)).window.sources
    for number, sources in enumerate((loads, loads[:, :, ::-1], 2 * loads)):
        path, others = tmp_path / f"{number}.npz", Others()
        write_profile(path, RouterProfile(RouterWindow(100, sources), profile().fingerprint))
        config = EngineConfig(
            model=str(MODEL), **SETTINGS, expert_parallel_size=2, expert_placement="eplb", expert_profile=str(path)
        )
        load_model(config, others)  # type: ignore[arg-type]
        assert list(others.agreed) == ["configuration", "model or expert_profile"]
        placed.append(others.agreed["model or expert_profile"])
    assert placed[0] == placed[2] != placed[1]


@pytest.mark.slow
@in_a_loop
async def test_processes_with_one_profile_give_the_tokens_of_one_and_those_with_two_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads the file in its own folder."""
    alone = LLM(MODEL, **SETTINGS).generate([{"prompt_token_ids": prompt} for prompt in prompts(3)], GREEDY)
    folders = [tmp_path / name for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_profile(folder / "profile.npz", profile(seed))
    monkeypatch.chdir(folders[0])
    settings = SETTINGS | PROCESSES | EDR | {"expert_parallel_size": 2, "expert_profile": "profile.npz"}
    ties = TieCounter("qwen3_moe")
    async with AsyncLLM(MODEL, **settings) as llm:
        for number, prompt in enumerate(prompts(3)):
            output = await generate(llm, prompt, GREEDY, str(number))
            ties.compare(prompt, alone[number].outputs[0].token_ids, output.outputs[0].token_ids)
        assert (await llm.stats()).expert_relocations > 0
    ties.check()
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.chdir(folders[1])
    with running("jaxdual.follower", "--coordinator-address", address, "--process-id", "1") as follower:
        monkeypatch.chdir(folders[0])
        with pytest.raises(ModelError, match="process 1 has another model or expert_profile than process 0"):
            async with AsyncLLM(MODEL, **settings, coordinator_address=address):
                pass
        follower.communicate(timeout=60)
        assert follower.returncode == 1
