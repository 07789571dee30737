"""The P/D calculator against the figures of the paper's analysis, and byte formulas against Figure 4 step by step."""

from __future__ import annotations

from dataclasses import asdict, astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.scheduling.capacity import (
    Loads,
    NodeRates,
    ResourceBytes,
    allowed_ratio,
    cache_compute_ratio,
    loads,
    overloaded,
    path_bytes,
    persist_bytes,
    restream_bytes,
    speedup_ceiling,
)
from jaxdual.scheduling.quota import GroupedAttention, SparseLatentAttention
from jaxdual.scheduling.read_side import ReadSide

PAPER = NodeRates(gpus=8, nic=50e9, storage=1.0, dram=500e9)


def test_allowed_ratio_of_the_paper_s_hardware() -> None:
    interval = allowed_ratio(PAPER)
    assert (interval.low, interval.high) == (1 / 7, 7 / 2)
    assert not interval.is_empty


@pytest.mark.parametrize(
    ("rates", "low", "high"),
    [
        (NodeRates(8, 50e9, 1.0, 300e9), 1 / 7, 1.5),  # memory limits: (300/50 - 3) / 2
        (NodeRates(8, 50e9, 1.0, 1e15), 1 / 7, 7 / 2),  # decode NIC write limits: (8 - 1) / 2
        (NodeRates(8, 50e9, 3.0, 1e15), 3 / 5, 2 / 3),  # decode NIC read limits: (8 - 6) / 3; write: 5 / 6
        (NodeRates(2, 100e6, 0.25, 250e6), 1 / 7, 7 / 2),  # the paper's ratios in small
    ],
)
def test_the_tightest_condition_bounds_the_ratio(rates: NodeRates, low: float, high: float) -> None:
    interval = allowed_ratio(rates)
    assert (interval.low, interval.high) == pytest.approx((low, high))


@pytest.mark.parametrize("storage", [4.5, 7.9, 8.0, 9.0])
def test_no_ratio_is_allowed_when_storage_outruns_half_the_compute_nics(storage: float) -> None:
    assert allowed_ratio(NodeRates(8, 50e9, storage, 1e15)).is_empty


@pytest.mark.parametrize(
    ("nodes", "in_units_of_nic", "decode_dram"),
    [
        ((1, 1), (0.25, 0.25, 0.375, 0.375), 250e9),
        ((2, 4), (0.25, 0.375, 0.3125, 0.25), 200e9),
        ((1, 2), (0.25, 0.375, 0.3125, 0.25), 200e9),
        ((2, 1), (0.25, 0.1875, 0.5, 0.625), 350e9),
    ],
)
def test_loads_of_common_ratios(nodes: tuple[int, int], in_units_of_nic: tuple[float, ...], decode_dram: float) -> None:
    found = astuple(loads(*nodes, PAPER))
    assert found == (*(unit * 50e9 for unit in in_units_of_nic), 100e9, decode_dram)
    assert overloaded(*nodes, PAPER) == ()


def test_both_ends_of_the_interval_fill_what_they_should() -> None:
    most_prefill, most_decode = loads(7, 2, PAPER), loads(1, 7, PAPER)
    assert (most_prefill.decode_nic_write, most_prefill.decode_dram) == (50e9, 500e9)
    assert most_decode.prefill_nic_write == pytest.approx(50e9)
    assert overloaded(7, 2, PAPER) == overloaded(1, 7, PAPER) == ()
    assert overloaded(8, 2, PAPER) == ("decode_nic_write", "decode_dram")
    assert overloaded(1, 8, PAPER) == ("prefill_nic_write",)


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(
    prefill=st.integers(1, 20),
    decode=st.integers(1, 20),
    gpus=st.integers(1, 16),
    storage=st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0]),
    dram=st.sampled_from([3, 4, 5, 8, 10, 20, 100]),
)
def test_a_ratio_is_allowed_just_when_nothing_is_overloaded(
    prefill: int, decode: int, gpus: int, storage: float, dram: int
) -> None:
    rates = NodeRates(gpus, 1.0, storage, float(dram) * storage)
    interval, ratio = allowed_ratio(rates), prefill / decode
    allowed = interval.low - 1e-12 <= ratio <= interval.high + 1e-12
    assert allowed == (not overloaded(prefill, decode, rates))


def test_too_much_storage_overloads_what_the_text_says() -> None:
    assert overloaded(1, 1, NodeRates(8, 1.0, 4.0, 1e9)) == ("decode_nic_read", "decode_nic_write")
    assert "prefill_nic_read" in overloaded(1, 1, NodeRates(8, 1.0, 4.1, 1e9))
    assert "prefill_dram" in overloaded(1, 1, NodeRates(8, 1.0, 1.0, 1.9))


@pytest.mark.parametrize(("nodes", "ceiling"), [((1, 1), 2.0), ((2, 4), 3.0), ((1, 2), 3.0), ((2, 1), 1.5)])
def test_speedup_ceiling(nodes: tuple[int, int], ceiling: float) -> None:
    assert speedup_ceiling(*nodes) == ceiling


