"""Arrivals, records and what is made of them."""

import asyncio
import math
import time
from itertools import pairwise

import pytest

from bench.load import LoadRequest, Record, make_requests, poisson_arrivals, run_load, steady_rate, summarize
from bench.report import percentile


def served(sent, outputs, tokens):
    return Record(sent, "ok", list(outputs), outputs[-1], tokens)


def test_latencies_follow_their_definitions():
    # First output after 1 s, last after 4 s; 7 tokens in 3 outputs: TPOT = (4 - 1) / 6.
    record = served(10.0, [11.0, 12.0, 14.0], 7)
    assert (record.ttft, record.e2e, record.tpot) == (1.0, 4.0, 0.5)
    summary = summarize([record])
    assert summary["itl_seconds"]["mean"] == 1.5
    assert summary["itl_seconds"]["max"] == 2.0
    assert summary["output_tokens_per_second"] == 7 / 4


def test_refusals_and_errors_are_counted_apart_and_stay_out_of_the_latencies():
    records = [
        served(0.0, [1.0, 2.0], 2),
        Record(0.0, "refused", ended=0.25),
        Record(0.0, "error", ended=9.0, detail="broke"),
        Record(0.0, "error", ended=9.0, detail="broke"),
    ]
    summary = summarize(records)
    assert [summary[name] for name in ("requests", "ok", "refused", "errors")] == [4, 1, 1, 2]
    assert summary["refusal_seconds"]["p99"] == 0.25
    assert summary["error_details"] == {"broke": 2}
    assert summary["e2e_seconds"]["max"] == 2.0


def test_a_single_token_has_no_time_per_output_token():
    assert summarize([served(0.0, [1.0], 1)])["tpot_seconds"]["p50"] is None


def test_nothing_at_all_can_be_summarized():
    assert summarize([])["requests_per_second"] is None


def test_percentiles_interpolate_between_ranks():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95) == pytest.approx(4.8)
    assert math.isnan(percentile([], 50))


def test_steady_rate_leaves_out_both_ramps():
    # One completion a second in the middle half; the first and last ones are slow.
    ends = [0, 90, *range(100, 112), 200, 400]
    assert steady_rate([served(0.0, [float(end)], 1) for end in ends]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 8"):
        steady_rate([served(0.0, [1.0], 1)] * 7)


def test_poisson_arrivals_have_their_rate_and_infinity_sends_all_at_once():
    arrivals = poisson_arrivals(4000, 20.0, seed=1)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(200, rel=0.1)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    # Exponential: the spread equals the mean.
    mean = sum(gaps) / len(gaps)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    assert set(poisson_arrivals(3, math.inf, seed=1)) == {0.0}


@pytest.mark.parametrize("as_text", [False, True])
def test_requests_do_not_share_a_prefix(as_text):
    requests = make_requests(50, prompt_tokens=(8, 16), output_tokens=(4, 4), vocab_size=1000, as_text=as_text, seed=3)
    assert len({tuple(request.prompt[:8]) for request in requests}) > 40
    assert {request.output for request in requests} == {4}
    sizes = [len(request.prompt.split() if as_text else request.prompt) for request in requests]
    assert (min(sizes) >= 8, max(sizes) <= 16) == (True, True)


class CountingClient:
    """Holds each request until `hold` of them are under way, or for good."""

    def __init__(self, hold):
        self.under_way = self.most = 0
        self._hold, self._go = hold, asyncio.Event()

    async def send(self, request):
        record = Record(time.monotonic())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        if self.under_way >= self._hold:
            self._go.set()
        await self._go.wait()
        await asyncio.sleep(0)
        self.under_way -= 1
        record.status, record.ended = "ok", time.monotonic()
        return record

    async def close(self):
        pass


def test_no_more_requests_are_under_way_than_allowed():
    client = CountingClient(hold=4)
    requests = [LoadRequest([1], 1)] * 20
    records = asyncio.run(run_load(client, requests, [0.0] * 20, max_concurrency=4))
    assert (len(records), client.most) == (20, 4)


def test_a_request_without_end_becomes_an_error():
    client = CountingClient(hold=2)
    (record,) = asyncio.run(run_load(client, [LoadRequest([1], 1)], [0.0], deadline=0.05))
    assert (record.status, record.detail) == ("error", "no end after 0.05 s")
