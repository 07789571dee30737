"""The simulated cluster: bytes and limits that are known exactly, and the same run twice."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

import jaxdual.sim.nodes
from jaxdual.config import ConfigError
from jaxdual.offline.trace import Session, Turn
from jaxdual.scheduling.capacity import ResourceBytes, allowed_ratio, path_bytes, persist_bytes
from jaxdual.scheduling.read_side import ReadSide
from jaxdual.sim.cluster import ClusterSim
from jaxdual.sim.config import SimConfig, read_sim_config
from jaxdual.sim.decode import DecodeCost, Finished
from jaxdual.sim.nodes import Request
from jaxdual.sim.report import Measures, build_report
from jaxdual.sim.workload import sessions_of, starts_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "sim"
SMALL = ("cluster.gpus=4", "workload.max_len=32K", "workload.agents=48", "workload.turns=12")
# Only cards take time.
FAST = (
    *("prefill.flops=1e24", "prefill.attention_flops=1e24", "prefill.pass_seconds=1e-6", "prefill.kv_bytes=1e15"),
    *("decode.step_seconds=1e-6", "decode.sequence_seconds=0.0", "decode.kv_bytes=1e12"),
    *("cluster.copy_seconds=0.0", "cluster.fetch_seconds=0.001", "cluster.snic=4e9"),
)


def config_of(*settings: str) -> SimConfig:
    return read_sim_config(EXAMPLES / "ds660b.toml", settings)


def readers(agents: int, turns: int) -> list[Session]:
    """Agents that read long prompts again and again, and compute nearly nothing."""
    return [
        Session(str(agent), (Turn(20_000 + 640 * (agent % 7), 1), *[Turn(1, 1)] * turns)) for agent in range(agents)
    ]


def simulate(
    config: SimConfig, sessions: list[Session] | None = None
) -> tuple[ClusterSim, dict[str, Any], list[Request]]:
    sessions = sessions or sessions_of(config)
    starts = starts_of(config, sessions)
    measures, done = Measures(sessions, starts), list[Request]()

    def finished(request: Request, now: float) -> None:
        measures.take(request, now)
        done.append(request)

    sim = ClusterSim(config, sessions, starts, finished)
    return sim, build_report(config, sim, measures, sim.run(), {}), done


def read_seconds(*settings: str) -> float:
    """That such agents take."""
    return float(simulate(config_of(*FAST, *settings), readers(192, 40))[1]["jct_s"])


@pytest.mark.parametrize("mode", ["basic", "layerwise", "roundrobin", "full", "split", "oracle"])
def test_every_request_is_served_and_nothing_is_left(mode: str) -> None:
    sim, report, done = simulate(config_of(*SMALL, f"mode={mode}"))
    assert report["requests"]["ok"] == report["requests"]["planned"] == len(done)
    sim.scheduler.check_integrity()
    assert len(sim.scheduler) == 0
    for node in (*sim.prefill_nodes, *sim.decode_nodes):
        assert node.buffer.used == pytest.approx(0.0, abs=1.0)
        assert node.buffer.most <= node.buffer.capacity
        assert not node.queue
    for engine in sim.decode_engines:
        assert engine.used == 0
        assert not engine.requests
    for request in done:
        times = [request.arrival, request.placed, request.allocated, request.ready, request.first]
        assert times == sorted(times)
        assert request.output == 1 or request.second > request.first


@pytest.mark.parametrize("mode", ["basic", "full", "roundrobin", "split"])
def test_bytes_are_those_of_the_formulas(mode: str) -> None:
    """DualPath 4.1 and 4.2, with what is computed and stored: no prompt is cut, so nothing is streamed twice."""
    config = config_of(*SMALL, f"mode={mode}", "prefill.quota_seconds=1e9", "prefill.batch_tokens=10000000")
    sim, _, done = simulate(config)
    block, size = config.scheduler.block_tokens, config.model.kv_token_bytes
    want = ResourceBytes()
    for request in done:
        read, miss = request.plan.read, request.prompt - request.hit
        want += path_bytes(ReadSide.PREFILL, read.prefill_tokens * size, 0)
        want += path_bytes(ReadSide.DECODE, read.decode_tokens * size, miss * size)
        before = (request.prompt // block * block - request.hit) * size
        after = ((request.prompt + request.output) // block - request.prompt // block) * block * size
        want += persist_bytes(after, max(0, before))
    prefill, decode = sim.prefill_engines, sim.decode_engines
    got = {
        "prefill_store_read": sum(node.snic.write.nbytes for node in sim.prefill_nodes),
        "decode_store_read": sum(node.snic.write.nbytes for node in sim.decode_nodes),
        "decode_store_write": sum(node.snic.read.nbytes for node in sim.decode_nodes),
        "prefill_nic_read": sum(engine.nic.read.nbytes for engine in prefill),
        "prefill_nic_write": sum(engine.nic.write.nbytes for engine in prefill),
        "decode_nic_read": sum(engine.nic.read.nbytes for engine in decode),
        "decode_nic_write": sum(engine.nic.write.nbytes for engine in decode),
        "prefill_dram": sum(node.dram.nbytes for node in sim.prefill_nodes),
        "decode_dram": sum(node.dram.nbytes for node in sim.decode_nodes),
    }
    expected = dataclasses.asdict(want)
    assert got == {name: pytest.approx(expected[name], rel=1e-9) for name in got}
    assert sum(node.snic.read.nbytes for node in sim.prefill_nodes) == 0
    assert (got["decode_store_read"] > 0) == (mode != "basic")


@pytest.mark.parametrize(
    ("prefill", "decode", "full"),
    [
        (1, 7, {"prefill compute write"}),
        (7, 2, {"decode compute write"}),
        (2, 4, set[str]()),
        (1, 1, set[str]()),
    ],
)
def test_compute_cards_fill_up_with_the_storage_cards_at_the_ratio_s_limits_only(
    prefill: int, decode: int, full: set[str]
) -> None:
    config = config_of(
        *FAST,
        *(f"cluster.prefill_nodes={prefill}", f"cluster.decode_nodes={decode}", "cluster.nic=4e9", "cluster.gpus=8"),
    )
    interval = allowed_ratio(config.cluster.node_rates())
    inside = interval.low < prefill / decode < interval.high
    assert inside == (not full)
    report = simulate(config, readers(180, 60))[1]
    kinds = report["nics"]["kinds"]
    read = sum(kinds[f"{side} storage"]["write"]["bytes"] for side in ("prefill", "decode"))
    storage = read / (report["seconds"] * (prefill + decode) * config.cluster.snic)
    loads = {
        f"{side} compute {direction}": kinds[f"{side} compute"][direction]["utilisation"] / storage
        for side in ("prefill", "decode")
        for direction in ("read", "write")
    }
    assert {name for name, load in loads.items() if load > 0.95} == full
    assert all(load < 1.05 for load in loads.values())


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (1, 2), (2, 1)])
def test_reading_on_both_sides_gains_what_cards_there_are_more(prefill: int, decode: int) -> None:
    cluster = (f"cluster.prefill_nodes={prefill}", f"cluster.decode_nodes={decode}")
    limit = (prefill + decode) / prefill
    basic, both = (read_seconds(*cluster, f"mode={mode}") for mode in ("basic", "full"))
    assert basic / both == pytest.approx(limit, rel=0.05)


def test_prefill_nodes_are_what_counts_where_they_alone_read() -> None:
    """Figure 8: Basic 1P1D is like Basic 1P2D, DualPath 1P1D like Basic 2P1D, DualPath 2P1D like DualPath 1P2D."""

    def of(prefill: int, decode: int, mode: str) -> float:
        nodes = (f"cluster.prefill_nodes={prefill}", f"cluster.decode_nodes={decode}")
        return read_seconds(*nodes, f"mode={mode}")

    assert of(1, 1, "basic") == pytest.approx(of(1, 2, "basic"), rel=0.05)
    assert of(1, 1, "full") == pytest.approx(of(2, 1, "basic"), rel=0.05)
    assert of(2, 1, "full") == pytest.approx(of(1, 2, "full"), rel=0.05)


@pytest.mark.parametrize("mode", ["basic", "full", "roundrobin", "split"])
@pytest.mark.parametrize("buffer", [3e9, 6e9])
def test_buffers_for_a_few_prompts_are_enough(mode: str, buffer: float) -> None:
    rng = random.Random(buffer)
    sessions = [
        Session(str(agent), (Turn(rng.randrange(1_000, 50_000), 20), *[Turn(rng.randrange(1, 900), 20)] * 5))
        for agent in range(60)
    ]
    settings = (f"cluster.decode_buffer={buffer}", f"cluster.prefill_buffer={buffer}", "cluster.gpus=4")
    sim, report, _ = simulate(config_of(*settings, f"mode={mode}"), sessions)
    assert report["requests"]["ok"] == 360
    assert not any(node.queue or node.cold for node in (*sim.prefill_nodes, *sim.decode_nodes))


def first_token(mode: str, *settings: str, agents: int = 1) -> float:
    """Seconds from the end of the read to the last agent's first token, of prompts of 20,032 tokens that are stored but
    for one, computed in no time.
    """
    nodes = ("cluster.prefill_nodes=1", "cluster.decode_nodes=1", "cluster.gpus=1", "workload.stored=true")
    sessions = [Session(str(agent), (Turn(20_033, 1),)) for agent in range(agents)]
    done = simulate(config_of(*FAST, *nodes, f"mode={mode}", *settings), sessions)[2]
    return max(request.first for request in done) - max(request.ready for request in done)


def test_moving_takes_what_cards_and_submission_need() -> None:
    token_bytes = config_of().model.kv_token_bytes
    in_seconds, out_seconds = 20_032 * token_bytes / 50e9, 20_033 * token_bytes / 50e9
    # All that came goes to the decode side: one after the other, or together but through one direction of the card.
    assert first_token("basic") == pytest.approx(in_seconds + out_seconds, rel=1e-3)
    assert first_token("layerwise") == pytest.approx((in_seconds + out_seconds) * 62 / 61, rel=1e-3)
    copies = 2 * 313 * 61
    slow = first_token("basic", "cluster.copy_seconds=1e-4")
    assert slow == pytest.approx(copies * 1e-4, rel=1e-2)


def test_a_memory_that_is_slower_than_the_card_is_what_reads_wait_for() -> None:
    nodes = ("cluster.prefill_nodes=1", "cluster.decode_nodes=1", "cluster.gpus=1", "workload.stored=true")
    sessions = [Session("0", (Turn(20_033, 1),))]
    (request,) = simulate(config_of(*FAST, *nodes, "mode=basic", "cluster.dram=1e9"), sessions)[2]
    read = 20_032 * config_of().model.kv_token_bytes
    assert request.ready - request.placed == pytest.approx(read / 1e9)


class StepwiseBatch:
    """`DecodeBatch`, one step at a time."""

    def __init__(self, cost: DecodeCost) -> None:
        self._cost = cost
        self._batch: list[list[int]] = []  # sequence, context, tokens left
        self._joining: list[list[int]] = []
        self._began = 0.0

    @property
    def all_run(self) -> bool:
        return not self._joining

    @property
    def step_seconds(self) -> float:
        return self._cost.seconds(1, len(self._batch), sum(context for _, context, _ in self._batch))

    @property
    def next_time(self) -> float | None:
        if not self._batch:
            return self._began if self._joining else None
        return self._began + self.step_seconds

    def join(self, now: float, sequence: int, context: int, tokens: int) -> None:
        if not self._batch and not self._joining:
            self._began = now
        self._joining.append([sequence, context, tokens])

    def advance(self, now: float) -> list[Finished]:
        self._began = now
        for one in self._batch:
            one[1] += 1
            one[2] -= 1
        done = [Finished(number, now, context) for number, context, left in self._batch if not left]
        self._batch = [one for one in self._batch if one[2]] + self._joining
        self._joining = []
        return done


def test_decoding_in_closed_form_is_decoding_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*SMALL, "workload.agents=24", "workload.turns=6", "decode.token_seconds=2e-8")
    closed = simulate(config_of(*settings))[1]
    monkeypatch.setattr(jaxdual.sim.nodes, "DecodeBatch", StepwiseBatch)
    steps = simulate(config_of(*settings))[1]
    assert closed["jct_s"] == pytest.approx(steps["jct_s"], rel=1e-6)
    for name in ("ttft_s", "ttst_s", "tpot_s"):
        assert closed[name] == pytest.approx(steps[name], rel=1e-4)


def test_the_same_seed_gives_the_same_report() -> None:
    def report(seed: int) -> dict[str, Any]:
        found = simulate(config_of(*SMALL, f"seed={seed}"))[1]
        del found["simulation"]
        return found

    assert report(3) == report(3)
    assert report(3)["jct_s"] != report(4)["jct_s"]


def test_blocks_that_agents_share_are_found(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [(0, 1300, [1, 2, 3]), (60_000, 1500, [1, 2, 4]), (120_000, 600, [5, 2])]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": time, "input_length": length, "output_length": 5, "hash_ids": ids}) + "\n"
            for time, length, ids in lines
        )
    )
    config = config_of(f"workload.trace={trace}", "workload.speed=2.0", "workload.agents=3")
    done = simulate(config)[2]
    assert [(request.arrival, request.hit) for request in done] == [(0.0, 0), (30.0, 1024), (60.0, 0)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.gpus=0", r"ds660b.toml: cluster.gpus: expected `int` >= 1"),
        ("cluster.gpu=4", r"unknown field `gpu`"),
        ("mode=fast", r"mode: invalid enum value 'fast'"),
        ("workload.max_len=16K", r"workload.max_len: invalid enum value '16K'"),
        ("cluster.collective_share=1.0", r"cluster.collective_share: expected `float` < 1"),
        ("model.attention.kind=dense", r"model.attention.kind: invalid value 'dense'"),
        ("cluster", r"--set 'cluster' must be section.key=value"),
        ("mode.x=1", r"mode is not a section"),
        ("decode.kv_bytes=1e6", r"decode.kv_bytes=1e\+06 hold 20 tokens: session 64k-0 has a request of \d+"),
        ("workload.trace=/none.jsonl", r"/none.jsonl: cannot be read"),
    ],
)
def test_what_can_t_be_simulated_is_refused_with_file_key_and_range(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sessions_of(config_of(setting))
    assert issubclass(ConfigError, ValueError)
