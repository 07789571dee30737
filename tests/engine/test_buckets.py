"""Padded shapes: what run time asks for is among what warm-up compiles."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.engine.buckets import Buckets
from jaxdual.scheduling.plan import Chunk

sizes = st.tuples(st.integers(1, 80), st.integers(1, 700))


def chunk_of(seq_id: int, length: int) -> Chunk:
    return Chunk(seq_id, seq_id, 0, [1] * length, samples=True, output_index=0)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(sizes, st.data())
def test_every_shape_of_run_time_is_enumerated_and_holds_its_work(size: tuple[int, int], data: st.DataObject) -> None:
    max_num_seqs, max_chunk = size
    buckets = Buckets(max_num_seqs, max_chunk)
    rows = data.draw(st.integers(1, max_num_seqs))
    assert buckets.decode(rows) in buckets.rows
    assert rows <= buckets.decode(rows) < 2 * rows or rows == 1

    lengths = st.lists(st.integers(1, max_chunk), max_size=min(max_num_seqs, 12))
    ids = itertools.count()
    ranks = data.draw(st.lists(lengths, min_size=1, max_size=3))
    chunks = [[chunk_of(next(ids), length) for length in of_rank] for of_rank in ranks]
    batches = buckets.prefill(chunks)
    for rank, wanted in enumerate(chunks):
        given_out = [chunk.seq_id for batch in batches for chunk in batch.chunks[rank]]
        assert sorted(given_out) == [chunk.seq_id for chunk in wanted]
    for batch in batches:
        assert batch.shape in buckets.prefill_shapes
        assert batch.shape.rows in buckets.rows  # the sampler is compiled for these row counts only
        assert 1 <= max(map(len, batch.chunks)) <= batch.shape.rows
        assert all(len(chunk.tokens) <= batch.shape.chunk for of_rank in batch.chunks for chunk in of_rank)
        assert batch.shape.tokens == batch.shape.rows * batch.shape.chunk


@settings(max_examples=100, derandomize=True, deadline=None)
@given(sizes)
def test_no_shape_is_listed_twice_or_larger_than_the_limits(size: tuple[int, int]) -> None:
    max_num_seqs, max_chunk = size
    buckets = Buckets(max_num_seqs, max_chunk)
    assert len(set(buckets.rows)) == len(buckets.rows)
    assert len(set(buckets.prefill_shapes)) == len(buckets.prefill_shapes)
    assert max(buckets.rows) == max_num_seqs
    assert max(shape.rows for shape in buckets.prefill_shapes) <= max_num_seqs
    assert max(shape.chunk for shape in buckets.prefill_shapes) == max_chunk
    assert max(shape.tokens for shape in buckets.prefill_shapes) == max_chunk


def programs(buckets: Buckets) -> int:
    """Programs of a warm-up: decode and sampler for each row count, prefills, prompt scores, slot state."""
    return 2 * len(buckets.rows) + len(buckets.prefill_shapes) + 2


def test_number_of_programs_stays_small() -> None:
    assert programs(Buckets(max_num_seqs=64, max_chunk=512)) <= 24
    assert programs(Buckets(max_num_seqs=256, max_chunk=2048)) <= 36


def test_short_prompts_share_a_prefill() -> None:
    buckets = Buckets(max_num_seqs=64, max_chunk=512)
    (batch,) = buckets.prefill([[chunk_of(i, 20) for i in range(16)]])
    assert (batch.shape.rows, batch.shape.chunk) == (16, 32)
    (batch,) = buckets.prefill([[chunk_of(0, 400)]])
    assert (batch.shape.rows, batch.shape.chunk) == (1, 512)


def test_more_rows_than_the_largest_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="above the largest bucket"):
        Buckets(64, 512).decode(65)


def test_nothing_to_prefill_is_no_batch() -> None:
    assert Buckets(64, 512).prefill([(), ()]) == []


def test_a_lone_chunk_is_padded_to_less_than_twice_its_length() -> None:
    buckets = Buckets(64, 512)
    for length in range(32, 513):
        (batch,) = buckets.prefill([[chunk_of(0, length)]])
        assert batch.shape.tokens < 2 * length
