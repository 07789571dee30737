"""Makes an engine from its configuration: model, sizes, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdual.config import ConfigError, EngineConfig
from jaxdual.engine.buckets import Buckets
from jaxdual.engine.build_transfers import build_transfers, host_memory
from jaxdual.engine.engine import Engine
from jaxdual.engine.runner import Runner
from jaxdual.engine.sampler import SAMPLER_BYTES_PER_TOKEN_ID
from jaxdual.kv.layout import KVLayout, most_blocks
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.model_folder import find_model
from jaxdual.outputs import EngineInfo, EngineStats
from jaxdual.sampling_params import MAX_STOP_TOKENS, RECOMMENDED_SAMPLING
from jaxdual.scheduling.batch import BatchLimits, BatchScheduler
from jaxdual.telemetry import CompileCounter
from models import Decoder, GenerationConfig, ModelConfig, init, load, load_config, load_generation_config
from models.fingerprint import model_fingerprint

_CPU_KV_BYTES = 1 << 30
_CPU_MODEL_LEN = 8192
_STAGING_BYTES = 64 << 20  # at least, where a store is configured
_CPU_PREFILL_BESIDE_DECODE = 128  # tokens: about what 64 sequences cost to decode, so that a step doubles at most
_HIDDEN_COPIES = 8  # activations of a step, in residual streams of its widest batch: room left beside the KV memory


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what its front needs to know of it.

    Attributes:
      engine: ready for requests; nothing is compiled yet.
      info: what it serves.
      load_seconds: time that loading took.
      compiles: counts compilations from here on.
    """

    engine: Engine
    info: EngineInfo
    load_seconds: float
    compiles: CompileCounter

    def stats(self) -> EngineStats:
        """Counters since the start."""
        kv, scheduler, transfers = self.engine.kv, self.engine.scheduler, self.engine.transfers
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + (0 if transfers is None else transfers.num_waiting),
            prompt_tokens=self.engine.prompt_tokens,
            generation_tokens=self.engine.generation_tokens,
            computed_prompt_tokens=scheduler.stats.prefill_tokens,
            prefix_cache_queries=kv.stats.prefix_queries,
            prefix_cache_hits=kv.stats.prefix_hits,
            host_cache_hits=kv.stats.host_hits,
            blocks_copied_out=kv.stats.copied_out,
            blocks_copied_in=kv.stats.copied_in,
            preemptions=scheduler.stats.preemptions_recompute + scheduler.stats.preemptions_swap,
            steps=scheduler.stats.steps,
            kv_blocks=kv.num_pages,
            kv_blocks_cached=kv.num_cached,
            kv_blocks_available=kv.num_available,
            load_seconds=self.load_seconds,
            compile_seconds=self.compiles.seconds,
            compilations=self.compiles.compilations,
            store_cache_hits=kv.stats.staged_hits,
            **({} if transfers is None else transfers.stats()),
        )


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Loads the configured model and makes an engine for it.

    Raises:
      ModelError: no such model, or its files can't be used.
      ConfigError: settings that don't fit the model or the machine.
    """
    use_compilation_cache(config.compilation_cache_dir)
    compiles = CompileCounter()
    start = time.perf_counter()
    folder, served_model_name = find_model(config)
    model_config = load_config(folder)
    generation = load_generation_config(folder)
    max_model_len = _max_model_len(config, model_config)
    model = _model(config, folder, model_config)
    load_seconds = time.perf_counter() - start

    dtype = jnp.dtype(model.embedding[...].dtype)
    layout = KVLayout.of_layers(
        [_window(model_config, layer, max_model_len) for layer in range(model_config.num_layers)],
        kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        page_size=config.block_size,
        dtype=dtype.name,
        itemsize=dtype.itemsize,
    )
    identity = model_fingerprint(folder, dtype.name, random_weights=config.load_format == "dummy")
    eos_token_ids = generation.eos_token_ids or model_config.eos_token_ids
    if len(eos_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(
            f"{folder}: {len(eos_token_ids)} end-of-sequence tokens; at most {MAX_STOP_TOKENS} are supported"
        )
    max_chunk = min(config.max_num_batched_tokens, max_model_len)
    memory = _group_pages(config, layout, max_model_len, max_chunk, model_config)
    _check_host_memory(config, layout, memory, model_config)
    kv = KVManager(
        memory,
        config.block_size,
        prefix_caching=config.enable_prefix_caching,
        max_chunk=max_chunk,
        report_published=config.kv_store is not None and not config.kv_store_read_only,
    )
    host, slab = host_memory(layout, memory, shared=config.needs_kv_agent)
    limits = BatchLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_chunk=max_chunk,
        preemption=config.preemption_mode,
        prefill_beside_decode=_prefill_beside_decode(config),
    )
    runner = Runner(
        model,
        layout,
        memory=memory,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        max_chunk=max_chunk,
        buckets=Buckets(config.max_num_seqs, max_chunk),
        host=host,
    )
    engine = Engine(
        runner,
        BatchScheduler(limits, kv),
        kv,
        eos_token_ids=eos_token_ids,
        model_fingerprint=identity,
        transfers=None if slab is None else build_transfers(config, kv, runner, memory, host, slab),
        overlap=config.async_scheduling,
        seed=config.seed,
    )
    info = EngineInfo(
        model_folder=str(folder),
        served_model_name=served_model_name,
        family=model_config.family,
        num_layers=model_config.num_layers,
        vocab_size=model_config.vocab_size,
        dtype=dtype.name,
        device=jax.devices()[0].device_kind,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        fingerprint=identity.hex(),
        default_sampling=_default_sampling(generation),
    )
    return BuiltEngine(engine, info, load_seconds, compiles)


def _model(config: EngineConfig, folder: Path, model: ModelConfig) -> Decoder:
    if config.load_format == "auto":
        return load(folder, dtype=config.dtype)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return init(model, dtype=dtype if config.dtype == "auto" else config.dtype)


def use_compilation_cache(folder: str | None) -> None:
    """Turns on JAX's persistent compilation cache for programs of any size.

    Args:
      folder: where it lies; None for `$JAX_COMPILATION_CACHE_DIR`, else `jaxdual/xla` in the user's cache folder;
        "" leaves JAX's settings alone.
    """
    if folder == "":
        return
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(cache_home) / "jaxdual" / "xla")
    jax.config.update("jax_compilation_cache_dir", chosen)
    # JAX's defaults skip programs that compile in under a second, which is most of a small model's.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _default_sampling(generation: GenerationConfig) -> dict[str, float]:
    values = {name: getattr(generation, name) for name in RECOMMENDED_SAMPLING}
    return {name: value for name, value in values.items() if value is not None}


def _prefill_beside_decode(config: EngineConfig) -> int | None:
    if config.prefill_beside_decode is None and jax.default_backend() == "cpu":
        return _CPU_PREFILL_BESIDE_DECODE
    return config.prefill_beside_decode


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is None:
        return min(limit, _CPU_MODEL_LEN) if jax.default_backend() == "cpu" else limit
    if config.max_model_len > limit:
        raise ConfigError(f"max_model_len={config.max_model_len} must be at most {limit}, for which the model was made")
    return config.max_model_len


def _window(model: ModelConfig, layer: int, max_model_len: int) -> int | None:
    """Window of a layer; one that no sequence outgrows is full attention."""
    window = model.window_of(layer)
    return None if window is None or window >= max_model_len else window


def _sequence_pages(layout: KVLayout, max_model_len: int, max_chunk: int) -> list[int]:
    """Pages that the longest sequence holds at most at a time, in each layer group."""
    longest = layout.pages_for(max_model_len)
    return [most_blocks(group.window, max_chunk, layout.page_size, longest) for group in layout.groups]


def _group_pages(
    config: EngineConfig, layout: KVLayout, max_model_len: int, max_chunk: int, model: ModelConfig
) -> tuple[GroupPages, ...]:
    """Memory of each layer group: shares in proportion to what the longest sequence holds in it.

    `num_kv_blocks` counts pages of the first group, the one with full attention if there is one.
    """
    needed = _sequence_pages(layout, max_model_len, max_chunk)
    sequence_bytes = sum(pages * layout.full_block_bytes(group) for group, pages in enumerate(needed))
    if config.num_kv_blocks is not None:
        source = "num_kv_blocks"
        num_pages = [config.num_kv_blocks, *(-(-config.num_kv_blocks * pages // needed[0]) for pages in needed[1:])]
    else:
        if config.kv_cache_memory_bytes is not None:
            memory, source = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
        elif jax.default_backend() == "cpu":
            memory, source = max(_CPU_KV_BYTES, sequence_bytes), "the default KV memory"
        else:
            memory, source = _free_device_memory(config, layout, model), "gpu_memory_utilization"
        num_pages = [min(memory * pages // sequence_bytes, config.max_num_seqs * pages) for pages in needed]
    for group, (pages, most) in enumerate(zip(num_pages, needed, strict=True)):
        if pages < most:
            raise ConfigError(
                f"{source} gives {pages} KV pages, but one sequence of {max_model_len} tokens needs "
                f"{most} ({most * layout.full_block_bytes(group)} bytes): give more memory or a smaller max_model_len"
            )
    staging = 0
    if config.needs_kv_agent:
        staging = config.kv_staging_bytes or max(2 * sequence_bytes, _STAGING_BYTES)
    return tuple(
        GroupPages(
            pages,
            config.host_cache_bytes * most // sequence_bytes,
            group.window,
            # At least one page to read a block into and one to store a block from.
            max(staging * most // sequence_bytes, 2) if staging else 0,
        )
        for pages, most, group in zip(num_pages, needed, layout.groups, strict=True)
    )


def _check_host_memory(
    config: EngineConfig, layout: KVLayout, memory: Sequence[GroupPages], model: ModelConfig
) -> None:
    """Refuses what this machine can't hold, before an allocation fails somewhere inside."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_cpu = jax.default_backend() == "cpu"
    per_sequence = model.vocab_size * SAMPLER_BYTES_PER_TOKEN_ID
    device = sum(pages.num_pages * layout.full_block_bytes(group) for group, pages in enumerate(memory))
    host = sum(pages.host_pages * layout.full_block_bytes(group) for group, pages in enumerate(memory))
    staging = sum(pages.staging_pages * layout.full_block_bytes(group) for group, pages in enumerate(memory))
    for need, setting in (
        (
            device * on_cpu,
            f"KV memory of {sum(pages.num_pages for pages in memory)} pages of block_size={layout.page_size}",
        ),
        (host, f"host_cache_bytes={config.host_cache_bytes}"),
        (staging, f"kv_staging_bytes={config.kv_staging_bytes}"),
        (config.max_num_seqs * per_sequence * on_cpu, f"max_num_seqs={config.max_num_seqs}"),
    ):
        if need > total:
            raise ConfigError(f"{setting} needs {need} bytes; this machine has {total}")


def _free_device_memory(config: EngineConfig, layout: KVLayout, model: ModelConfig) -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError("this device does not tell its memory: set kv_cache_memory_bytes or num_kv_blocks")
    logits = config.max_num_seqs * model.vocab_size * 4 * _HIDDEN_COPIES
    streams = config.max_num_batched_tokens * model.hidden_size * layout.itemsize * _HIDDEN_COPIES
    return int(stats["bytes_limit"] * config.gpu_memory_utilization) - int(stats["bytes_in_use"]) - logits - streams
