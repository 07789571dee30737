"""Prometheus metrics of a server, in vLLM's names under `jaxdual:`."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxdual.async_api import AsyncLLM
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import NotServingError, UnknownModelError
from jaxdual.outputs import EngineStats, RequestOutput, RouterFigures
from jaxdual.request_stream import AnswerStream
from jaxdual.served_models import Model, ServedModels
from server.cascade_metrics import CascadeMetrics

_PREFIX = "jaxdual:"
_LABELS = ("model_name",)
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_COUNTS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
# Of a request with several outputs, the reason that tells most about what went wrong counts.
_REASONS = ("error", "abort", "length", "stop")
_ENGINE_COUNTERS = (
    ("num_preemptions", "preemptions", "Sequences that had to give way to others."),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("external_prefix_cache_hits", "store_cache_hits", "Of those, tokens that were read from the block store."),
    ("kv_store_blocks_read", "store_blocks_read", "KV blocks read from the store."),
    ("kv_store_blocks_failed", "store_blocks_failed", "KV blocks that were gone or broken when they were to be read."),
    ("kv_store_blocks_written", "store_blocks_written", "KV blocks stored."),
    ("kv_store_blocks_lost", "store_blocks_lost", "Full KV blocks that were not stored."),
    ("kv_store_timeouts", "store_timeouts", "Requests that went on without the blocks that they waited for."),
    ("kv_agent_restarts", "kv_agent_restarts", "Times that the process beside the engine had died."),
    ("engine_restarts", "restarts", "Engines started after the first."),
    ("expert_relocations", "expert_relocations", "Times that experts were placed anew on their devices."),
    ("experts_moved", "experts_moved", "Weights of one expert in one layer that moved to another slot."),
)


class Metrics:
    """Counts and times the requests of all faces, and shows them with the engine's own figures.

    Args:
      models: what is served, started or not.
    """

    def __init__(self, models: ServedModels) -> None:
        self.registry = CollectorRegistry()
        self._models = models
        self._bound: dict[str, _ModelMetrics] = {}
        self.registry.register(_EngineCollector(models.engines))
        if isinstance(models.default, CascadeLLM):
            CascadeMetrics(models.default, self.registry)
        self._finished = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._refused = self._counter("request_refused", "Requests that were not taken, by reason.", "reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that gave a token.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "Waiting in the engine before running.", _REQUEST_SECONDS
        )
        self._between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an output.", _TOKEN_SECONDS
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_SECONDS
        )
        self._prompt_lengths = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_COUNTS)
        self._output_lengths = self._histogram(
            "request_generation_tokens", "Generated tokens of a request, all outputs together.", _TOKEN_COUNTS
        )

    def observe(self, stream: AnswerStream, model: str) -> ObservedStream:
        """`stream`, with its tokens counted and its times measured as it is read.

        Iterate over the result in place of the stream, and close the result in place of the stream.

        Args:
          stream: a request that was taken.
          model: that it was taken for, by its name.
        """
        return ObservedStream(stream, self._of_model(model))

    def refused(self, reason: str, model: str | None = None) -> None:
        """Counts a request that was not taken.

        Args:
          reason: one of a few short words, such as "queue_full".
          model: that it names; it counts for the default one if there is none of that name.
        """
        try:
            name = self._models.get(model).served_model_name
        except (UnknownModelError, NotServingError):
            name = _model_name(self._models.default)
        self._refused.labels(name, reason).inc()

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics as text, with its content type.

        Args:
          accept: the scraper's Accept header.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _of_model(self, model: str) -> _ModelMetrics:
        if model not in self._bound:
            self._bound[model] = self._bind(model)
        return self._bound[model]

    def _bind(self, model: str) -> _ModelMetrics:
        return _ModelMetrics(
            model=model,
            finished=self._finished,
            prompt_tokens=self._prompt_tokens.labels(model),
            generation_tokens=self._generation_tokens.labels(model),
            first_token=self._first_token.labels(model),
            queue_time=self._queue_time.labels(model),
            between_tokens=self._between_tokens.labels(model),
            latency=self._latency.labels(model),
            prompt_lengths=self._prompt_lengths.labels(model),
            output_lengths=self._output_lengths.labels(model),
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, (*_LABELS, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, _LABELS, registry=self.registry, buckets=buckets)


@dataclass(frozen=True, slots=True)
class _ModelMetrics:
    """The metrics of requests, bound to the model's name once, for looking labels up costs more than counting."""

    model: str
    finished: Counter
    prompt_tokens: Counter
    generation_tokens: Counter
    first_token: Histogram
    queue_time: Histogram
    between_tokens: Histogram
    latency: Histogram
    prompt_lengths: Histogram
    output_lengths: Histogram

    def first(self, output: RequestOutput) -> None:
        """Counts a request that has its first token."""
        self.prompt_tokens.inc(output.num_prompt_tokens)
        times = output.metrics
        if times.first_token_time is not None:
            self.first_token.observe(times.first_token_time - times.arrival_time)
        if times.queue_seconds is not None:
            self.queue_time.observe(times.queue_seconds)

    def last(self, output: RequestOutput) -> None:
        """Counts a request that has ended."""
        reasons = {completion.finish_reason or "abort" for completion in output.outputs}
        reason = next(reason for reason in _REASONS if reason in reasons)
        self.finished.labels(self.model, reason).inc()
        if reason in ("error", "abort"):
            return
        self.prompt_lengths.observe(output.num_prompt_tokens)
        self.output_lengths.observe(output.num_output_tokens)
        times = output.metrics
        if times.finished_time is not None:
            self.latency.observe(times.finished_time - times.arrival_time)


