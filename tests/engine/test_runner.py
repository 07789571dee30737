"""The runner's copies between tiers, within one step and across steps that overlap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdual.engine.buckets import Buckets
from jaxdual.engine.runner import Runner
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import GroupPages, PageCopy
from jaxdual.scheduling.plan import StepPlan
from tests.engine.models import load

LAYOUT = KVLayout.of_layers((None,) * 4, kv_heads=2, head_dim=16, page_size=4, dtype="float32", itemsize=4)
PAGES = 24


def plan(*copies: PageCopy) -> StepPlan:
    return StepPlan(copies=copies, tables=(), admitted=(), chunks=(), rows=(), preempted=())


def make_runner(*, direct: bool) -> Runner:
    return Runner(
        load("qwen3"),
        LAYOUT,
        memory=[GroupPages(PAGES, host_pages=10)],
        max_num_seqs=2,
        max_model_len=16,
        max_chunk=8,
        buckets=Buckets(2, 8),
        host=[np.zeros((10, *LAYOUT.block_shape()), np.float32)],
        direct=direct,
    )


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_block_that_leaves_and_returns_at_once_keeps_its_contents(steps: int, direct: bool) -> None:
    """More blocks than one program moves; slots are used again by later blocks, in order."""
    runner = make_runner(direct=direct)
    contents = np.random.default_rng(0).normal(size=(PAGES, *LAYOUT.block_shape())).astype(np.float32)
    runner.device.arenas = (
        runner.device.programs.scatter(runner.device.arenas[0], np.arange(PAGES, dtype=np.int32), contents),
    )
    out = [PageCopy("out", page, page) for page in range(10)]
    back = [PageCopy("in", 23 - page, page) for page in range(10)]
    again = [PageCopy("out", 10, 3), PageCopy("in", 0, 3)]
    launches = []
    if steps == 1:
        launches.append(runner.dispatch([plan(*out, *back, *again)], [], {}))
    else:  # the second is dispatched before the first is fetched, as the overlapped loop does
        launches += [runner.dispatch([plan(*out)], [], {}), runner.dispatch([plan(*back, *again)], [], {})]
    for launch in launches:
        runner.fetch(launch)
    arena = np.asarray(runner.device.arenas[0]).reshape(contents.shape)
    for page in range(10):
        np.testing.assert_array_equal(arena[23 - page], contents[page])
    np.testing.assert_array_equal(arena[0], contents[10])


@jax.jit
def late_zero(seed: jax.Array) -> jax.Array:
    """0 after about half a second."""
    x = jax.lax.fori_loop(0, 400, lambda _, x: jnp.tanh(x @ x + 1.0), jnp.full((512, 512), seed))
    return jnp.sum(x) * 0.0


@pytest.mark.parametrize("direct", [False, True])
def test_a_page_is_not_landed_in_before_its_last_owner_has_written(direct: bool) -> None:
    """A step that is under way writes a page which has been given to another sequence meanwhile."""
    runner = make_runner(direct=direct)
    runner._copies._host[0][:] = 7.0
    late_zero(0.1).block_until_ready()
    last = jnp.ones((1, *LAYOUT.block_shape())) + late_zero(0.5)
    runner.device.arenas = (runner.device.programs.scatter(runner.device.arenas[0], np.array([5], np.int32), last),)
    assert not runner.device.arenas[0].is_ready()
    runner.fetch(runner.dispatch([plan(PageCopy("in", 5, 3))], [], {}))
    assert (page(runner, 5) == 7.0).all()


@pytest.mark.parametrize("direct", [False, True])
def test_a_page_is_not_landed_in_before_it_was_read(direct: bool) -> None:
    """As when a block is still on its way to the store, and its page has been given to another sequence meanwhile."""
    runner = make_runner(direct=direct)
    runner._copies._host[0][:] = 7.0
    late_zero(0.1).block_until_ready()
    gather = runner.device.programs.gather

    def late(arena: jax.Array, pages: np.ndarray, rows_per_block: int) -> jax.Array:
        later = pages + late_zero(0.5).astype(jnp.int32)
        return gather(arena, later, rows_per_block=rows_per_block)

    runner.device.programs.gather = late
    blocks = runner.gather(0, [5])
    assert not blocks.is_ready()
    runner.fetch(runner.dispatch([plan(PageCopy("in", 5, 3))], [], {}))
    assert (np.asarray(blocks)[0] == 0.0).all()
    assert (page(runner, 5) == 7.0).all()


def page(runner: Runner, number: int) -> np.ndarray:
    return np.asarray(runner.device.arenas[0]).reshape(PAGES, *LAYOUT.block_shape())[number]
