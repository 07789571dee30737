"""What is TCP's own: who may connect, nonsense on the port, silence, marks on packets."""

from __future__ import annotations

import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdual.transport import Op, Status, TcpSettings, TcpTransport, TrafficClass
from jaxdual.transport import frames as wire
from jaxdual.transport.internet import socket_to
from tests.transport.nodes import MIB, SECRET, Node, Process

KV, MODEL = TrafficClass.KV, TrafficClass.MODEL
SILENCE = 0.6
# Memory that peers may touch, in the middle of memory that they may not.
START, LENGTH = 64 << 10, 64 << 10


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node("tcp", tmp_path)
    yield made
    made.close()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Node]:
    """A node that takes a peer for gone that says nothing for a moment: on a busy machine, also one that is there."""
    made = Node("tcp", tmp_path, silence=SILENCE)
    yield made
    made.close()


def dial(node: Node) -> socket.socket:
    return dial_address(node.address)


def dial_address(address: str) -> socket.socket:
    sock, target = socket_to(address)
    sock.settimeout(10)
    sock.connect(target)
    return sock


def let_in(node: Node) -> socket.socket:
    sock = dial(node)
    wire.greet_as_initiator(sock, SECRET, "127.0.0.1:1", KV, time.monotonic() + 10)
    sock.settimeout(10)
    return sock


