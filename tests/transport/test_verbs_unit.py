"""The verbs carrier without a device: what it asks of pyverbs, and how tickets end."""

from __future__ import annotations

import ipaddress
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdual.transport import Completed, Event, Op, PeerLost, Received, Status, TrafficClass
from jaxdual.transport import queue_pair as queue_pair_module
from jaxdual.transport.rdma_device import Device, device_at, device_names
from jaxdual.transport.verbs import VerbsSettings, VerbsTransport
from tests.transport.nodes import ROOT
from tests.transport.recorded_verbs import ENUMS, MR, QP, Fabric, PyverbsError, install

KV, MODEL = TrafficClass.KV, TrafficClass.MODEL
SECRET = b"0123456789abcdef"
PIECE = 4096
SETTINGS = VerbsSettings(send_depth=8, receive_depth=4, message_bytes=PIECE)
SIGNALED = ENUMS.IBV_SEND_SIGNALED


class End:
    """A transport with 256 KiB, of which all is one region."""

    def __init__(self, **options: Any) -> None:
        self.memory = np.zeros(256 << 10, np.uint8)
        self.transport = VerbsTransport(SECRET, settings=options.pop("settings", SETTINGS), **options)
        self.region = self.transport.register(self.memory)
        self.events: list[Event] = []

    def remote(self, other: End) -> Any:
        return self.transport.remote(other.region.descriptor)

    def wait(self, found: Callable[[], Any], seconds: float = 10.0) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            self.events += self.transport.poll()
            if result := found():
                return result
            assert time.monotonic() < deadline, self.events[-5:]
            select.select([self.transport.fileno()], [], [], 0.02)

    def ends(self) -> list[tuple[int, Status]]:
        return [(event.ticket.number, event.status) for event in self.events if isinstance(event, Completed)]

    def lost(self) -> list[PeerLost]:
        return [event for event in self.events if isinstance(event, PeerLost)]


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fabric]:
    found = install(monkeypatch)
    yield found
    assert not found.faults
    assert not found.open, "something was not closed"


@pytest.fixture
def pair(fabric: Fabric) -> Iterator[tuple[End, End]]:
    ends = End(), End()
    ends[0].memory[:] = np.random.default_rng(1).integers(0, 256, ends[0].memory.nbytes, np.uint8)
    yield ends
    for end in ends:
        end.transport.check_integrity()
        end.transport.close()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("traffic", [KV, MODEL])
def test_a_class_has_its_service_level_and_dscp_on_both_ends(fabric: Fabric, traffic: TrafficClass) -> None:
    marks = {"dscp": {KV: 10, MODEL: 26}, "service_level": {KV: 2, MODEL: 5}}
    settings = VerbsSettings(**marks, ack_timeout=18, retries=3)
    a, b = End(settings=settings), End(settings=settings)
    a.transport.connect(b.transport.address, traffic)
    one, other = fabric.pairs.values()
    for here, there in ((one, other), (other, one)):
        found = here.attributes
        assert found.ah_attr.sl == marks["service_level"][traffic]
        assert found.ah_attr.gr.traffic_class == marks["dscp"][traffic] << 2
        assert (found.ah_attr.is_global, found.ah_attr.gr.sgid_index, found.ah_attr.port_num) == (1, 1, 1)
        assert found.ah_attr.gr.dgid == fabric.gids[1]
        assert (found.dest_qp_num, found.rq_psn) == (there.qp_num, there.attributes.sq_psn)
        assert (found.path_mtu, found.timeout, found.retry_cnt, found.rnr_retry) == (5, 18, 3, 7)
        assert (found.max_rd_atomic, found.max_dest_rd_atomic) == (4, 16)
        assert not here.signals_all
    passive = next(end for end in (one, other) if end.capacity.max_recv_wr > 1)
    active = one if passive is other else other
    assert passive.attributes.qp_access_flags == ENUMS.IBV_ACCESS_REMOTE_READ | ENUMS.IBV_ACCESS_REMOTE_WRITE
    assert active.attributes.qp_access_flags == 0
    a.transport.close()
    b.transport.close()


def test_the_smaller_mtu_is_used(fabric: Fabric) -> None:
    a = End()
    fabric.port = SimpleNamespace(active_mtu=3, lid=7, link_layer=1, gid_tbl_len=1)
    b = End()
    a.transport.connect(b.transport.address, KV)
    assert [pair.attributes.path_mtu for pair in fabric.pairs.values()] == [3, 3]
    assert sorted(pair.attributes.ah_attr.dlid for pair in fabric.pairs.values()) == [0, 7]
    a.transport.close()
    b.transport.close()


