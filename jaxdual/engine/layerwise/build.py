"""Makes a layerwise prefill engine."""

from __future__ import annotations

import dataclasses
import time

from jaxdual.agent.client import AgentProcess
from jaxdual.agent.wire import GroupSlots
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.engine.agent_link import AgentLink
from jaxdual.engine.buckets import Buckets
from jaxdual.engine.build import Built
from jaxdual.engine.build_transfers import attach_message, slot_bytes
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.layerwise.engine import PrefillEngine
from jaxdual.engine.layerwise.forward import Pace
from jaxdual.engine.layerwise.ring import Ring
from jaxdual.engine.layerwise.runner import MOVE_SIZES, LayerRunner
from jaxdual.engine.layerwise.stages import Stages
from jaxdual.engine.loading import LoadedModel
from jaxdual.engine.memory import check_host_memory, group_pages
from jaxdual.kv.staging import Staging
from jaxdual.scheduling.path_modes import MODES, PathMode
from jaxdual.scheduling.quota import GroupedAttention
from jaxdual.transport.slab import SharedSlab

_PIECES = 8  # of each ring: enough that the next ones come while some are copied
_PAGE = 4096


def prefill_engine_of(loaded: LoadedModel, config: EngineConfig, part: ClusterPart) -> Built[PrefillEngine]:
    """Makes the prefill engine of a cluster whose engines share a store, for a model with full attention in all layers.

    Its device memory has the size of any engine's: layerwise it holds that many more tokens.

    Raises:
      ConfigError: settings that don't fit the model or the machine, or a store that can't be opened.
    """
    if loaded.mesh is not None:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size}: a prefill engine that goes layer by layer, as in a "
            "cluster whose engines share a kv_store, runs on one device"
        )
    layout, model = loaded.layout, loaded.model
    blocks_setting = "num_kv_blocks"
    if part.cluster.prefill_kv_blocks is not None:
        config = dataclasses.replace(config, num_kv_blocks=part.cluster.prefill_kv_blocks)
        blocks_setting = "prefill_kv_blocks"
    (memory,) = group_pages(
        config, layout, loaded.max_model_len, loaded.max_chunk, model.config, blocks_setting=blocks_setting
    )
    block_bytes = layout.full_block_bytes()
    places = GroupSlots(0, slot_bytes(layout, 0), block_bytes)
    # A piece holds the largest padded move of a layer, and the smallest of all layers.
    piece = max(MOVE_SIZES[-1] * block_bytes // layout.num_layers, MOVE_SIZES[0] * block_bytes)
    piece = -(-piece // _PAGE) * _PAGE
    rings = 2 * _PIECES * piece
    check_host_memory(config, layout, [memory], model.config, rings=rings)
    staged = memory.staging_pages * places.slot_bytes
    slab = SharedSlab(staged + rings)
    landing, leaving = (
        Ring(slab.array, offset=staged + number * _PIECES * piece, piece_bytes=piece, count=_PIECES)
        for number in range(2)
    )
    staging = Staging([memory])
    attach = attach_message(config, part, [places])
    link = AgentLink(lambda: AgentProcess(attach, slab), staging.leases)

    def stages_of(mode: PathMode) -> Stages:
        layer_bytes = block_bytes // layout.num_layers
        if mode.layerwise:
            return Stages.layerwise(layout.num_layers, layer_bytes, part.cluster.prefill_layer_slots)
        return Stages.whole(layout.num_layers, layer_bytes)

    mode = MODES[part.cluster.path_mode]
    runner = LayerRunner(
        model,
        layout,
        num_blocks=memory.num_pages,
        max_model_len=loaded.max_model_len,
        max_num_seqs=config.max_num_seqs,
        buckets=Buckets(config.max_num_seqs, loaded.max_chunk),
        stages=stages_of(mode),
    )
    engine = PrefillEngine(
        runner,
        link,
        staging,
        places,
        landing=landing,
        leaving=leaving,
        shape=GroupedAttention(layout.num_layers, model.config.num_heads, layout.head_dim),
        quota_seconds=part.cluster.compute_quota,
        mode=mode,
        stages_of=stages_of,
        max_model_len=loaded.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=loaded.eos_token_ids,
        model_fingerprint=loaded.identity,
        load_timeout=config.kv_load_timeout,
        pace=Pace(part.cluster.least_layer_seconds, time.monotonic),
        seed=config.seed,
    )
    return Built(engine, loaded)