class ObservedStream:
    """A `RequestStream` whose tokens are counted as they are read; made by `Metrics.observe`."""

    __slots__ = ("_counted", "_counts", "_iterator", "_last", "_metrics", "_stream")

    def __init__(self, stream: AnswerStream, metrics: _ModelMetrics) -> None:
        self._stream = stream
        self._iterator: AsyncIterator[RequestOutput] = aiter(stream)
        self._metrics = metrics
        self._counts = [0] * len(stream.output.outputs)
        self._last = [0.0] * len(stream.output.outputs)
        self._counted = False

    @property
    def output(self) -> RequestOutput:
        """The request's output so far."""
        return self._stream.output

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        output = await anext(self._iterator)
        self._count(output)
        return output

    def close(self) -> None:
        """Ends the request if it is unfinished; it then counts as aborted. Calling it again does nothing."""
        self._stream.close()
        self._end()

    def _count(self, output: RequestOutput) -> None:
        now = time.monotonic()
        fresh = 0
        begun = any(self._counts)
        for i, completion in enumerate(output.outputs):
            grown = len(completion.token_ids) - self._counts[i]
            if not grown:
                continue
            if self._counts[i]:
                # Tokens that came together shared the time since the ones before them.
                seconds = (now - self._last[i]) / grown
                for _ in range(grown):
                    self._metrics.between_tokens.observe(seconds)
            self._counts[i] += grown
            self._last[i] = now
            fresh += grown
        if output.finished and output.reported is not None and output.metrics.first_token_time is not None:
            fresh = output.num_output_tokens  # an answer from elsewhere: tokens are told at its end alone
        if fresh:
            self._metrics.generation_tokens.inc(fresh)
            if not begun:
                self._metrics.first(output)
        if output.finished:
            self._end()

    def _end(self) -> None:
        if not self._counted:
            self._counted = True
            self._metrics.last(self._stream.output)


class _EngineCollector(Collector):
    """The figures of all engines: those of the same name are one metric, with a sample for each engine."""

    def __init__(self, engines: Sequence[AsyncLLM]) -> None:
        self._engines = [_EngineFigures(engine) for engine in engines]

    def collect(self) -> Iterator[Metric]:
        metrics: dict[str, Metric] = {}
        for engine in self._engines:
            for metric in engine.collect():
                known = metrics.setdefault(metric.name, metric)
                if known is not metric:
                    known.samples += metric.samples
        yield from metrics.values()


