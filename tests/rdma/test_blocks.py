"""Full Blocks of a real prefill from one node's pages to another's, and on to the host, where an engine reads them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxdual.transport import Op, Status, TrafficClass
from tests.transport.nodes import MIB, RDMA_DEVICES, WHY_NO_RDMA, Node

FOLDER = os.environ.get("JAXDUAL_RDMA_BLOCKS", "")
LAYERS = 4  # that a block is sent in, as layerwise prefill does
pytestmark = [
    pytest.mark.rdma,
    pytest.mark.skipif(not RDMA_DEVICES, reason=WHY_NO_RDMA),
    pytest.mark.skipif(not FOLDER, reason="no recorded blocks (JAXDUAL_RDMA_BLOCKS)"),
]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    nodes = Node("verbs", tmp_path, nbytes=16 * MIB), Node("verbs", tmp_path, nbytes=16 * MIB)
    yield nodes
    for node in nodes:
        node.close()


def test_blocks_of_a_prefill_arrive_as_they_were_sent(pair: tuple[Node, Node]) -> None:
    """Whole or in layers, into other pages than they came from; each is used as soon as its immediate is there."""
    a, b = pair
    folder = Path(FOLDER)
    files = sorted(path.relative_to(folder / "sent") for path in (folder / "sent").rglob("*") if path.is_file())
    blocks = [np.fromfile(folder / "sent" / name, np.uint8) for name in files]
    assert len(blocks) > 10
    page = -(-max(block.nbytes for block in blocks) // 4096) * 4096
    rng = random.Random(1)
    numbers = range(a.memory.nbytes // page)
    here, there = rng.sample(numbers, len(blocks)), rng.sample(numbers, len(blocks))
    b.memory[:] = 0xAA
    want = b.memory.copy()
    channel = a.connect(b, TrafficClass.KV)
    tickets = []
    for index, block in enumerate(blocks):
        local, remote = here[index] * page, there[index] * page
        a.memory[local : local + block.nbytes] = block
        want[remote : remote + block.nbytes] = block
        parts = LAYERS if index % 2 else 1
        cuts = [block.nbytes * part // parts for part in range(parts + 1)]
        ops = [Op(local + low, remote + low, high - low) for low, high in itertools.pairwise(cuts)]
        rng.shuffle(ops)
        tickets += [channel.write(a.region, a.remote(b), [op]) for op in ops[:-1]]
        tickets.append(channel.write(a.region, a.remote(b), ops[-1:], immediate=index))
    arrived = 0

    def use() -> bool:
        nonlocal arrived
        for index in b.immediates()[arrived:]:
            data = b.memory[there[index] * page :][: blocks[index].nbytes]
            np.testing.assert_array_equal(data, blocks[index])
            target = folder / "arrived" / files[index]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.tobytes())
            arrived += 1
        return arrived == len(blocks)

    b.wait(use, "immediates")
    assert b.immediates() == list(range(len(blocks)))
    assert [a.status(ticket) for ticket in tickets] == [Status.OK] * len(tickets)
    np.testing.assert_array_equal(b.memory, want)
    # And pulled back by the other side's hand, into pages in order.
    a.memory[:] = 0
    read = a.connect(b, TrafficClass.MODEL).read(
        a.region,
        a.remote(b),
        [Op(index * page, there[index] * page, block.nbytes) for index, block in enumerate(blocks)],
    )
    assert a.status(read) is Status.OK
    for index, block in enumerate(blocks):
        np.testing.assert_array_equal(a.memory[index * page :][: block.nbytes], block)
    (folder / "arrived").chmod(0o700)
