"""Engine steps on meshes of GPUs, of a few layers in the shape of Qwen3-30B-A3B, as `bench.aot` compiles them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdual.engine.mesh_programs import MeshPrograms
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.kv.layout import KVLayout
from jaxdual.parallel.exchange import ExpertSlots
from jaxdual.parallel.mesh import DATA, EXPERT, TENSOR, DeviceMesh, ParallelSizes
from models import Decoder
from models.config import ModelConfig, MoEConfig, RopeConfig
from models.shapes import parameter_path
from models.sharding import sharding_rule

MESHES = (ParallelSizes(1, 8, 1), ParallelSizes(2, 4, 1), ParallelSizes(1, 4, 2), ParallelSizes(1, 1, 4))
_LAYERS, _PAGES, _WIDTH, _PAGE_SIZE = 4, 1024, 64, 64
_ROWS, _CHUNK, _SLOTS = 32, 1024, 65
QWEN3_30B_A3B = ModelConfig(
    family="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=_LAYERS,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rope=RopeConfig(theta=1e6),
    max_position_embeddings=40960,
    qk_norm=True,
    moe=MoEConfig(num_experts=128, num_experts_per_tok=8, intermediate_size=768, norm_topk_prob=True),
)


def measure_meshes(devices: Sequence[jax.Device]) -> Iterator[tuple[str, dict[str, int]]]:
    """Name and figures of a decode step of 32 rows a rank, and of a prefill of 1024 tokens a rank, on each mesh.

    Figures are bytes of one device, and numbers of operations: `dense_bytes` is what an array of all tokens of the
    ranks that share experts, for each expert, would take.
    """
    for sizes in MESHES:
        grid = np.array(devices[: sizes.devices]).reshape(sizes.data, sizes.expert, sizes.tensor)
        mesh = DeviceMesh(Mesh(grid, (DATA, EXPERT, TENSOR)), sizes)
        for step, tokens in (("decode", _ROWS), ("prefill", _CHUNK)):
            with jax.sharding.use_abstract_mesh(mesh.mesh.abstract_mesh):
                traced = _trace(mesh, step)
                compiled = traced.lower(lowering_platforms=("cuda",)).compile()
            memory, text = compiled.memory_analysis(), compiled.as_text()
            arena = _PAGES * _LAYERS * 2 * _PAGE_SIZE * QWEN3_30B_A3B.num_kv_heads * QWEN3_30B_A3B.head_dim * 2
            moe = QWEN3_30B_A3B.moe
            assert moe is not None
            yield (
                f"{step}, data {sizes.data}, expert {sizes.expert}, tensor {sizes.tensor}",
                {
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "aliased_bytes": memory.alias_size_in_bytes,
                    "arena_bytes": arena // sizes.tensor,
                    "dense_bytes": moe.num_experts * sizes.expert * tokens * QWEN3_30B_A3B.hidden_size * 2,
                    "ragged_all_to_alls": len(re.findall(r"ragged-all-to-all(?:-start)?\(", text)),
                    "all_reduces": len(re.findall(r"all-reduce(?:-start)?\(", text)),
                    "all_gathers": len(re.findall(r"all-gather(?:-start)?\(", text)),
                },
            )


def _trace(mesh: DeviceMesh, step: str) -> Any:
    config, ranks = QWEN3_30B_A3B, mesh.sizes.ranks
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layout = KVLayout.of_layers(
        [None] * _LAYERS,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=_PAGE_SIZE,
        dtype="bfloat16",
        itemsize=2,
    )
    programs = MeshPrograms(model, layout, mesh, None)
    rule, by_rank = sharding_rule(mesh.mesh, mesh.rules), programs.slot_sharding
    paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model))]
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rule(path, leaf.shape))
        for path, leaf in zip(paths, programs.leaves, strict=True)
    ]
    arena = jax.ShapeDtypeStruct(layout.arena_shape(ranks * _PAGES), jnp.bfloat16, sharding=programs.arena_sharding())
    assert config.moe is not None
    experts = config.moe.num_experts

    def ints(*shape: int, split: bool = False) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_rank if split else mesh.sharding())

    where = [ExpertSlots(ints(experts, 1), ints(experts))] * _LAYERS
    counts = RouterCounts(
        ints(ranks, split=True),
        ints(ranks, _LAYERS, experts, split=True),
        ints(ranks, _LAYERS - 1, experts, experts, split=True),
    )
    if step == "decode":
        rows = ints(ranks * _ROWS)
        table = GroupTable(ints(ranks * _ROWS, _WIDTH))
        last = ints(ranks * _SLOTS, split=True)
        return programs.decode.trace(leaves, (arena,), last, rows, rows, rows, (table,), where, counts)
    seqs, table = ints(ranks), GroupTable(ints(ranks, _WIDTH))
    return programs.prefill.trace(leaves, (arena,), ints(ranks, _CHUNK), seqs, seqs, (table,), where, counts)