def test_batches_are_half_the_send_queue_and_their_last_message_is_signalled(
    fabric: Fabric, pair: tuple[End, End]
) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    channel.write(a.region, a.remote(b), [Op(0, 1000, 10 * PIECE + 1), Op(100_000, 100_000, 5)], 0x01020304)
    a.wait(a.ends)
    assert [len(post) for post in fabric.posts] == [4, 4, 4]
    messages = [message for post in fabric.posts for message in post]
    assert [message.wr_id for message in messages] == list(range(1, 13))
    assert [message.length for message in messages] == [PIECE] * 10 + [1, 5]
    assert [bool(message.send_flags & SIGNALED) for message in messages] == [False, False, False, True] * 3
    plain, last = ENUMS.IBV_WR_RDMA_WRITE, ENUMS.IBV_WR_RDMA_WRITE_WITH_IMM
    assert [message.opcode for message in messages] == [plain] * 11 + [last]
    assert messages[-1].imm_data == socket.htonl(0x01020304)
    np.testing.assert_array_equal(b.memory[1000 : 1000 + 10 * PIECE + 1], a.memory[: 10 * PIECE + 1])
    b.wait(lambda: b.events)
    assert [event.immediate for event in b.events if isinstance(event, Received)] == [0x01020304]
    b.memory[:] = 9
    channel.read(a.region, a.remote(b), [Op(0, 0, PIECE), Op(2 * PIECE, 2 * PIECE, 1)])
    a.wait(lambda: len(a.ends()) == 2)
    assert [message.opcode for message in fabric.posts[-1]] == [ENUMS.IBV_WR_RDMA_READ] * 2
    assert a.memory[0] == a.memory[PIECE - 1] == a.memory[2 * PIECE] == 9


