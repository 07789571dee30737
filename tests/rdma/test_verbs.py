"""What is the verbs carrier's own, on a device: marks on packets, refusals by the device, ends without help."""

from __future__ import annotations

import select
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual.transport import Op, PeerLost, Received, Status, TcpTransport, TrafficClass
from jaxdual.transport.lanes import DSCP
from jaxdual.transport.verbs import VerbsSettings, VerbsTransport
from tests.transport.nodes import MIB, RDMA_DEVICES, SECRET, WHY_NO_RDMA, Node, Process

KV, MODEL = TrafficClass.KV, TrafficClass.MODEL
ROCE_PORT = 4791
pytestmark = [pytest.mark.rdma, pytest.mark.skipif(not RDMA_DEVICES, reason=WHY_NO_RDMA)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    nodes = Node("verbs", tmp_path), Node("verbs", tmp_path)
    yield nodes
    for node in nodes:
        node.close()


def forge(channel: Any, node: Node, **fields: int) -> None:
    """Has a channel believe what the owner did not say."""
    channel._grants[node.region.key] = channel._grants[node.region.key]._replace(**fields)


def marks(sniffer: socket.socket) -> Counter[int]:
    """Type-of-service bytes of the RoCE packets that came in."""
    found: Counter[int] = Counter()
    while True:
        try:
            packet, address = sniffer.recvfrom(64)
        except BlockingIOError:
            return found
        udp = 14 + (packet[14] & 15) * 4
        is_udp = packet[12:14] == b"\x08\x00" and packet[23] == socket.IPPROTO_UDP
        if (
            address[2] != socket.PACKET_OUTGOING
            and is_udp
            and struct.unpack_from("!H", packet, udp + 2) == (ROCE_PORT,)
        ):
            found[packet[15]] += 1


@pytest.mark.skipif("rxeb" not in RDMA_DEVICES, reason="not the guest's link")
def test_each_class_has_its_mark_on_the_wire(pair: tuple[Node, Node]) -> None:
    a, b = pair
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sniffer:
        sniffer.bind(("veth1" if a.transport._device.name == "rxea" else "veth0", 0))
        sniffer.setblocking(False)
        seen = []
        for traffic in (KV, MODEL):
            channel = a.connect(b, traffic)
            assert a.status(channel.write(a.region, a.remote(b), [Op(0, 0, 50_000)], 1)) is Status.OK
            seen.append(marks(sniffer))
    assert [set(one) for one in seen] == [{DSCP[KV] << 2}, {DSCP[MODEL] << 2}]
    assert min(sum(one.values()) for one in seen) > 10


@pytest.mark.skipif("rxeb" not in RDMA_DEVICES, reason="not the guest's addresses")
@pytest.mark.parametrize(("host", "device"), [("10.9.1.1", "rxea"), ("10.9.1.2", "rxeb"), ("127.0.0.1", "rxea")])
def test_the_device_is_that_of_the_address(host: str, device: str) -> None:
    transport = VerbsTransport(SECRET, host)
    assert transport._device.name == device
    transport.close()


@pytest.mark.parametrize("forged", [{"remote_key": 0x5A5A5A}, {"length": 1 << 40}, {"address": 4096}])
def test_the_device_refuses_what_was_not_granted(pair: tuple[Node, Node], forged: dict[str, int]) -> None:
    """And the channel is broken then: one ticket says why, and each of the others ends once."""
    a, b = pair
    channel = a.connect(b)
    assert a.status(channel.write(a.region, a.remote(b), [Op(0, 0, 1)])) is Status.OK
    forge(channel, b, **forged)
    b.memory[:] = 0x55
    ops = [Op(0, 0, 100), Op(0, b.region.length, 100)] if "length" in forged else [Op(0, 0, 100)]
    refused = channel.write(a.region, a.remote(b), ops[-1:], 1)
    others = [channel.write(a.region, a.remote(b), [Op(0, 8 * n, 8)], n) for n in range(300)]
    a.wait(a.lost, "PeerLost")
    assert a.status(refused) is Status.ACCESS
    assert [a.ended(ticket) for ticket in others] == [[Status.BROKEN]] * 300
    assert channel.outstanding_bytes == 0
    b.wait(b.lost, "PeerLost")
    assert (b.memory == 0x55).all()
    assert not b.immediates()
    again = a.connect(b)
    assert a.status(again.write(a.region, a.remote(b), [Op(0, 0, 1)])) is Status.OK


def test_a_writer_that_does_not_listen_is_cut_off(tmp_path: Path) -> None:
    """Its device goes on to send: nothing of it may land once the loss is reported."""
    b = Node("verbs", tmp_path)
    settings = VerbsSettings(ack_timeout=14, retries=3)  # its device gives up in a third of a second
    writer = VerbsTransport(SECRET, device=RDMA_DEVICES[0], settings=settings)
    memory = np.ones(4 * MIB, np.uint8)
    region, remote = writer.register(memory), writer.remote(b.descriptor)
    channel: Any = writer.connect(b.address, KV)
    channel._break = lambda reason: None
    for _ in range(50):
        channel.write(region, remote, [Op(0, 0, 4 * MIB)])
    b.wait(lambda: b.memory.any())
    (peer,) = b.transport.peers()
    b.transport.disconnect(peer)
    b.wait(b.lost, "PeerLost")
    b.memory[:] = 0x55
    deadline = time.monotonic() + 5
    while channel.outstanding_bytes and time.monotonic() < deadline:
        select.select([writer.fileno()], [], [], 0.1)
        writer.poll()
    assert (b.memory == 0x55).all()
    assert not channel.outstanding_bytes
    writer.close()
    b.close()


def test_a_stopped_owner_serves_on(tmp_path: Path) -> None:
    a, peer = Node("verbs", tmp_path), Process("verbs", tmp_path)
    try:
        channel = a.connect(peer)
        assert a.status(channel.write(a.region, a.remote(peer), [Op(0, 0, 1)])) is Status.OK
        peer.send(signal.SIGSTOP)
        a.memory[:MIB] = np.random.default_rng(3).integers(0, 256, MIB, np.uint8)
        assert a.status(channel.write(a.region, a.remote(peer), [Op(0, MIB, MIB)])) is Status.OK
        assert a.status(channel.read(a.region, a.remote(peer), [Op(2 * MIB, MIB, MIB)])) is Status.OK
        np.testing.assert_array_equal(a.memory[:MIB], a.memory[2 * MIB : 3 * MIB])
    finally:
        peer.close()
        a.close()


def test_more_immediates_than_the_device_holds_all_come_before_the_end(pair: tuple[Node, Node]) -> None:
    a, b = pair
    channel = a.connect(b)
    tickets = [channel.write(a.region, a.remote(b), [Op(0, 0, 8)] * (n % 2), n) for n in range(400)]
    assert a.status(tickets[-1]) is Status.OK
    channel.close()
    b.wait(b.lost, "PeerLost")
    assert b.immediates() == list(range(400))
    assert isinstance(b.events[-1], PeerLost)
    assert all(isinstance(event, Received) for event in b.events[:-1])


def test_strangers_and_other_carriers_are_refused(pair: tuple[Node, Node]) -> None:
    a, b = pair
    stranger = VerbsTransport(b"another secret, as long")
    with pytest.raises(PermissionError, match="secret"):
        stranger.connect(b.address, KV)
    stranger.close()
    tcp = TcpTransport(SECRET)
    with pytest.raises(PermissionError):
        a.transport.connect(tcp.address, KV)
    channel = tcp.connect(b.address, KV)
    nowhere = tcp.remote(b"tcp".ljust(8, b"\0") + bytes(24))
    channel.write(tcp.register(b"something", remote_write=False), nowhere, [Op(0, 0, 9)])
    b.wait(b.lost, "PeerLost")
    tcp.close()


def test_a_device_is_let_go_of_only_when_nobody_uses_it(tmp_path: Path) -> None:
    for _ in range(5):
        one = VerbsTransport(SECRET, settings=VerbsSettings(send_depth=2, receive_depth=1, message_bytes=4096))
        memory = bytearray(1 << 16)
        region = one.register(memory)
        channel = one.connect(one.address, KV)
        channel.write(region, one.remote(region.descriptor), [Op(0, 1 << 15, 1 << 15)], 1)
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 30, "it has waited in vain for queue pairs"
        one.close()
        with pytest.raises(ValueError, match="closed"):
            one.register(memory)
