"""Models on meshes of eight devices give the logits of one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Sharding

import models
from jaxdual.config import ConfigError
from jaxdual.engine import mesh_programs
from jaxdual.engine.mesh_programs import MeshPrograms
from jaxdual.engine.paged import GroupTable
from jaxdual.kv.layout import KVLayout
from jaxdual.parallel.exchange import ExpertExchange
from jaxdual.parallel.mesh import ParallelSizes, device_mesh
from jaxdual.parallel.placement import first_placement, put_experts
from jaxdual.scheduling.experts import Placement, eplb
from models.shapes import ShardingRule, target_shardings
from models.sharding import sharding_rule
from tests.parallel.models import CONFIGS, model

PAGE, PAGES, LENGTH = 4, 8, 24


def on_mesh(
    name: str,
    sizes: ParallelSizes,
    *,
    placement: Placement | None = None,
    redundant: int = 0,
    change: Callable[[models.Decoder], None] = lambda decoder: None,
) -> tuple[MeshPrograms, KVLayout]:
    """The programs of the same random model, its parameters where the mesh has them."""
    config = CONFIGS[name]
    mesh = device_mesh(sizes)
    made = spread(model(name), sharding_rule(mesh.mesh, mesh.rules))
    change(made)
    placement = placement or first_placement(config, mesh, redundant)
    if placement is not None:
        put_experts(made, placement, mesh)
    layout = KVLayout.of_layers(
        [None] * config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE,
        dtype="float32",
        itemsize=4,
    )
    return MeshPrograms(made, layout, mesh, placement), layout


def spread(decoder: models.Decoder, rule: ShardingRule) -> models.Decoder:
    """The same decoder, its parameters where a rule has them."""
    graphdef, state = nnx.split(decoder)
    made: models.Decoder = nnx.merge(graphdef, jax.tree.map(put, state, target_shardings(state, rule)))
    return made


def put(value: jax.Array, target: Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, target, np.asarray(value).__getitem__)


def logits_on_mesh(programs: MeshPrograms, layout: KVLayout, ranks: int, tokens: np.ndarray) -> np.ndarray:
    """Logits at every position of `tokens`, `[ranks, LENGTH]`: the last by a decode step, the others by prefill."""
    arena = jnp.zeros(layout.arena_shape(ranks * PAGES), jnp.float32, device=programs.arena_sharding())
    table = (GroupTable(np.tile(np.arange(1, 1 + LENGTH // PAGE, dtype=np.int32), (ranks, 1))),)
    starts, counts = np.zeros(ranks, np.int32), np.full(ranks, LENGTH - 1, np.int32)
    arenas, x, _, _ = programs.prefill(programs.leaves, (arena,), tokens, starts, counts, table, programs.experts)
    last_token = jnp.zeros(ranks * 2, jnp.int32, device=programs.slot_sharding)
    _, last, _ = programs.decode(
        programs.leaves,
        arenas,
        last_token,
        np.zeros(ranks, np.int32),
        tokens[:, -1],
        np.full(ranks, LENGTH - 1, np.int32),
        table,
        programs.experts,
    )
    x = programs.on_host(x).reshape(ranks, LENGTH, -1).copy()
    x[:, -1] = programs.on_host(last)
    head = jax.jit(lambda leaves, x: programs.model(leaves).head(x))
    return programs.on_host(head(programs.leaves, x.reshape(ranks * LENGTH, -1))).reshape(ranks, LENGTH, -1)


def tokens_of(name: str, ranks: int) -> np.ndarray:
    return np.random.default_rng(ranks).integers(0, CONFIGS[name].vocab_size, (ranks, LENGTH)).astype(np.int32)


def assert_close(found: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(found - want).max() / np.abs(want).max()
    print(f"greatest error of a logit, by the greatest logit: {error:.1e}")
    assert error <= 1e-5


SIZES = [
    ("moe", ParallelSizes(1, 8, 1)),
    ("moe", ParallelSizes(2, 4, 1)),
    ("moe", ParallelSizes(8, 1, 1)),
    ("moe", ParallelSizes(1, 1, 2)),
    ("moe", ParallelSizes(1, 1, 4)),
    ("moe", ParallelSizes(1, 2, 2)),
    ("moe", ParallelSizes(2, 2, 2)),
    ("dense", ParallelSizes(1, 1, 2)),
    ("dense", ParallelSizes(2, 1, 4)),
    ("pruned", ParallelSizes(2, 1, 4)),
]


@pytest.mark.parametrize(("name", "sizes"), SIZES, ids=lambda value: str(value).replace("ParallelSizes", ""))
def test_logits_are_those_of_one_device(name: str, sizes: ParallelSizes) -> None:
    programs, layout = on_mesh(name, sizes)
    tokens = tokens_of(name, sizes.ranks)
    assert_close(logits_on_mesh(programs, layout, sizes.ranks, tokens), np.asarray(model(name).logits(tokens)))


@pytest.mark.parametrize("sizes", [ParallelSizes(1, 4, 1), ParallelSizes(1, 2, 2), ParallelSizes(2, 4, 1)])
def test_logits_with_redundant_experts_anywhere(sizes: ParallelSizes) -> None:
    loads = np.random.default_rng(0).gamma(1.0, 1.0, (2, 16))
    placement = eplb(loads, sizes.expert, redundant=4)
    assert placement.copies().max() > 1
    programs, layout = on_mesh("moe", sizes, placement=placement)
    tokens = tokens_of("moe", sizes.ranks)
    assert_close(logits_on_mesh(programs, layout, sizes.ranks, tokens), np.asarray(model("moe").logits(tokens)))


def test_experts_that_only_their_copies_make_divisible_are_loaded() -> None:
    sizes = ParallelSizes(1, 4, 1)
    sizes.check(CONFIGS["six"], redundant_experts=2)
    programs, layout = on_mesh("six", sizes, redundant=2)
    tokens = tokens_of("six", sizes.ranks)
    assert_close(logits_on_mesh(programs, layout, sizes.ranks, tokens), np.asarray(model("six").logits(tokens)))


@pytest.mark.parametrize("pass_bytes", [1, 1 << 20])
@pytest.mark.parametrize("name", ["moe", "one_expert"])
def test_logits_when_all_tokens_choose_the_same_experts_and_others_idle(
    name: str, pass_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router of zeros has only ties, of which the first experts win: those of one device, or of each device one.

    In one pass, or in passes of 128 rows, of which one device needs all that there can be.
    """
    monkeypatch.setattr(mesh_programs, "ExpertExchange", partial(ExpertExchange, pass_bytes=pass_bytes))
    sizes = ParallelSizes(1, 4, 1)
    order = np.arange(16, dtype=np.int32)
    tokens = tokens_of(name, sizes.ranks)
    one = models.init(CONFIGS[name], seed=7)
    zero_routers(one)
    want, compiled = np.asarray(one.logits(tokens)), None
    for row in (order, order.reshape(4, 4).T.reshape(-1)):
        placement = Placement(np.tile(row, (2, 1)), 4, 16)
        programs, layout = on_mesh(name, sizes, placement=placement, change=zero_routers)
        if compiled is None:
            compiled = programs
        else:  # where experts lie is data: the same programs serve
            compiled.leaves, compiled.experts = programs.leaves, programs.experts
        assert_close(logits_on_mesh(compiled, layout, sizes.ranks, tokens), want)