def closed(sock: socket.socket) -> bool:
    """Reads until the other side closes; an assertion by its deadline."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_a_stranger_is_refused(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    stranger = TcpTransport(b"another secret, as long")
    with pytest.raises(PermissionError, match="secret"):
        stranger.connect(node.address, KV)
    with pytest.raises(PermissionError, match="secret"):
        node.transport.connect(stranger.address, KV)
    stranger.close()
    node.poll()
    assert not node.events
    assert "wrong secret" in caplog.text
    with pytest.raises(ValueError, match="16"):
        TcpTransport(b"short")


def test_the_secret_never_crosses_the_wire_and_answers_cant_be_replayed(node: Node) -> None:
    sent = []
    for _ in range(2):
        here, there = socket.socketpair()
        there.sendall(wire._MAGIC + bytes(32))
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(PermissionError):
            wire.greet_as_initiator(here, SECRET, "a", KV, time.monotonic() + 10)
        sent.append(there.recv(1000))
        here.close()
        there.close()
    assert SECRET not in b"".join(sent)
    sock = dial(node)
    sock.recv(1000)
    sock.sendall(sent[0])
    assert closed(sock)
    sock.close()


def test_who_says_nothing_is_dropped_in_time(tmp_path: Path) -> None:
    transport = TcpTransport(SECRET, settings=TcpSettings(connect_seconds=0.2))
    started = time.monotonic()
    with dial_address(transport.address) as sock:
        sock.sendall(b"j")
        assert closed(sock)
    assert time.monotonic() - started < 5
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(TimeoutError):
        transport.connect(f"127.0.0.1:{mute.getsockname()[1]}", KV)
    transport.close()


def test_connections_are_bounded() -> None:
    transport = TcpTransport(SECRET, settings=TcpSettings(most_peers=3))
    first = [transport.connect(transport.address, KV) for _ in range(3)]
    with pytest.raises(PermissionError):
        transport.connect(transport.address, KV)
    first[0].close()
    while not transport.poll():
        pass
    transport.connect(transport.address, KV)
    transport.check_integrity()
    transport.close()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), greeted=st.booleans())
def test_random_bytes_are_harmless(node: Node, data: bytes, greeted: bool) -> None:
    before = node.memory.tobytes()
    sock = let_in(node) if greeted else dial(node)
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it was dropped before all was said
    assert closed(sock)
    sock.close()
    assert node.memory.tobytes() == before
    node.transport.check_integrity()


u64 = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2 * LENGTH), st.sampled_from([LENGTH, LENGTH - 1, 1, 2**63]))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.integers(0, 5),
    flags=st.integers(0, 7),
    extents=st.lists(st.tuples(u64, u64), max_size=3),
    count=st.one_of(st.none(), st.integers(0, 65535)),
    known=st.booleans(),
)
def test_requests_touch_only_what_was_registered(
    node: Node, kind: int, flags: int, extents: list[tuple[int, int]], count: int | None, known: bool
) -> None:
    node.memory[:] = 0
    view = node.slab.view()[START : START + LENGTH]
    key = node.transport.register(view).key if known else 12345
    first = extents[0] if extents else (0, 0)
    head = wire.REQUEST.pack(kind, flags, len(extents) if count is None else count, 0, 0, key, *first)
    ops = b"".join(struct.pack("<QQ", *extent) for extent in extents[1:])
    sock = let_in(node)
    try:
        sock.sendall(head + ops + b"\xff" * min(3 * LENGTH, sum(length for _, length in extents)))
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    assert closed(sock)
    sock.close()
    assert not node.memory[:START].any()
    assert not node.memory[START + LENGTH :].any()
    assert known or not node.memory.any()
    node.transport.check_integrity()
    del view


def test_malformed_requests_are_logged_and_end_the_connection(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    sock = let_in(node)
    sock.sendall(wire.REQUEST.pack(77, 0, 0, 0, 0, 0, 0, 0))
    assert closed(sock)
    sock.close()
    node.wait(node.lost, "PeerLost")
    assert "request of kind 77" in node.lost()[0].reason
    assert "request of kind 77" in caplog.text


def test_a_peer_that_answers_nonsense_breaks_the_channel(node: Node) -> None:
    for reply in (wire.REPLY.pack(9, 0, 0, 0, 0), wire.REPLY.pack(1, 0, 0, 0, 5), wire.REPLY.pack(1, 3, 0, 0, 0)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            accepted = []

            def answer(server: socket.socket = server, accepted: list = accepted, reply: bytes = reply) -> None:
                sock, _ = server.accept()
                accepted.append(sock)
                wire.greet_as_target(sock, SECRET, 10)
                sock.recv(10)
                sock.sendall(reply)

            thread = threading.Thread(target=answer)
            thread.start()
            channel = node.transport.connect(address, KV)
            ticket = channel.write(node.region, node.remote(node), [Op(0, 0, 100)])
            assert node.status(ticket) is Status.BROKEN
            thread.join()
            accepted[0].close()
    node.wait(lambda: len(node.lost()) == 3, "PeerLost")


@pytest.mark.parametrize("write", [True, False])
def test_a_stopped_target_is_noticed_in_time(hasty: Node, tmp_path: Path, write: bool) -> None:
    peer = Process("tcp", tmp_path, nbytes=16 * MIB, silence=SILENCE)
    idle = hasty.connect(peer)
    busy = hasty.connect(peer, MODEL)
    assert hasty.status(busy.write(hasty.region, hasty.remote(peer), [Op(0, 0, 1)])) is Status.OK
    peer.send(signal.SIGSTOP)
    started = time.monotonic()
    post = busy.write if write else busy.read
    tickets = [post(hasty.region, hasty.remote(peer), [Op(0, 0, 4 * MIB)]) for _ in range(8)]
    hasty.wait(lambda: len(hasty.lost()) == 2, "PeerLost")
    took = time.monotonic() - started
    assert 0.5 * SILENCE < took < 4 * SILENCE
    assert {event.source for event in hasty.lost()} == {idle, busy}
    assert all("nothing heard" in event.reason for event in hasty.lost())
    assert [hasty.ended(ticket) for ticket in tickets] == [[Status.BROKEN]] * 8
    peer.send(signal.SIGCONT)
    peer.close()


def test_a_stopped_initiator_is_noticed_in_time(hasty: Node, tmp_path: Path) -> None:
    peer = Process("tcp", tmp_path, silence=SILENCE)
    peer.flood(hasty)
    hasty.wait(lambda: hasty.memory.any())
    peer.send(signal.SIGSTOP)
    started = time.monotonic()
    hasty.wait(hasty.lost, "PeerLost")
    assert 0.5 * SILENCE < time.monotonic() - started < 4 * SILENCE
    hasty.memory[:] = 0x55
    peer.send(signal.SIGCONT)
    channel = hasty.connect(hasty)
    for _ in range(20):
        hasty.status(channel.write(hasty.region, hasty.remote(hasty), [Op(0, 2 * MIB, MIB)]))
    assert (hasty.memory == 0x55).all()
    peer.close()


def test_an_idle_or_slow_connection_stays(hasty: Node) -> None:
    channel = hasty.connect(hasty)
    end = time.monotonic() + 3 * SILENCE
    while time.monotonic() < end:
        hasty.wait(lambda: True)
        assert not hasty.lost()
        time.sleep(0.01)
    assert hasty.status(channel.write(hasty.region, hasty.remote(hasty), [Op(0, MIB, 1)])) is Status.OK
    # A write whose bytes come drop by drop, over more than the silence that would end it.
    sock = let_in(hasty)
    sock.sendall(wire.REQUEST.pack(1, 1, 1, 0, 0, hasty.region.key, 0, 40))
    for _ in range(40):
        sock.sendall(b"d")
        time.sleep(SILENCE / 20)
    heard = b""
    while len(heard) < wire.REPLY.size or heard[-wire.REPLY.size] != wire.Reply.WRITTEN:
        part = sock.recv(1000)
        assert part
        heard += part
    assert len(heard) > wire.REPLY.size, "it was not said to be alive"
    sock.close()


def test_packets_carry_the_mark_of_their_class(tmp_path: Path) -> None:
    marks = TcpSettings(dscp={MODEL: 46, KV: 8})
    a, b = TcpTransport(SECRET, settings=marks), TcpTransport(SECRET)
    for traffic, tos, back in ((MODEL, 46 << 2, 26 << 2), (KV, 8 << 2, 10 << 2)):
        channel = a.connect(b.address, traffic)
        assert channel._socket.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == tos  # type: ignore[attr-defined]
        (serving,) = b._servings
        end = time.monotonic() + 10
        while serving.socket.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) != back:  # its thread has the greeting by now
            assert time.monotonic() < end
        assert serving.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        channel.close()
        while not b.poll():
            pass
    a.close()
    b.close()


def test_ipv6(tmp_path: Path) -> None:
    try:
        transport = TcpTransport(SECRET, "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    channel = transport.connect(transport.address, KV)
    assert channel._socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS) == 10 << 2  # type: ignore[attr-defined]
    transport.close()


def test_more_ops_than_a_request_holds(node: Node) -> None:
    node.memory[:] = 0
    node.memory[:20_000:2] = 7
    ops = [Op(i * 2, MIB + i * 3, 1) for i in range(2 * wire.MOST_OPS + 5)]
    channel = node.connect(node)
    assert node.status(channel.write(node.region, node.remote(node), ops, 3)) is Status.OK
    assert all(node.memory[MIB + i * 3] == 7 for i in range(len(ops)))
    assert int((node.memory[MIB : 2 * MIB] != 0).sum()) == len(ops)
    back = [Op(2 * MIB + op.local, op.remote, 1) for op in ops]
    assert node.status(channel.read(node.region, node.remote(node), back)) is Status.OK
    assert int((node.memory[2 * MIB :] == 7).sum()) == len(ops)
    bad = [*ops[:-1], Op(0, 4 * MIB, 1)]
    assert node.status(channel.write(node.region, node.remote(node), bad, 4)) is Status.ACCESS
    assert node.status(channel.read(node.region, node.remote(node), bad)) is Status.ACCESS
    assert node.status(channel.write(node.region, node.remote(node), [Op(0, 0, 1)], 5)) is Status.OK
    assert node.immediates() == [3, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"connect_seconds": 0},
        {"silence_seconds": -1},
        {"buffer_bytes": 1},
        {"dscp": {KV: 1}},
        {"dscp": {KV: 1, MODEL: 64}},
    ],
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TcpSettings(**wrong)


def test_an_address_is_checked(node: Node) -> None:
    for address in ("", "nonsense", "127.0.0.1:", ":1", "127.0.0.1:99999", "127.0.0.1:-1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            node.transport.connect(address, KV)