@pytest.mark.parametrize("nodes", [(0, 1), (1, 0), (-1, 2)])
def test_a_cluster_has_nodes_of_both_kinds(nodes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        speedup_ceiling(*nodes)
    with pytest.raises(ValueError, match="at least 1"):
        loads(*nodes, PAPER)


def test_hardware_without_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        NodeRates(nic=0.0)


# Bytes.

# Figure 4: for each step the resources that it passes, and whether hit, miss or all of the prompt's KV does.
PREFILL_STEPS = [
    ("hit", ["prefill_store_read"]),
    ("hit", ["prefill_dram"]),
    ("hit", ["prefill_dram", "prefill_nic_read"]),
    ("hit", ["prefill_nic_write"]),
    ("all", ["prefill_nic_read"]),
    ("all", ["to_decode"]),
    ("all", ["decode_nic_write", "decode_dram"]),
    ("all", ["decode_dram", "decode_nic_read"]),
    ("all", ["decode_nic_write"]),
]
DECODE_STEPS = [
    ("hit", ["decode_store_read"]),
    ("hit", ["decode_dram"]),
    ("hit", ["decode_dram", "decode_nic_read"]),
    ("hit", ["to_prefill"]),
    ("hit", ["prefill_nic_write"]),
    ("miss", ["prefill_nic_read", "to_decode", "decode_nic_write", "decode_dram"]),
    ("all", ["decode_dram", "decode_nic_read"]),
    ("all", ["decode_nic_write"]),
]


@pytest.mark.parametrize(("side", "steps"), [(ReadSide.PREFILL, PREFILL_STEPS), (ReadSide.DECODE, DECODE_STEPS)])
def test_path_bytes_are_the_sum_of_the_figure_s_steps(side: ReadSide, steps: list[tuple[str, list[str]]]) -> None:
    sizes = {"hit": 1000, "miss": 7, "all": 1007}
    expected = dict.fromkeys(asdict(ResourceBytes()), 0)
    for what, resources in steps:
        for resource in resources:
            expected[resource] += sizes[what]
    assert asdict(path_bytes(side, hit=1000, miss=7)) == expected


def test_a_hit_byte_crosses_compute_nics_six_times_on_one_path_and_four_on_the_other() -> None:
    def crossings(side: ReadSide) -> int:
        moved = path_bytes(side, hit=1, miss=0)
        return moved.prefill_nic_read + moved.prefill_nic_write + moved.decode_nic_read + moved.decode_nic_write

    assert (crossings(ReadSide.PREFILL), crossings(ReadSide.DECODE)) == (6, 4)
    assert path_bytes(ReadSide.DECODE, 1, 1).prefill_dram == 0


@pytest.mark.parametrize("nodes", [(1, 1), (2, 4), (2, 1), (7, 2), (1, 7)])
def test_balanced_reads_give_the_loads_of_the_analysis(nodes: tuple[int, int]) -> None:
    prefill, decode = nodes
    second = 50 * 10**9  # what a node reads in a second
    moved = path_bytes(ReadSide.PREFILL, prefill * second, 0) + path_bytes(ReadSide.DECODE, decode * second, 0)
    measured = Loads(
        moved.prefill_nic_read / prefill / 8,
        moved.prefill_nic_write / prefill / 8,
        moved.decode_nic_read / decode / 8,
        moved.decode_nic_write / decode / 8,
        moved.prefill_dram / prefill,
        moved.decode_dram / decode,
    )
    assert astuple(measured) == pytest.approx(astuple(loads(prefill, decode, PAPER)))


def test_streaming_again_passes_the_buffer_and_both_ends() -> None:
    assert restream_bytes(ReadSide.PREFILL, 5) == ResourceBytes(prefill_nic_read=5, prefill_nic_write=5, prefill_dram=5)
    assert restream_bytes(ReadSide.DECODE, 5) == ResourceBytes(
        decode_nic_read=5, decode_dram=5, to_prefill=5, prefill_nic_write=5
    )


def test_persisting_writes_everything_and_copies_out_only_what_the_gpu_holds() -> None:
    assert persist_bytes(from_gpu=10, from_buffer=3) == ResourceBytes(
        decode_store_write=13, decode_nic_read=10, decode_nic_write=10, decode_dram=10 + 10 + 3
    )


# Table 1.


@pytest.mark.parametrize(("context", "ratio"), [(16384, 117.1), (65536, 267.2)])
def test_cache_compute_ratio_of_a_dense_model(context: int, ratio: float) -> None:
    attention = GroupedAttention(layers=64, heads=40, head_dim=128)
    assert round(cache_compute_ratio(context, 429, 262_144, 32e9, attention), 1) == ratio


@pytest.mark.parametrize(("context", "ratio"), [(16384, 12.2), (32721, 21.6), (65536, 35.1)])
def test_cache_compute_ratio_of_a_sparse_latent_model(context: int, ratio: float) -> None:
    attention = SparseLatentAttention(layers=61, heads=128, indexer_heads=64, indexer_dim=128, top_k=2048)
    assert round(cache_compute_ratio(context, 429, 656 * 61, 37e9, attention), 1) == ratio
