"""The runner's copies between tiers, within one step and across steps that overlap."""

import numpy as np
import pytest

from jaxdual.engine.buckets import Buckets
from jaxdual.engine.runner import Runner
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import GroupPages, PageCopy
from jaxdual.scheduling.batch import StepPlan
from tests.engine.models import load

LAYOUT = KVLayout.of_layers((None,) * 4, kv_heads=2, head_dim=16, page_size=4, dtype="float32", itemsize=4)
PAGES = 24


def plan(*copies: PageCopy) -> StepPlan:
    return StepPlan(copies=copies, tables=(), admitted=(), chunks=(), rows=(), preempted=())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_block_that_leaves_and_returns_at_once_keeps_its_contents(steps: int) -> None:
    """More blocks than one program moves; slots are used again by later blocks, in order."""
    runner = Runner(
        load("qwen3"),
        LAYOUT,
        memory=[GroupPages(PAGES, host_pages=10)],
        max_num_seqs=2,
        max_model_len=16,
        max_chunk=8,
        buckets=Buckets(2, 8),
        host=[np.zeros((10, *LAYOUT.block_shape()), np.float32)],
    )
    contents = np.random.default_rng(0).normal(size=(PAGES, *LAYOUT.block_shape())).astype(np.float32)
    runner.arenas = (runner.programs.scatter(runner.arenas[0], np.arange(PAGES, dtype=np.int32), contents),)
    out = [PageCopy("out", page, page) for page in range(10)]
    back = [PageCopy("in", 23 - page, page) for page in range(10)]
    again = [PageCopy("out", 10, 3), PageCopy("in", 0, 3)]
    launches = []
    if steps == 1:
        launches.append(runner.dispatch(plan(*out, *back, *again), [], {}))
    else:  # the second is dispatched before the first is fetched, as the overlapped loop does
        launches += [runner.dispatch(plan(*out), [], {}), runner.dispatch(plan(*back, *again), [], {})]
    for launch in launches:
        runner.fetch(launch)
    arena = np.asarray(runner.arenas[0]).reshape(contents.shape)
    for page in range(10):
        np.testing.assert_array_equal(arena[23 - page], contents[page])
    np.testing.assert_array_equal(arena[0], contents[10])
