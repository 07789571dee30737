"""Metrics, as a scraper reads them."""

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import QueueFullError
from jaxdual.outputs import EngineStats, RouterFigures
from tests.server.http.scripted import RunningServer

# As vLLM writes them, but for the prefix.
NAMES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total"),
    *("prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "num_preemptions_total"),
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "request_prompt_tokens_bucket"),
    *("e2e_request_latency_seconds_bucket", "request_generation_tokens_bucket"),
    *("kv_blocks_live", "kv_blocks_cached", "kv_blocks_free", "engine_restarts_total"),
}


@pytest.fixture
def server():
    with RunningServer() as running:
        yield running


def scrape(server):
    """All samples by name and further labels."""
    text = httpx.get(f"{server.url}/metrics").text
    samples = {}
    for family in parse(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "scripted"
            samples[(sample.name.removeprefix("jaxdual:"), *labels.values())] = sample.value
    return samples


def complete(server, **fields):
    body = {"prompt": [1, 2, 3, 4], "max_tokens": 5, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_and_tokens_are_counted(server, stream):
    for _ in range(3):
        assert complete(server, n=2, stream=stream).status_code == 200
    samples = scrape(server)
    assert samples["prompt_tokens_total",] == 12
    assert samples["generation_tokens_total",] == 30
    assert samples["request_success_total", "length"] == 3
    assert samples["time_to_first_token_seconds_count",] == 3
    assert samples["e2e_request_latency_seconds_count",] == 3
    assert samples["inter_token_latency_seconds_count",] == 30 - 6
    assert samples["request_prompt_tokens_sum",] == 12
    assert samples["request_generation_tokens_sum",] == 30
    assert 0 < samples["time_to_first_token_seconds_sum",] <= samples["e2e_request_latency_seconds_sum",]


def test_names_are_vllm_s(server):
    complete(server)
    assert {name for name, *_ in scrape(server)} >= NAMES


def test_each_end_is_counted_once_by_its_reason(server):
    server.call(setattr, server.llm, "script", [5, 2047])
    complete(server)
    server.call(setattr, server.llm, "script", None)
    server.call(server.llm.hold)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=0.3)
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the abandoned request to end")
    samples = scrape(server)
    assert samples["request_success_total", "stop"] == 1
    assert samples["request_success_total", "abort"] == 1
    assert samples["e2e_request_latency_seconds_count",] == 1


def test_refusals_are_counted_by_reason(server):
    complete(server, prompt="")
    complete(server, model="other")
    server.call(setattr, server.llm, "refuse_with", QueueFullError("full"))
    complete(server)
    complete(server)
    samples = scrape(server)
    reasons = {labels[0]: n for (name, *labels), n in samples.items() if name == "request_refused_total"}
    assert reasons == {"invalid_request": 1, "model_not_found": 1, "queue_full": 2}


def test_the_engine_s_figures_show(server):
    server.call(
        lambda: server.llm.set_stats(
            num_running=3, num_waiting=4, kv_blocks=10, kv_blocks_available=7, kv_blocks_cached=2, preemptions=5
        )
    )
    samples = scrape(server)
    assert (samples["num_requests_running",], samples["num_requests_waiting",]) == (3, 4)
    assert samples["kv_cache_usage_perc",] == pytest.approx(0.3)
    blocks = [samples[f"kv_blocks_{name}",] for name in ("live", "cached", "free")]
    assert blocks == [3, 2, 5]
    assert samples["num_preemptions_total",] == 5


def test_a_cluster_s_engines_and_cards_show(server):
    server.call(
        lambda: server.llm.set_stats(
            num_running=3,
            restarts=2,
            engines={
                "prefill 0": EngineStats(num_running=1, restarts=2, store_blocks_lost=4),
                "decode 1": EngineStats(num_running=2, kv_blocks=10, kv_blocks_available=5),
            },
            card_bytes={"prefill 0 storage write": 4096, "decode 1 compute read": 8192},
        )
    )
    samples = scrape(server)
    assert samples["num_requests_running",] == 3
    assert [samples["cluster_engine_num_requests_running", name] for name in ("prefill 0", "decode 1")] == [1, 2]
    assert samples["cluster_engine_kv_cache_usage_perc", "decode 1"] == 0.5
    assert samples["cluster_engine_kv_store_blocks_lost_total", "prefill 0"] == 4
    assert samples["engine_restarts_total",] == samples["cluster_engine_restarts_total", "prefill 0"] == 2
    assert samples["nic_bytes_total", "write", "prefill 0 storage"] == 4096
    assert samples["nic_bytes_total", "read", "decode 1 compute"] == 8192


def test_counters_go_on_after_a_restart_and_gauges_fall_to_nothing(server):
    server.call(lambda: server.llm.set_stats(num_running=3, prefix_cache_hits=70, kv_blocks=10, kv_blocks_available=2))
    assert scrape(server)["prefix_cache_hits_total",] == 70
    server.call(server.llm.set_state, EngineState.RESTARTING)
    samples = scrape(server)
    assert (samples["prefix_cache_hits_total",], samples["engine_restarts_total",]) == (70, 1)
    assert (samples["num_requests_running",], samples["kv_blocks_live",]) == (0, 0)
    server.call(server.llm.set_state, EngineState.RESTARTING)  # it died again before it said anything
    assert scrape(server)["prefix_cache_hits_total",] == 70
    server.call(lambda: server.llm.set_stats(prefix_cache_hits=5))
    samples = scrape(server)
    assert (samples["prefix_cache_hits_total",], samples["engine_restarts_total",]) == (75, 2)


def test_decisions_of_dispatch_show_by_rule_and_go_on_after_a_restart(server):
    assert not [name for name, *_ in scrape(server) if name.startswith("dispatch")]
    server.call(lambda: server.llm.set_stats(dispatch_decisions={"affinity": 7, "kv": 1}))
    samples = scrape(server)
    assert (samples["dispatch_decisions_total", "affinity"], samples["dispatch_decisions_total", "kv"]) == (7, 1)
    server.call(server.llm.set_state, EngineState.RESTARTING)
    assert scrape(server)["dispatch_decisions_total", "affinity"] == 7
    server.call(lambda: server.llm.set_stats(dispatch_decisions={"affinity": 2, "load": 3}))
    samples = scrape(server)
    rules = ("affinity", "kv", "load")
    assert [samples["dispatch_decisions_total", rule] for rule in rules] == [9, 1, 3]


def test_what_routers_choose_shows_once_it_is_known(server):
    assert not [name for name, *_ in scrape(server) if name.startswith("expert_") and not name.endswith("_total")]
    figures = RouterFigures((1, 3), 50, ((1.5, 0.5), (0.25, 1.75)), (0.4,), ((0.6, 0.4), (0.3, 0.7)))
    server.call(lambda: server.llm.set_stats(routers=figures, expert_imbalance=1.25, expert_imbalance_worst=1.5))
    samples = scrape(server)
    assert (samples["expert_imbalance",], samples["expert_imbalance_worst",]) == (1.25, 1.5)
    assert (samples["expert_load", "0", "1"], samples["expert_load", "1", "3"]) == (1.5, 1.75)  # expert, layer
    assert samples["expert_pair_share", "1"] == 0.4
    assert (samples["expert_traffic", "1", "0"], samples["expert_traffic", "0", "1"]) == (0.4, 0.3)  # device, source


def test_openmetrics_is_spoken_to_those_who_ask(server):
    complete(server)
    response = httpx.get(f"{server.url}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert any(family.name == "jaxdual:generation_tokens" for family in parse_openmetrics(response.text))
