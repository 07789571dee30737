"""Whole engine steps of a model in the shape of Qwen3-8B, as `bench.aot` compiles them: no weights are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdual.decoding.profiles import read_profile
from jaxdual.engine.dysco import DyscoRows, DyscoState
from jaxdual.engine.dysco_programs import DyscoPrograms
from jaxdual.engine.layerwise.programs import LayerPrograms
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from models import Decoder
from models.config import IHAConfig, ModelConfig, RopeConfig
from models.iha import schedule

_PAGES, _WIDTH, _PAGE_SIZE = 4096, 64, 64
_LAYER_SLOTS = 3
_SLOTS = 64
QWEN3_8B = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=RopeConfig(theta=1e6),
    max_position_embeddings=40960,
    qk_norm=True,
)


class Step(NamedTuple):
    """An engine step and what its memory is measured by.

    Attributes:
      trace: traces its program for `arguments`.
      donated: names of the arguments that results are written over.
      arena_bytes: of the largest of them.
      activation_bytes: of all tokens, between two layers and within an MLP.
      page_bytes: of one page of the arena.
    """

    trace: Callable[..., Any]
    arguments: dict[str, Any]
    donated: tuple[str, ...]
    arena_bytes: int
    activation_bytes: int
    page_bytes: int


# Four layers of Interleaved Head Attention behind a window, and a global one.
_PSEUDO_HEADS = 2
_WINDOWS, _IHA_LAYERS = schedule(5, 8192, _PSEUDO_HEADS)
IHA_8B = dataclasses.replace(
    QWEN3_8B,
    family="jaxdual_iha",
    num_layers=5,
    layer_windows=_WINDOWS,
    iha=IHAConfig(pseudo_heads=_PSEUDO_HEADS, layers=_IHA_LAYERS),
)


def steps() -> dict[str, Step]:
    """Decoding of 32 sequences, and of 8 long ones by DySCO; prefill of 4 chunks of 1024 tokens, and a layer of it.

    The same decoding and prefill with Interleaved Head Attention.
    """
    config = QWEN3_8B
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layout = KVLayout.of_layers(
        [None] * config.num_layers, kv_heads=8, head_dim=128, page_size=_PAGE_SIZE, dtype="bfloat16", itemsize=2
    )
    programs = Programs(model, layout)
    layer_programs = LayerPrograms(model, page_size=_PAGE_SIZE, slots=_LAYER_SLOTS)

    def arena(layers: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((_PAGES * layers * 2, _PAGE_SIZE, 8, 128), jnp.bfloat16)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def step(trace: Callable[..., Any], arguments: dict[str, Any], tokens: int, layers: int) -> Step:
        columns = 4 * config.hidden_size + 3 * config.intermediate_size
        arena_bytes = arena(layers).size * 2
        donated = tuple(name for name in ("arenas", "arena", "x", "state") if name in arguments)
        return Step(trace, arguments, donated, arena_bytes, tokens * columns * 2, arena_bytes // _PAGES)

    def all_layers(seqs: int, width: int = _WIDTH) -> dict[str, Any]:
        table = GroupTable(ints(seqs, width))
        return {"leaves": programs.leaves, "arenas": (arena(config.num_layers),), "tables": (table,)}

    def decode(seqs: int) -> dict[str, Any]:
        return {"last_token": ints(_SLOTS)} | dict.fromkeys(("slots", "tokens", "positions"), ints(seqs))

    seqs = ints(4)
    watched = sorted({layer for layer, _ in read_profile("qwen3-8b").heads})
    prefill = {"starts": seqs, "counts": seqs}
    x, rope = jax.eval_shape(layer_programs.begin, layer_programs.embedding, ints(4, 1024), seqs)
    layer = layer_programs.arrays_of(1) | {"x": x, "rope": rope, "arena": arena(_LAYER_SLOTS)}
    return {
        "decode_32": step(programs.decode.trace, all_layers(32) | decode(32), 32, config.num_layers),
        "decode_8_dysco": step(
            partial(DyscoPrograms(programs).decode.trace, passed=None, layers=(tuple(watched), ())),
            all_layers(8, _PAGES // 8) | decode(8) | _of_dysco(8, len(watched), _PAGES // 8 * _PAGE_SIZE),
            8,
            config.num_layers,
        ),
        "prefill_4_times_1024": step(
            programs.prefill.trace, all_layers(4) | prefill | {"tokens": ints(4, 1024)}, 4096, config.num_layers
        ),
        "prefill_4_times_1024_layer": step(
            partial(layer_programs.layer_program.trace, layer_programs.kind_of(1)),
            layer | prefill | {"table": GroupTable(ints(4, _WIDTH))},
            4096,
            _LAYER_SLOTS,
        ),
    } | _with_pseudo_heads()


def _with_pseudo_heads() -> dict[str, Step]:
    config, page = IHA_8B, (_PAGE_SIZE, 8, 128)
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layout = KVLayout.of_layers(
        [config.tokens_in_sight(layer) for layer in range(config.num_layers)],
        kv_heads=8,
        head_dim=128,
        page_size=_PAGE_SIZE,
        dtype="bfloat16",
        itemsize=2,
        every_head=_IHA_LAYERS,
    )
    programs = Programs(model, layout)
    arenas = tuple(jax.ShapeDtypeStruct((_PAGES * group.rows_per_page, *page), jnp.bfloat16) for group in layout.groups)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def step(trace: Callable[..., Any], batch: dict[str, Any], seqs: int, tokens: int) -> Step:
        tables = tuple(
            GroupTable(ints(seqs, _WIDTH), None if group.window is None else ints(seqs)) for group in layout.groups
        )
        arguments = {"leaves": programs.leaves, "arenas": arenas, "tables": tables} | batch
        columns = 4 * config.hidden_size * _PSEUDO_HEADS + 3 * config.intermediate_size
        largest = max(arena.size for arena in arenas) * 2
        return Step(trace, arguments, ("arenas",), largest, tokens * columns * 2, largest // _PAGES)

    one_each = {"last_token": ints(_SLOTS)} | dict.fromkeys(("slots", "tokens", "positions"), ints(32))
    chunks = {"starts": ints(4), "counts": ints(4), "tokens": ints(4, 1024)}
    return {
        "decode_32_iha": step(programs.decode.trace, one_each, 32, 32),
        "prefill_4_times_1024_iha": step(programs.prefill.trace, chunks, 4, 4096),
    }


def _of_dysco(seqs: int, layers: int, keys: int) -> dict[str, Any]:
    """Arguments of a step all of whose sequences are decoded by DySCO, with heads in so many layers."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    floats, ints = array(jnp.float32, seqs), array(jnp.int32, seqs)
    rows = DyscoRows(
        row=ints,
        slot=ints,
        weights=array(jnp.float32, seqs, layers, QWEN3_8B.num_heads),
        is_first=array(jnp.bool_, seqs),
        history=floats,
        top_p=floats,
        top_k=ints,
        candidates=ints,
        bias=floats,
    )
    return {"state": DyscoState(array(jnp.float32, _SLOTS, keys), array(jnp.bool_, _SLOTS, keys)), "peeked": rows}
