"""Whole engine steps of a model in the shape of Qwen3-8B, as `bench.aot` compiles them: no weights are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdual.engine.paged import GroupTable
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from models import Decoder
from models.config import ModelConfig, RopeConfig

_PAGES, _WIDTH = 4096, 64
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
    """A step function, its arguments by name, and what its memory is measured by.

    Attributes:
      activation_bytes: of all tokens, between two layers and within an MLP.
      page_bytes: of one page of every layer.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    activation_bytes: int
    page_bytes: int


def steps() -> dict[str, Step]:
    """Decoding of 32 sequences, and prefill of 4 chunks of 1024 tokens, with pages of 64 tokens."""
    config = QWEN3_8B
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layout = KVLayout.of_layers(
        [None] * config.num_layers, kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
    )
    programs = Programs(model, layout)
    rows = layout.groups[0].rows_per_page
    arena = jax.ShapeDtypeStruct((_PAGES * rows, 64, 8, 128), jnp.bfloat16)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def step(function: Callable[..., Any], count: int, seqs: int, **arguments: Any) -> Step:
        common = {"leaves": programs.leaves, "arenas": (arena,), "tables": (GroupTable(ints(seqs, _WIDTH)),)}
        columns = 4 * config.hidden_size + 3 * config.intermediate_size
        return Step(function, common | arguments, count * columns * 2, rows * 64 * 8 * 128 * 2)

    numbers = ints(32)
    return {
        "decode_32": step(
            programs._decode, 32, 32, last_token=ints(64), slots=numbers, tokens=numbers, positions=numbers
        ),
        "prefill_4_times_1024": step(programs._prefill, 4096, 4, tokens=ints(4, 1024), starts=ints(4), counts=ints(4)),
    }
