"""Makes an engine from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxdual.config import EngineConfig
from jaxdual.engine.buckets import Buckets
from jaxdual.engine.build_transfers import build_transfers, host_memory
from jaxdual.engine.direct_landing import lands_directly
from jaxdual.engine.engine import Engine
from jaxdual.engine.expert_balancer import ExpertBalancer
from jaxdual.engine.loading import LoadedModel, load_model
from jaxdual.engine.memory import check_host_memory, group_pages
from jaxdual.engine.ranks import Rank, Ranks
from jaxdual.engine.router_log import RouterLog
from jaxdual.engine.runner import Runner
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.outputs import EngineInfo, EngineStats
from jaxdual.scheduling.batch import BatchLimits, BatchScheduler
from jaxdual.scheduling.dispatch import GimbalThresholds, dispatch_policy
from jaxdual.scheduling.queues import waiting_queue

if TYPE_CHECKING:  # an engine by itself needs none of its packages
    from jaxdual.engine.cluster_part import ClusterPart
    from jaxdual.engine.layerwise.engine import PrefillEngine

_CPU_PREFILL_BESIDE_DECODE = 128  # tokens: about what 64 sequences cost to decode, so that a step doubles at most


@dataclass(frozen=True, slots=True)
class Built[E: (Engine, PrefillEngine)]:
    """An engine and the model that it runs.

    Attributes:
      engine: ready for requests; nothing is compiled yet.
      loaded: its model.
    """

    engine: E
    loaded: LoadedModel

    @property
    def info(self) -> EngineInfo:
        return self.loaded.info

    def stats(self) -> EngineStats:
        """Counters since the start."""
        compiles = self.loaded.compiles
        return EngineStats(
            load_seconds=self.loaded.load_seconds,
            compile_seconds=compiles.seconds,
            compilations=compiles.compilations,
            **self.engine.stats(),
        )


def build_engine(config: EngineConfig, part: ClusterPart | None = None) -> Built[Engine]:
    """Loads the configured model and makes an engine for it that holds all of its layers.

    Args:
      part: what it is to a cluster.

    Raises:
      ModelError: no such model, or its files can't be used.
      ConfigError: settings that don't fit the model or the machine.
    """
    if part is None:
        config.check_alone()
    return engine_of(load_model(config), config, part)


def engine_of(loaded: LoadedModel, config: EngineConfig, part: ClusterPart | None) -> Built[Engine]:
    """See `build_engine`."""
    try:
        return _engine_of(loaded, config, part)
    except BaseException:
        if loaded.followers is not None:
            loaded.followers.close()
        raise


def _engine_of(loaded: LoadedModel, config: EngineConfig, part: ClusterPart | None) -> Built[Engine]:
    layout, max_chunk = loaded.layout, loaded.max_chunk
    memory = group_pages(config, layout, loaded.max_model_len, max_chunk, loaded.model.config)
    check_host_memory(config, layout, memory, loaded.model.config)
    host, slab = host_memory(layout, memory, shared=config.needs_kv_agent, ranks=config.num_ranks)
    runner = _runner_of(loaded, config, memory, host)
    limits = BatchLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_chunk=max_chunk,
        preemption=config.preemption_mode,
        prefill_beside_decode=_prefill_beside_decode(config),
    )
    router_log = _router_log(config, loaded, runner)
    thresholds = GimbalThresholds(config.theta_kv, config.theta_diff, config.theta_load, config.user_ttl)
    dispatch = dispatch_policy(config.dispatch_policy, thresholds)
    ranks = Ranks([_rank(config, memory, limits) for _ in range(config.num_ranks)], dispatch)
    engine = Engine(
        runner,
        ranks,
        eos_token_ids=loaded.eos_token_ids,
        model_fingerprint=loaded.identity,
        transfers=None if slab is None else build_transfers(config, part, ranks[0].kv, runner, memory, host, slab),
        router_log=router_log,
        balancer=_balancer(loaded, runner, router_log),
        overlap=config.async_scheduling,
        seed=config.seed,
    )
    return Built(engine, loaded)


def follower_runner(loaded: LoadedModel, config: EngineConfig, memory: Sequence[GroupPages]) -> Runner:
    """What a process that follows the engine's own has of it.

    Args:
      memory: that the leader has chosen.
    """
    host, _ = host_memory(loaded.layout, memory, shared=False, ranks=config.num_ranks)
    return _runner_of(loaded, config, memory, host)


def _runner_of(
    loaded: LoadedModel, config: EngineConfig, memory: Sequence[GroupPages], host: Sequence[np.ndarray]
) -> Runner:
    make: Callable[..., Runner] = Runner
    if loaded.followers is not None:
        from jaxdual.engine.replay import LeadingRunner  # speaks in messages, as `Followers` do

        make = partial(LeadingRunner, loaded.followers)
    return make(
        loaded.model,
        loaded.layout,
        memory=memory,
        max_num_seqs=config.max_num_seqs,
        max_model_len=loaded.max_model_len,
        max_chunk=loaded.max_chunk,
        buckets=Buckets(config.max_num_seqs, loaded.max_chunk),
        host=host,
        direct=lands_directly(config),
        mesh=loaded.mesh,
        count_routers=config.counted_of_routers,
        placement=loaded.placement,
        dysco_layers=loaded.dysco_layers,
        probe=loaded.probe,
    )


def _rank(config: EngineConfig, memory: Sequence[GroupPages], limits: BatchLimits) -> Rank:
    kv = KVManager(
        memory,
        config.block_size,
        prefix_caching=config.enable_prefix_caching,
        max_chunk=limits.max_chunk,
        report_published=config.kv_store is not None and not config.kv_store_read_only,
    )
    return Rank(BatchScheduler(limits, kv, waiting_queue(config.scheduling_policy, config.theta_age)), kv)


def _router_log(config: EngineConfig, loaded: LoadedModel, runner: Runner) -> RouterLog | None:
    if config.counted_of_routers == "off":
        return None
    period = None if config.expert_placement == "linear" else config.expert_interval
    layers = loaded.model.config.sparse_layers
    return RouterLog(runner, config.expert_parallel_size, config.expert_window, period, layers)


def _balancer(loaded: LoadedModel, runner: Runner, log: RouterLog | None) -> ExpertBalancer | None:
    if loaded.placement is None:
        return None
    return ExpertBalancer(runner, loaded.placement, log=log, policy=loaded.expert_policy)


def _prefill_beside_decode(config: EngineConfig) -> int | None:
    if config.prefill_beside_decode is None and jax.default_backend() == "cpu":
        return _CPU_PREFILL_BESIDE_DECODE
    return config.prefill_beside_decode
