"""Padded shapes: what run time asks for is among what warm-up compiles."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.engine.buckets import Buckets
from jaxdual.scheduling.batch import Chunk

sizes = st.tuples(st.integers(1, 80), st.integers(1, 700), st.sampled_from([1, 2, 16, 64]), st.integers(1, 300))


def chunk_of(seq_id: int, length: int, start: int) -> Chunk:
    return Chunk(seq_id, seq_id, start, [1] * length, samples=True, output_index=0)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(sizes, st.data())
def test_every_shape_of_run_time_is_enumerated_and_holds_its_work(
    size: tuple[int, int, int, int], data: st.DataObject
) -> None:
    max_num_seqs, max_chunk, page_size, max_pages = size
    max_chunk = min(max_chunk, max_pages * page_size)
    buckets = Buckets(max_num_seqs, max_pages, max_chunk, page_size)
    rows, pages = data.draw(st.integers(1, max_num_seqs)), data.draw(st.integers(1, max_pages))
    decode = buckets.decode(rows, pages)
    assert decode in set(buckets.decode_shapes())
    assert decode.rows >= rows
    assert decode.width >= pages
    assert decode.rows in buckets.rows

    chunks = []
    for seq_id in range(data.draw(st.integers(0, min(max_num_seqs, 12)))):
        length = data.draw(st.integers(1, max_chunk))
        start = data.draw(st.integers(0, max_pages * page_size - length))
        chunks.append(chunk_of(seq_id, length, start))
    batches = buckets.prefill(chunks)
    assert sorted(chunk.seq_id for batch in batches for chunk in batch.chunks) == list(range(len(chunks)))
    shapes = set(buckets.prefill_shapes())
    for batch in batches:
        assert batch.shape in shapes
        assert batch.shape.rows in buckets.rows  # the sampler is compiled for these row counts only
        assert 1 <= len(batch.chunks) <= batch.shape.rows
        assert all(len(chunk.tokens) <= batch.shape.chunk for chunk in batch.chunks)
        assert all(-(-(chunk.start + len(chunk.tokens)) // page_size) <= batch.shape.width for chunk in batch.chunks)
        assert batch.shape.tokens == batch.shape.rows * batch.shape.chunk


@settings(max_examples=100, derandomize=True, deadline=None)
@given(sizes)
def test_no_shape_is_listed_twice_or_wider_than_the_longest_sequence(size: tuple[int, int, int, int]) -> None:
    max_num_seqs, max_chunk, page_size, max_pages = size
    buckets = Buckets(max_num_seqs, max_pages, max_chunk, page_size)
    decode, prefill = list(buckets.decode_shapes()), list(buckets.prefill_shapes())
    assert len(set(decode)) == len(decode)
    assert len(set(prefill)) == len(prefill)
    assert max(shape.width for shape in [*decode, *prefill]) == max_pages
    assert max(shape.rows for shape in [*decode, *prefill]) <= max_num_seqs
    assert max(shape.chunk for shape in prefill) == max_chunk
    assert max(shape.tokens for shape in prefill) <= max(max_chunk, 32 * max_num_seqs)


def programs(buckets: Buckets) -> int:
    """Programs of a warm-up: shapes, the sampler for each row count, prompt scores, slot state."""
    return len(list(buckets.decode_shapes())) + len(list(buckets.prefill_shapes())) + len(buckets.rows) + 2


def test_number_of_programs_stays_small() -> None:
    assert programs(Buckets(max_num_seqs=64, max_pages=16, max_chunk=512, page_size=64)) <= 24
    assert programs(Buckets(max_num_seqs=256, max_pages=2048, max_chunk=2048, page_size=64)) <= 48


def test_short_prompts_share_a_prefill() -> None:
    buckets = Buckets(max_num_seqs=64, max_pages=16, max_chunk=512, page_size=64)
    (batch,) = buckets.prefill([chunk_of(i, 20, 0) for i in range(16)])
    assert (batch.shape.rows, batch.shape.chunk) == (16, 32)
    (batch,) = buckets.prefill([chunk_of(0, 400, 0)])
    assert (batch.shape.rows, batch.shape.chunk) == (1, 512)


def test_more_rows_than_the_largest_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="above the largest bucket"):
        Buckets(64, 16, 512, 64).decode(65, 1)


def test_behind_a_window_longer_sequences_need_no_longer_tables() -> None:
    buckets = Buckets(64, 16, 512, 64)
    assert buckets.decode(1, 100) == buckets.decode(1, 16)
    assert buckets.prefill([chunk_of(0, 400, 50_000)])[0].shape.width == 16


def test_nothing_to_prefill_is_no_batch() -> None:
    assert Buckets(64, 16, 512, 64).prefill([]) == []
