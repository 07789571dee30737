"""How much KV memory an engine has, on the device and beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from jaxdual.config import ConfigError, EngineConfig
from jaxdual.engine.sampler import SAMPLER_BYTES_PER_TOKEN_ID
from jaxdual.kv.group import GroupPages
from jaxdual.kv.layout import KVLayout, most_blocks
from jaxdual.parallel.exchange import PASS_BYTES
from models import ModelConfig
from pallas_kernels.iha_prefill.virtual import GROUP_BYTES

_CPU_KV_BYTES = 1 << 30
_STAGING_BYTES = 64 << 20  # at least, where a store is configured
_PASS_COPIES = 3  # of rows that go through a device's experts at a time: before, within and behind
_HIDDEN_COPIES = 8  # activations of a step, in residual streams of its widest batch: room left beside the KV memory


def _sequence_pages(layout: KVLayout, max_model_len: int, max_chunk: int) -> list[int]:
    """Pages that the longest sequence holds at most at a time, in each layer group."""
    longest = layout.pages_for(max_model_len)
    return [most_blocks(group.window, max_chunk, layout.page_size, longest) for group in layout.groups]


def group_pages(
    config: EngineConfig,
    layout: KVLayout,
    max_model_len: int,
    max_chunk: int,
    model: ModelConfig,
    *,
    blocks_setting: str = "num_kv_blocks",
) -> tuple[GroupPages, ...]:
    """Memory of each layer group: shares in proportion to what the longest sequence holds in it.

    `num_kv_blocks` counts pages of the first group, the one with full attention if there is one.

    Args:
      blocks_setting: what a user knows `num_kv_blocks` as.

    Raises:
      ConfigError: it is too little for one sequence.
    """
    needed = _sequence_pages(layout, max_model_len, max_chunk)
    sequence_bytes = sum(pages * layout.full_block_bytes(group) for group, pages in enumerate(needed))
    # Of a sequence, on each device of its rank.
    device_bytes = sum(
        pages * layout.device_block_bytes(group, config.tensor_parallel_size) for group, pages in enumerate(needed)
    )
    if config.probe is not None:
        device_bytes += needed[0] * stash_bytes(layout, model)
    if config.num_kv_blocks is not None:
        source = blocks_setting
        num_pages = [config.num_kv_blocks, *(-(-config.num_kv_blocks * pages // needed[0]) for pages in needed[1:])]
    else:
        if config.kv_cache_memory_bytes is not None:
            memory, source = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
        elif jax.default_backend() == "cpu":
            memory, source = max(_CPU_KV_BYTES, device_bytes), "the default KV memory"
        else:
            memory, source = _free_device_memory(config, layout, model, max_model_len), "gpu_memory_utilization"
        num_pages = [min(memory * pages // device_bytes, config.max_num_seqs * pages) for pages in needed]
    for group, (pages, most) in enumerate(zip(num_pages, needed, strict=True)):
        if pages < most:
            raise ConfigError(
                f"{source} gives {pages} KV pages, but one sequence of {max_model_len} tokens needs "
                f"{most} ({most * layout.device_block_bytes(group, config.tensor_parallel_size)} bytes): give more "
                "memory or a smaller max_model_len"
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


def stash_bytes(layout: KVLayout, model: ModelConfig) -> int:
    """Of a page: the residual stream of its tokens, where prompts wait between two parts of the layers."""
    return layout.page_size * model.hidden_size * layout.itemsize


def check_host_memory(
    config: EngineConfig, layout: KVLayout, memory: Sequence[GroupPages], model: ModelConfig, *, rings: int = 0
) -> None:
    """Refuses what this machine can't hold, before an allocation fails somewhere inside.

    Args:
      rings: bytes that blocks pass through beside the staging pages.

    Raises:
      ConfigError: this machine has less memory.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_cpu = jax.default_backend() == "cpu"
    per_sequence = model.vocab_size * SAMPLER_BYTES_PER_TOKEN_ID
    tensor = config.tensor_parallel_size  # devices of a rank, all of which this machine plays if it is a CPU
    device = sum(
        pages.num_pages * layout.device_block_bytes(group, tensor) * tensor for group, pages in enumerate(memory)
    )
    if config.probe is not None:
        device += memory[0].num_pages * stash_bytes(layout, model)
    host = sum(pages.host_pages * layout.full_block_bytes(group) for group, pages in enumerate(memory))
    staging = sum(pages.staging_pages * layout.full_block_bytes(group) for group, pages in enumerate(memory))
    for need, setting in (
        (
            device * on_cpu * config.num_ranks,
            f"KV memory of {sum(pages.num_pages for pages in memory)} pages of block_size={layout.page_size}",
        ),
        (host * config.num_ranks, f"host_cache_bytes={config.host_cache_bytes}"),
        (staging + rings, f"kv_staging_bytes={config.kv_staging_bytes}"),
        (config.num_ranks * config.max_num_seqs * per_sequence * on_cpu, f"max_num_seqs={config.max_num_seqs}"),
    ):
        if need > total:
            raise ConfigError(f"{setting} needs {need} bytes; this machine has {total}")


def _free_device_memory(config: EngineConfig, layout: KVLayout, model: ModelConfig, max_model_len: int) -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError("this device does not tell its memory: set kv_cache_memory_bytes or num_kv_blocks")
    logits = config.max_num_seqs * model.vocab_size * 4 * _HIDDEN_COPIES
    streams = config.max_num_batched_tokens * model.hidden_size * layout.itemsize * _HIDDEN_COPIES
    streams += _expert_bytes(config, layout, model) + _pseudo_bytes(config, layout, model)
    if config.dysco_profile is not None:  # relevance of each slot's tokens, and which are of a template
        streams += (config.max_num_seqs + 1) * layout.pages_for(max_model_len) * layout.page_size * (4 + 1)
    return int(stats["bytes_limit"] * config.gpu_memory_utilization) - int(stats["bytes_in_use"]) - logits - streams


def _pseudo_bytes(config: EngineConfig, layout: KVLayout, model: ModelConfig) -> int:
    """What Interleaved Head Attention needs: pseudo queries and outputs of a step, and pseudo keys and values."""
    if model.iha is None:
        return 0
    heads = model.num_heads * model.iha.pseudo_heads // config.tensor_parallel_size
    rows = 3 * config.max_num_batched_tokens * heads * model.head_dim * 4  # in float32 while they are mixed
    # At least those of one head of one sequence are made at a time.
    one = 2 * config.max_num_batched_tokens * model.iha.pseudo_heads * model.head_dim * layout.itemsize
    return rows + max(2 * GROUP_BYTES, one)


def _expert_bytes(config: EngineConfig, layout: KVLayout, model: ModelConfig) -> int:
    """What experts on several devices need beside their weights: what travels to them and back, and their moves."""
    devices, moe = config.expert_parallel_size, model.moe
    if moe is None or devices == 1:
        return 0
    stream = devices * config.max_num_batched_tokens * model.hidden_size * layout.itemsize
    moved = 0
    if config.expert_placement != "linear":  # all of a layer at most, before and after it has travelled
        width = moe.intermediate_size // config.tensor_parallel_size
        slots = moe.num_experts + config.redundant_experts
        moved = 2 * slots * 3 * model.hidden_size * width * layout.itemsize
    return stream * _HIDDEN_COPIES + _PASS_COPIES * PASS_BYTES + moved
