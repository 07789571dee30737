"""A layerwise prefill engine with real agents: what reaches a decode engine's memory is what the model computes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdual import LLM, EngineConfig, SamplingParams
from jaxdual.agent.client import AgentProcess
from jaxdual.agent.wire import Attach, CardPlaces, GroupSlots
from jaxdual.cluster.cards import ClusterCards
from jaxdual.config import ClusterConfig
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.layerwise import forward
from jaxdual.engine.layerwise.build import prefill_engine_of
from jaxdual.engine.layerwise.engine import PrefillEngine
from jaxdual.engine.layerwise.runner import is_ready
from jaxdual.engine.loading import load_model
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.request import Hits, Request, Target, TokenEvent
from jaxdual.engine.wire import HandedOff, HitsRead
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.store import Outcome, open_store
from jaxdual.scheduling.loads import Role
from jaxdual.transport.slab import SharedSlab
from tests.engine.models import folder

pytestmark = pytest.mark.usefixtures("shared_programs")

PAGE, BLOCKS, MODEL_LEN = 8, 20, 160
DEADLINE = 60.0  # seconds; reached only by a failing test


class World:
    """A prefill engine, a slab that stands for a decode engine's, and a store of what the model computes."""

    def __init__(self, mode: str, store: Path, **settings: Any) -> None:
        self.config = EngineConfig(
            model=str(folder("qwen3")),
            max_model_len=MODEL_LEN,
            block_size=PAGE,
            max_num_seqs=4,
            max_num_batched_tokens=48,
            num_kv_blocks=BLOCKS,
            kv_store=str(store),
            kv_store_capacity_bytes=1 << 28,
            kv_store_read_only=True,
            kv_transport="shm",
            **settings,
        )
        cluster = ClusterConfig(prefill=1, decode=1, path_mode=mode)  # type: ignore[arg-type]
        self.cards = ClusterCards(["prefill 0", "decode 1"], cluster, store.parent)
        loaded = load_model(self.config)
        part = ClusterPart(Role.PREFILL, cluster, self.cards.of("prefill 0"))
        self.engine: PrefillEngine = prefill_engine_of(loaded, self.config, part).engine
        self.layout, self.identity = loaded.layout, loaded.identity
        self.block_bytes = self.layout.full_block_bytes()
        self.there = SharedSlab(200 * self.block_bytes)
        self.peer = self.start_peer(self.cards.of("decode 1"))
        self.store = open_store(str(store), 1 << 28)
        self.free = iter(range(200))
        self.events: list[TokenEvent] = []
        self.over: dict[str, bool] = {}
        self.read: dict[str, int] = {}

    def start_peer(self, cards: CardPlaces) -> AgentProcess:
        places = [GroupSlots(0, self.block_bytes, self.block_bytes)]
        peer = AgentProcess(Attach("", 0, places, "shm", cards=cards), self.there)
        peer.wait()
        return peer

    def target(self, tokens: int) -> Target:
        offsets = tuple(next(self.free) * self.block_bytes for _ in range(self.layout.pages_for(tokens)))
        attached = self.peer.attached
        return Target(self.engine._link.attached.address, attached.address, attached.descriptor, (0,), (offsets,))

    def ask(self, name: str, prompt: Sequence[int], hits: Hits = Hits(), **params: Any) -> Target:  # noqa: B008
        request = Request(name, list(prompt), SamplingParams(max_tokens=1, temperature=0.0, **params), 0.0)
        target = self.target(len(prompt))
        self.engine.prefill(request, target, hits, moves=True)
        return target

    def blocks(self, target: Target) -> np.ndarray:
        """`[blocks, *block]`: what has been written there."""
        shape = self.layout.block_shape()
        return np.stack(
            [np.ndarray(shape, np.float32, buffer=self.there.array, offset=offset) for offset in target.offsets[0]]
        )

    def put_there(self, target: Target, first: int, blocks: np.ndarray) -> None:
        """What a decode engine reads from the store."""
        for number, block in enumerate(blocks, first):
            offset = target.offsets[0][number]
            self.there.array[offset : offset + self.block_bytes] = (
                np.ascontiguousarray(block).view(np.uint8).reshape(-1)
            )

    def put_into_store(self, prompt: Sequence[int], blocks: np.ndarray) -> None:
        root = root_key(self.identity, self.layout.fingerprint())
        keys = KeyChain(root, PAGE).upto(prompt, len(blocks))
        for number, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            parent = keys[number - 1] if number else None
            assert self.store.write(key, parent, memoryview(raw(block))).result() is Outcome.OK

    def run(self, *names: str) -> None:
        """Until these have been handed off."""
        end = time.monotonic() + DEADLINE
        while not set(names) <= self.over.keys():
            assert time.monotonic() < end, (names, self.over)
            self.turn()
        self.engine.check_integrity()

    def turn(self) -> None:
        self.events += self.engine.step()
        for message in self.engine.take_messages():
            match message:
                case HandedOff(name, complete):
                    self.over[name] = complete
                case HitsRead(name, blocks):
                    self.read[name] = blocks

    def token_of(self, name: str) -> int:
        (event,) = [event for event in self.events if event.request_id == name]
        assert event.token is not None
        return event.token

    def close(self) -> None:
        self.engine.close()
        self.peer.close(1.0)
        self.store.close()
        self.cards.close()