def zero_routers(decoder: models.Decoder) -> None:
    for layer in (0, 2):
        kernel = decoder.layers[layer].mlp.router.kernel
        kernel.set_value(kernel[...] * 0)


def test_impossible_meshes_are_refused() -> None:
    for sizes, redundant, message in (
        (ParallelSizes(tensor=3), 0, "tensor_parallel_size=3 must divide the model's 4 key-value heads"),
        (ParallelSizes(expert=3), 0, "expert_parallel_size=3 must divide the 16 experts of a layer and the 0"),
        (ParallelSizes(expert=2), 3, "expert_parallel_size=2 must divide the 16 experts of a layer and the 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            sizes.check(CONFIGS["moe"], redundant)
    with pytest.raises(ConfigError, match="expert_parallel_size=2: the model has no experts"):
        ParallelSizes(expert=2).check(CONFIGS["dense"])
    with pytest.raises(ConfigError, match="expert_parallel_size=2: the model has no experts"):
        ParallelSizes(expert=2).check(CONFIGS["never_sparse"])
    uneven = dataclasses.replace(CONFIGS["pruned"], layer_intermediate_sizes=(48, 18))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4 must divide.*intermediate_size of 18 in layer 1"):
        ParallelSizes(tensor=4).check(uneven)
    with pytest.raises(ConfigError, match="needs 16 devices, and there are 8"):
        device_mesh(ParallelSizes(4, 2, 2))