def test_no_more_is_posted_than_the_send_queue_holds(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    fabric.held = True
    channel.write(a.region, a.remote(b), [Op(0, 0, 20 * PIECE)])
    channel.write(a.region, a.remote(b), [Op(0, 30 * PIECE, 5)])
    until(lambda: len(fabric.posts) == 2)
    for done, posts in ((3, 2), (1, 3), (3, 3), (1, 4), (4, 5)):  # completions come with the fourth and the eighth
        fabric.run(done)
        until(lambda posts=posts: len(fabric.posts) == posts)
        assert not a.ends()
        a.events += a.transport.poll()
    fabric.held = False
    fabric.run()
    a.wait(lambda: len(a.ends()) == 2)
    assert a.ends() == [(0, Status.OK), (1, Status.OK)]
    assert (b.memory[: 20 * PIECE] == a.memory[: 20 * PIECE]).all()


def test_completions_that_come_while_the_queue_is_armed_are_not_lost(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    fabric.held = True
    for _ in range(2):
        channel.write(a.region, a.remote(b), [Op(0, 0, 5)])
    until(lambda: len(fabric.posts) == 2)
    fabric.late = True
    fabric.run(1)
    a.wait(lambda: len(a.ends()) == 2)


def test_immediates_are_taken_as_fast_as_receives_are_posted_again(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    for number in range(50):
        channel.write(a.region, a.remote(b), [Op(0, 0, 1)] * (number % 2), number)
    b.wait(lambda: len(b.events) == 50)
    assert [event.immediate for event in b.events if isinstance(event, Received)] == list(range(50))
    a.wait(lambda: len(a.ends()) == 50)
    assert all(post[-1].send_flags & SIGNALED for post in fabric.posts)


def test_refusals_by_the_owner_wait_for_their_turn_and_post_nothing(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    fabric.held = True
    channel.write(a.region, a.remote(b), [Op(0, 0, 5)])
    channel.write(a.region, a.remote(b), [Op(0, b.region.length, 5)], 1)
    channel.write(a.region, a.remote(b), [Op(0, 0, 5)])
    until(lambda: len(fabric.posts) == 2)
    a.events += a.transport.poll()
    assert not a.ends()
    fabric.run()
    a.wait(lambda: len(a.ends()) == 3)
    assert a.ends() == [(0, Status.OK), (1, Status.ACCESS), (2, Status.OK)]


def test_after_a_refusal_by_the_device_tickets_end_when_all_is_flushed(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    fabric.held, fabric.flushes = True, False
    for number in range(6):
        channel.write(a.region, a.remote(b), [Op(0, number * 2 * PIECE, 2 * PIECE)])
    until(lambda: len(fabric.posts) == 4)
    start = fabric.posts[0][0].remote
    fabric.refused.add(start + 2 * PIECE)  # the first message of the second ticket
    fabric.run()
    active = next(one for one in fabric.pairs.values() if one.sent)
    a.wait(a.ends)
    until(lambda: active.stopped and not active.queue.found)
    a.events += a.transport.poll()
    assert a.ends() == [(0, Status.OK)]
    assert channel.outstanding_bytes == 5 * 2 * PIECE
    assert not active.closed
    fabric.flushes = True  # also for the other end
    fabric.flush()
    a.wait(a.lost)
    assert a.ends() == [(0, Status.OK), (1, Status.ACCESS), *((number, Status.BROKEN) for number in range(2, 6))]
    assert isinstance(a.events[-1], PeerLost)
    assert "status 10" in a.lost()[0].reason
    assert active.closed


def test_close_gives_up_on_a_device_that_flushes_nothing(
    fabric: Fabric, pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_pair_module, "_STOP_SECONDS", 0.05)
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    fabric.held, fabric.flushes = True, False
    channel.write(a.region, a.remote(b), [Op(0, 0, 5)])
    until(lambda: fabric.posts)
    channel.close()
    assert not [one for one in fabric.pairs.values() if one.sent and not one.closed]
    a.events += a.transport.poll()
    assert a.ends() == [(0, Status.CANCELLED)]
    assert not a.lost()


def test_the_target_destroys_its_queue_pair_before_it_reports_the_loss(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    channel.write(a.region, a.remote(b), [Op(0, 0, 5)], 7)
    (passive,) = [one for one in fabric.pairs.values() if one.capacity.max_recv_wr > 1]
    seen: list[bool] = []
    push = b.transport.events.push

    def watch(event: Event) -> None:
        if isinstance(event, PeerLost):
            seen.append(passive.closed)
        push(event)

    b.transport.events.push = watch  # type: ignore[method-assign]
    b.wait(b.transport.peers)
    (peer,) = b.transport.peers()
    b.wait(lambda: b.events)
    b.transport.disconnect(peer)
    b.wait(b.lost)
    assert seen == [True]
    assert [type(event) for event in b.events] == [Received, PeerLost]
    a.wait(a.lost)


def test_immediates_that_are_there_come_before_the_loss(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    tickets = [channel.write(a.region, a.remote(b), [], number) for number in range(9)]
    a.wait(lambda: len(a.ends()) == len(tickets))
    channel.close()
    b.wait(b.lost)
    assert [event.immediate for event in b.events[:-1] if isinstance(event, Received)] == list(range(9))
    assert isinstance(b.events[-1], PeerLost)


def test_what_can_not_be_posted_breaks_the_channel_and_leaks_nothing(
    fabric: Fabric, pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_pair_module, "_STOP_SECONDS", 0.05)
    a, b = pair
    channel = a.transport.connect(b.transport.address, KV)
    fabric.refuse_post = True
    channel.write(a.region, a.remote(b), [Op(0, 0, 3 * PIECE)])
    a.wait(a.lost)
    assert a.ends() == [(0, Status.BROKEN)]
    assert "send" in a.lost()[0].reason


def test_memory_is_registered_with_the_rights_that_it_was_given(fabric: Fabric) -> None:
    end = End()
    local, write, read = (
        ENUMS.IBV_ACCESS_LOCAL_WRITE,
        ENUMS.IBV_ACCESS_REMOTE_WRITE,
        ENUMS.IBV_ACCESS_REMOTE_READ,
    )
    end.transport.register(end.memory[:10], remote_write=False)
    end.transport.register(end.memory[5:10], remote_read=False)
    end.transport.register(b"constant", remote_write=False, remote_read=False)
    found = list(fabric.memory.values())
    assert [one.access for one in found] == [local | write | read, local | read, local | write, 0]
    assert [one.nbytes for one in found] == [end.memory.nbytes, 10, 5, 8]
    assert found[2].address == end.memory.ctypes.data + 5
    fabric.refuse_memory = True
    with pytest.raises(ValueError, match="can't register 7 bytes"):
        end.transport.register(bytearray(7))
    end.transport.close()
    assert all(isinstance(one, MR) and one.closed for one in found)


@pytest.mark.parametrize("enums", ["enums", "libibverbs_enums"])
def test_pyverbs_of_old_and_new_names(monkeypatch: pytest.MonkeyPatch, enums: str) -> None:
    install(monkeypatch, enums)
    assert device_names() == ["rdma0", "rdma1"]
    device = Device()
    assert device.name == "rdma0"
    device.close()


@pytest.mark.parametrize(
    ("layer", "gids", "index"),
    [
        (2, ["fe80::1", "::ffff:10.0.0.1", "::"], 1),
        (2, ["::", "fe80::1", "fe80::2"], 1),
        (1, ["fe80::1"], 0),
    ],
)
def test_the_address_is_that_of_roce_2_over_ipv4(fabric: Fabric, layer: int, gids: list[str], index: int) -> None:
    fabric.gids = gids
    fabric.port = SimpleNamespace(active_mtu=5, lid=0, link_layer=layer, gid_tbl_len=len(gids))
    device = Device()
    assert device.gid_index == index
    device.close()
    chosen = Device("rdma1", gid_index=len(gids) - 1)
    assert chosen.gid_index == len(gids) - 1
    chosen.close()


def test_a_port_without_an_address_is_refused(fabric: Fabric) -> None:
    fabric.gids = ["::"] * 3
    with pytest.raises(ValueError, match="port 1 of rdma0 has no address"):
        Device()


def test_errors_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    with pytest.raises(NotImplementedError, match="python3-pyverbs"):
        VerbsTransport(SECRET)
    fabric = install(monkeypatch)
    with pytest.raises(ValueError, match="device='mlx5_9' must be one of rdma0, rdma1"):
        VerbsTransport(SECRET, device="mlx5_9")
    with pytest.raises(ValueError, match="secret of 5 bytes"):
        VerbsTransport(b"short")
    fabric.names = []
    with pytest.raises(NotImplementedError, match="no RDMA device"):
        VerbsTransport(SECRET)

    def no_kernel() -> None:
        raise PyverbsError("Failed to get devices list")

    monkeypatch.setattr(sys.modules["pyverbs.device"], "get_device_list", no_kernel)
    with pytest.raises(NotImplementedError, match="ib_uverbs"):
        VerbsTransport(SECRET)
    assert not fabric.open


def test_the_package_of_carriers_does_without_pyverbs() -> None:
    code = "import sys, jaxdual.transport, jaxdual.transport.verbs; sys.exit(any('pyverbs' in m for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"message_bytes": 100},
        {"send_depth": 1},
        {"receive_depth": 0},
        {"ack_timeout": 0},
        {"retries": 8},
        {"silence_seconds": 1.0},
        {"gid_index": -1},
        {"dscp": {KV: 1}},
        {"dscp": {KV: 1, MODEL: 64}},
        {"service_level": {KV: 16, MODEL: 1}},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VerbsSettings(**wrong)


def test_a_stranger_gets_no_queue_pair(fabric: Fabric, pair: tuple[End, End]) -> None:
    a, _ = pair
    stranger = VerbsTransport(b"another secret, as long")
    with pytest.raises(PermissionError, match="secret"):
        stranger.connect(a.transport.address, KV)
    stranger.close()
    assert not fabric.pairs
    assert not any(isinstance(one, QP) for one in fabric.open)


def test_a_device_is_found_by_the_address_of_its_port(tmp_path: Path) -> None:
    for name, gids in {"mlx5_0": ["fe80::1", "::ffff:10.0.0.1"], "mlx5_1": ["::ffff:10.0.0.2", "fd00::2"]}.items():
        table = tmp_path / name / "ports" / "1" / "gids"
        table.mkdir(parents=True)
        for index, gid in enumerate([*gids, "::"]):
            (table / str(index)).write_text(ipaddress.IPv6Address(gid).exploded + "\n")
        (table / "9").write_text("")  # as an entry that nothing is in
    found = [device_at(host, devices=tmp_path) for host in ("10.0.0.1", "10.0.0.2", "fd00::2", "10.0.0.3")]
    assert found == ["mlx5_0", "mlx5_1", "mlx5_1", None]
    assert device_at("10.0.0.1", 2, tmp_path) is None
    assert device_at("no.such.host.invalid", devices=tmp_path) is None