def raw(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block).view(np.uint8).reshape(-1)


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    """One engine by itself."""
    with contextlib.closing(
        LLM(folder("qwen3"), max_model_len=MODEL_LEN, block_size=PAGE, max_num_seqs=4, num_kv_blocks=BLOCKS)
    ) as llm:
        yield llm


def computed(alone: LLM, prompt: Sequence[int]) -> tuple[np.ndarray, int]:
    """Blocks of a prompt as an engine by itself computes them, and its next token."""
    (output,) = alone.generate([{"prompt_token_ids": list(prompt)}], SamplingParams(max_tokens=1, temperature=0.0))
    model, layout = alone._engine.runner.device.programs, alone._engine.runner.device.layout
    # By one forward pass in an arena of its own.
    pages = layout.pages_for(len(prompt))
    width = layout.pages_for(MODEL_LEN)
    arenas = (jnp.zeros(layout.arena_shape(width), jnp.float32),)
    tokens = np.zeros((1, MODEL_LEN), np.int32)
    tokens[0, : len(prompt)] = prompt
    table = GroupTable(np.arange(width, dtype=np.int32)[None])
    arenas, _, _, _ = model.prefill(
        model.leaves, arenas, tokens, np.zeros(1, np.int32), np.array([len(prompt)], np.int32), (table,)
    )
    blocks = np.asarray(arenas[0]).reshape(width, *layout.block_shape())[:pages]
    return blocks, output.outputs[0].token_ids[0]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(90, size=length).tolist()


def check_blocks(got: np.ndarray, want: np.ndarray, tokens: int) -> None:
    whole = tokens // PAGE
    np.testing.assert_allclose(got[:whole], want[:whole], atol=3e-5)
    rest = tokens % PAGE
    if rest:  # what lies behind the prompt's end means nothing
        np.testing.assert_allclose(got[whole][:, :rest], want[whole][:, :rest], atol=3e-5)