class _EngineFigures:
    """The engine's figures, as last heard of; counters go on where a restarted engine begins at zero."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._dead: EngineStats | None = None  # the last figures of an engine that is gone
        self._before = dict.fromkeys((field for _, field, _ in _ENGINE_COUNTERS), 0)
        self._decisions_before = Counts[str]()
        llm.on_state(self._note_state)

    def collect(self) -> Iterator[Metric]:
        model = _model_name(self._llm)
        load = self._llm.load()
        if load is self._dead:
            load = None
        for name, text, value in _gauges(load or EngineStats(num_waiting=self._llm.num_unfinished)):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
            gauge.add_metric([model], value)
            yield gauge
        for name, field, text in _ENGINE_COUNTERS:
            counter = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
            # Engines of a cluster that start again do so without their front.
            fronts = self._llm.restarts if field == "restarts" else 0
            counter.add_metric([model], getattr(load, field, 0) + self._before[field] + fronts)
            yield counter
        decisions = self._decisions_before + Counts(None if load is None else load.dispatch_decisions)
        if decisions:
            text = "Requests whose rank was chosen, by the rule that decided."
            counter = CounterMetricFamily(_PREFIX + "dispatch_decisions", text, labels=(*_LABELS, "rule"))
            for rule, count in decisions.items():
                counter.add_metric([model, rule], count)
            yield counter
        if load is not None and load.routers is not None:
            yield from _of_routers(model, load.routers)
        if load is not None and load.engines:
            yield from _of_engines(model, load)
        if load is not None and load.card_bytes:
            text = "Bytes that have passed a network card of the cluster, as its host's memory sees them."
            counter = CounterMetricFamily(_PREFIX + "nic_bytes", text, labels=(*_LABELS, "nic", "direction"))
            for name, nbytes in load.card_bytes.items():
                counter.add_metric([model, *name.rsplit(" ", 1)], nbytes)
            yield counter

    def _note_state(self, state: EngineState) -> None:
        if state is not EngineState.RESTARTING:
            return
        last = self._llm.load()
        if last is not self._dead:
            self._dead = last
            for field in self._before:
                self._before[field] += getattr(last, field, 0)
            if last is not None:
                self._decisions_before.update(last.dispatch_decisions)


def _gauges(load: EngineStats) -> Iterator[tuple[str, str, float]]:
    """Name, explanation and value of what an engine holds now."""
    used = load.kv_blocks - load.kv_blocks_available
    yield "num_requests_running", "Sequences that run now.", load.num_running
    yield "num_requests_waiting", "Sequences that wait for their turn.", load.num_waiting
    part = used / load.kv_blocks if load.kv_blocks else 0.0
    yield "kv_cache_usage_perc", "Part of the KV blocks that sequences use, 1 for all.", part
    yield "kv_blocks_live", "KV blocks that sequences use.", used
    yield "kv_blocks_cached", "KV blocks that only the prefix cache uses.", load.kv_blocks_cached
    if load.expert_imbalance is not None and load.expert_imbalance_worst is not None:
        text = "Load of the busiest device by the mean, of experts as they lie now; mean of all layers."
        yield "expert_imbalance", text, load.expert_imbalance
        text = "Load of the busiest device by the mean, of experts as they lie now; in the most uneven layer."
        yield "expert_imbalance_worst", text, load.expert_imbalance_worst
    yield "kv_blocks_free", "KV blocks that hold nothing.", load.kv_blocks_available - load.kv_blocks_cached


def _of_routers(model: str, figures: RouterFigures) -> Iterator[Metric]:
    text = "Tokens that chose an expert in the last window of steps, by the mean of its layer."
    loads = GaugeMetricFamily(_PREFIX + "expert_load", text, labels=(*_LABELS, "layer", "expert"))
    for layer, of_layer in zip(figures.layers, figures.loads, strict=True):
        for expert, value in enumerate(of_layer):
            loads.add_metric([model, str(layer), str(expert)], value)
    yield loads
    text = "Part of the tokens that chose the most frequent pair of experts of a layer and the next one that has some."
    pairs = GaugeMetricFamily(_PREFIX + "expert_pair_share", text, labels=(*_LABELS, "layer"))
    for layer, value in zip(figures.layers, figures.strongest_pairs, strict=False):
        pairs.add_metric([model, str(layer)], value)
    yield pairs
    text = "Part of the choices of a device's sequences that fall on experts of a device."
    traffic = GaugeMetricFamily(_PREFIX + "expert_traffic", text, labels=(*_LABELS, "source", "device"))
    for source, parts in enumerate(figures.traffic):
        for device, value in enumerate(parts):
            traffic.add_metric([model, str(source), str(device)], value)
    yield traffic


def _of_engines(model: str, load: EngineStats) -> Iterator[Metric]:
    """The figures of each engine of a cluster, named as those of all together with `cluster_engine_` before it."""
    labels = (*_LABELS, "engine")
    gauges = {engine: list(_gauges(stats)) for engine, stats in load.engines.items()}
    for number, (name, text, _) in enumerate(next(iter(gauges.values()))):
        gauge = GaugeMetricFamily(f"{_PREFIX}cluster_engine_{name}", text, labels=labels)
        for engine, values in gauges.items():
            gauge.add_metric([model, engine], values[number][2])
        yield gauge
    for name, field, text in _ENGINE_COUNTERS:
        counter = CounterMetricFamily(f"{_PREFIX}cluster_engine_{name.removeprefix('engine_')}", text, labels=labels)
        for engine, stats in load.engines.items():
            counter.add_metric([model, engine], getattr(stats, field))
        yield counter


def _model_name(llm: Model) -> str:
    try:
        return llm.served_model_name
    except NotServingError:  # not known yet
        return ""