@pytest.fixture(params=["layerwise", "basic"])
def world(shared_programs: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    world = World(request.param, tmp_path / "store")
    yield world
    world.close()


def test_whole_prompts_reach_their_target_in_any_number_of_passes(world: World, alone: LLM) -> None:
    prompts = {f"{length}": prompt_of(length, length) for length in (1, 7, 8, 9, 47, 48, 49, 100, 150)}
    targets = {name: world.ask(name, prompt) for name, prompt in prompts.items()}
    world.run(*prompts)
    for name, prompt in prompts.items():
        want, token = computed(alone, prompt)
        assert world.over[name]
        assert world.token_of(name) == token
        check_blocks(world.blocks(targets[name]), want, len(prompt))


def test_no_token_is_lost_whenever_the_device_is_seen_to_be_done(
    world: World, alone: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = random.Random(4)
    monkeypatch.setattr(forward, "is_ready", lambda array: is_ready(array) and seen.random() < 0.3)
    prompts = {f"{number}": prompt_of(20 + number, number) for number in range(30)}
    for name, prompt in prompts.items():
        world.ask(name, prompt)
    world.run(*prompts)
    assert {name: world.token_of(name) for name in prompts} == {
        name: computed(alone, prompt)[1] for name, prompt in prompts.items()
    }


@pytest.mark.parametrize("here", [0, 2, 5])
@pytest.mark.parametrize("there", [0, 3, 7])
def test_blocks_that_were_read_are_not_computed(world: World, alone: LLM, here: int, there: int) -> None:
    prompt = prompt_of(110, 3)
    want, token = computed(alone, prompt)
    world.put_into_store(prompt, want[:here])
    target = world.ask("a", prompt, Hits(here, there))
    world.put_there(target, here, want[here : here + there])
    if there:
        for _ in range(5):
            world.turn()
        assert not world.over  # it waits for what is read there
        world.engine.handle(HitsRead("a", there))
    world.run("a")
    assert world.over["a"]
    assert world.token_of("a") == token
    assert world.engine.stats()["computed_prompt_tokens"] == len(prompt) - (here + there) * PAGE
    check_blocks(world.blocks(target), want, len(prompt))
    assert world.read.get("a") == (here or None)
    nbytes = world.cards.nbytes()
    assert nbytes["prefill 0 storage write"] == here * world.block_bytes
    assert world.engine.stats()["kv_staging_blocks_used"] == 0


@pytest.mark.parametrize(("found", "read_there"), [(0, 4), (1, 4), (3, 0), (3, 2)])
def test_what_could_not_be_read_is_computed(world: World, alone: LLM, found: int, read_there: int) -> None:
    prompt = prompt_of(70, 4)
    want, token = computed(alone, prompt)
    world.put_into_store(prompt, want[:found])
    target = world.ask("a", prompt, Hits(3, 4))
    world.put_there(target, 3, want[3 : 3 + read_there])
    world.engine.handle(HitsRead("a", read_there))
    world.run("a")
    assert world.over["a"]
    assert world.token_of("a") == token
    good = found if found < 3 else found + read_there
    assert world.engine.stats()["prefix_cache_hits"] == good * PAGE
    check_blocks(world.blocks(target), want, len(prompt))


def test_on_the_decode_path_nothing_that_was_hit_passes_memory_of_the_prefill_node(tmp_path: Path, alone: LLM) -> None:
    world = World("full", tmp_path / "store")
    prompt = prompt_of(100, 5)
    want, _ = computed(alone, prompt)
    target = world.ask("a", prompt, Hits(0, 12))
    world.put_there(target, 0, want[:12])
    world.engine.handle(HitsRead("a", 12))
    world.run("a")
    size, nbytes = world.block_bytes, world.cards.nbytes()
    assert world.engine.stats()["kv_staging_blocks_used"] == 0
    assert nbytes["prefill 0 storage write"] == 0
    assert nbytes["prefill 0 compute write"] == 12 * size  # from there to the device
    assert nbytes["decode 1 compute read"] == 12 * size
    assert nbytes["prefill 0 compute read"] == nbytes["decode 1 compute write"] == 1 * size  # what was computed
    world.close()


def test_a_prompt_that_is_given_up_leaves_nothing_behind(world: World) -> None:
    prompts = {str(number): prompt_of(140, number) for number in range(5)}
    for name, prompt in prompts.items():
        world.ask(name, prompt, Hits(0, 2) if name == "4" else Hits())
    for number in range(12):
        world.turn()
        if number % 3 == 0:
            world.engine.abort(str(number // 3))
    world.engine.abort("4")
    world.run(*prompts)
    assert not world.over["4"]
    assert not world.over["3"]
    assert not world.engine.has_work
    assert world.engine._pages.num_free == world.engine.runner.num_pages


def test_a_dead_agent_costs_what_was_under_way_and_no_more(world: World, alone: LLM) -> None:
    for number in range(3):
        world.ask(str(number), prompt_of(140, number))
    for _ in range(6):
        world.turn()
    before = set(world.over)  # all of it was there
    os.kill(world.engine._link._agent.pid, signal.SIGKILL)  # type: ignore[union-attr]
    world.run("0", "1", "2")
    assert not any(complete for name, complete in world.over.items() if name not in before)
    assert len(before) < 3
    assert world.engine._landing.num_lent == world.engine._leaving.num_lent == 0
    while world.engine._link.attached is None:
        world.turn()
    prompt = prompt_of(60, 9)
    want, token = computed(alone, prompt)
    target = world.ask("after", prompt)
    world.run("after")
    assert world.over["after"]
    assert world.token_of("after") == token
    check_blocks(world.blocks(target), want, len(prompt))


def test_a_target_that_is_gone_is_a_prompt_that_fails(world: World) -> None:
    world.peer.kill()
    world.ask("a", prompt_of(30))
    world.run("a")
    assert not world.over["a"]


def test_modes_take_turns_in_one_engine(world: World, alone: LLM) -> None:
    prompt = prompt_of(90, 6)
    want, token = computed(alone, prompt)
    pages = set()
    for mode in ("basic", "full", "layerwise", "basic"):
        world.engine.use_mode(mode)
        pages.add((mode in ("full", "layerwise"), world.engine.runner.num_pages))
        target = world.ask(f"{mode} {len(world.over)}", prompt)
        world.run(f"{mode} {len(world.over)}")
        check_blocks(world.blocks(target), want, len(prompt))
    assert {event.token for event in world.events} == {token}
    layers = world.layout.num_layers
    assert pages == {(False, BLOCKS), (True, BLOCKS * layers // min(3, layers))}
    with pytest.raises(ValueError, match="mode='none' must be one of"):
        world.engine.use_mode("none")
    world.ask("running", prompt)
    with pytest.raises(ValueError, match="1 prompts are under way"):
        world.engine.use_mode("full")
    world.run("running")


def test_scores_and_sampling_are_those_of_an_engine_by_itself(world: World, alone: LLM) -> None:
    prompt = prompt_of(100, 7)
    params = {"prompt_logprobs": 2, "logprobs": 3, "seed": 5}
    (output,) = alone.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, temperature=0.0, **params))
    world.ask("a", prompt, **params)
    world.run("a")
    (event,) = world.events
    assert event.token == output.outputs[0].token_ids[0]
    assert event.prompt_logprobs is not None
    assert output.prompt_logprobs is not None
    chosen = [position[token].logprob for token, position in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    np.testing.assert_allclose([one.chosen for one in event.prompt_logprobs], chosen, atol=1e-4)


def test_wrong_requests_are_refused(world: World) -> None:
    world.ask("a", prompt_of(5))
    with pytest.raises(ValueError, match="in use"):
        world.ask("a", prompt_of(5))
    request = Request("b", [1, 2], SamplingParams(max_tokens=3), 0.0)
    with pytest.raises(ValueError, match="one token more"):
        world.engine.prefill(request, world.target(2), Hits(), moves=True)
    world.run("a")
