"""What is shared memory's own: slabs, who may map them, and peers that hold on."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxdual.transport import Op, SharedSlab, ShmTransport, Status, TrafficClass, shm, sockets
from tests.transport.nodes import MIB, ROOT, Node, Process

KV = TrafficClass.KV


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node("shm", tmp_path)
    yield made
    made.close()


def test_a_slab_is_aligned_and_rounded_up() -> None:
    slab = SharedSlab(5, populate=True)
    assert slab.nbytes == 2 << 20
    assert slab.array.ctypes.data % mmap.PAGESIZE == 0
    assert not slab.array.any()
    assert slab.offset_of(slab.array[100:200]) == 100
    assert slab.offset_of(np.empty(10, np.uint8)) is None
    slab.close()
    slab.close()
    with pytest.raises(ValueError, match="nbytes=0"):
        SharedSlab(0)


def test_another_process_maps_a_slab_by_its_path() -> None:
    slab = SharedSlab(MIB)
    code = "import sys; from jaxdual.transport import SharedSlab; s = SharedSlab.open(sys.argv[1]); s.array[7] = 42"
    subprocess.run([sys.executable, "-c", code, slab.path], cwd=ROOT, check=True)
    assert slab.array[7] == 42
    same = SharedSlab.attach(slab.fd)
    same.array[8] = 43
    assert slab.array[8] == 43
    same.close()
    slab.close()


def test_a_slab_cant_be_shrunk_under_its_users_and_other_files_are_no_slabs(tmp_path: Path) -> None:
    slab = SharedSlab(MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(slab.fd, 4096)
    slab.close()
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with pytest.raises(ValueError, match="not a slab"):
        SharedSlab.open(str(tmp_path / "file"))


def test_a_slab_in_use_isnt_unmapped() -> None:
    slab = SharedSlab(MIB)
    view = slab.view()
    with pytest.raises(BufferError):
        slab.close()
    view.release()
    slab.close()


def test_memory_for_peers_must_lie_in_a_slab(node: Node) -> None:
    for buffer in (bytearray(100), np.zeros(100, np.uint8)):
        with pytest.raises(ValueError, match="slab"):
            node.transport.register(buffer)
    private = node.transport.register(bytearray(b"abc"), remote_write=False, remote_read=False)
    channel = node.connect(node)
    assert node.status(channel.write(private, node.remote(node), [Op(0, 10, 3)])) is Status.OK
    assert node.memory[10:13].tobytes() == b"abc"
    remote = node.transport.remote(private.descriptor)
    assert node.status(channel.read(node.region, remote, [Op(0, 0, 3)])) is Status.ACCESS


def test_what_peers_may_only_read_they_get_read_only(node: Node) -> None:
    region = node.transport.register(node.memory[:MIB], remote_write=False)
    channel = node.connect(node)
    node.status(channel.read(node.region, node.transport.remote(region.descriptor), [Op(MIB, 0, 10)]))
    granted = channel._granted[region.key]  # type: ignore[attr-defined]
    assert not granted.memory.flags.writeable
    del granted


def test_nonsense_ends_the_connection_and_nothing_else(node: Node, tmp_path: Path) -> None:
    for data in (b"x", b"x" * 400, shm._pack(shm._Kind.GRANT), b"\0" * shm._MESSAGE.size):
        for greeted in (False, True):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(10)
            sock.connect("\0" + node.address)
            if greeted:
                sock.send(shm._pack(shm._Kind.HELLO, KV) + shm._VERSION + b"me")
                assert sock.recv(1000)
            sock.send(data)
            assert sock.recv(1000) == b""
            sock.close()
    node.wait(lambda: len(node.lost()) == 4, "PeerLost")
    channel = node.connect(node)
    assert node.status(channel.write(node.region, node.remote(node), [Op(0, MIB, 1)])) is Status.OK


def test_other_users_are_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm.os, "geteuid", lambda: 54321)
    with pytest.raises(PermissionError, match="user"):
        node.transport.connect(node.address, KV)


def test_a_stopped_target_disturbs_no_writer(node: Node, tmp_path: Path) -> None:
    peer = Process("shm", tmp_path)
    channel = node.connect(peer)
    node.status(channel.write(node.region, node.remote(peer), [Op(0, 0, 1)]))
    peer.send(signal.SIGSTOP)
    assert node.status(channel.write(node.region, node.remote(peer), [Op(0, 0, MIB)], 1)) is Status.OK
    # Immediates that it doesn't take fill the socket: closing ends even that.
    for _ in range(5000):
        channel.write(node.region, node.remote(peer), [], 2)
    started = time.monotonic()
    channel.close()
    assert time.monotonic() - started < 5
    peer.close()


def test_a_stopped_writer_keeps_the_memory_in_quarantine(node: Node, tmp_path: Path) -> None:
    peer = Process("shm", tmp_path)
    peer.flood(node)
    node.wait(lambda: node.memory.any())
    peer.send(signal.SIGSTOP)
    (serving,) = node.transport._servings
    node.transport.disconnect(serving.peer)
    with pytest.raises(AssertionError, match="not in"):
        node.wait(node.lost, "PeerLost", seconds=0.3)
    peer.send(signal.SIGCONT)
    node.wait(node.lost, "PeerLost")
    node.memory[:] = 0x55
    peer.flood(node, write=False)  # it still lives, and has gone through all that it had posted
    assert (node.memory == 0x55).all()
    peer.close()


@pytest.mark.parametrize("how", ["closed here", "disconnected there", "refused there"])
def test_the_end_is_not_reported_while_a_copy_is_under_way(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The copy is held by the test, so that no chance decides which comes first."""
    copying, go_on = threading.Event(), threading.Event()
    copy = np.copyto

    def held_copy(target: np.ndarray, source: np.ndarray) -> None:
        copying.set()
        assert go_on.wait(10)
        copy(target, source)

    other = Node("shm", tmp_path)
    channel = other.connect(node)
    monkeypatch.setattr(shm.np, "copyto", held_copy)
    other.memory[:] = 1
    ticket = channel.write(other.region, other.remote(node), [Op(0, 0, MIB)])
    assert copying.wait(10)
    closing = threading.Thread(target=channel.close)
    if how == "closed here":
        closing.start()
    elif how == "disconnected there":
        node.transport.disconnect(node.transport.peers()[0])
    else:
        channel._socket.send(b"nonsense")  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="not in"):
        node.wait(node.lost, "PeerLost", seconds=0.2)
    assert not other.ended(ticket)
    assert closing.is_alive() == (how == "closed here")
    go_on.set()
    node.wait(node.lost, "PeerLost")
    assert other.status(ticket) is (Status.CANCELLED if how == "closed here" else Status.BROKEN)
    if how == "closed here":
        closing.join()
    other.close()


def test_close_waits_for_a_chunk_at_most(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_COPY_BYTES", 4096)
    copied, closing = [], threading.Event()
    copy = np.copyto

    def counted_copy(target: np.ndarray, source: np.ndarray) -> None:
        copied.append(source.nbytes)
        if len(copied) == 3:
            channel._closing = True  # type: ignore[attr-defined]  # what `close` begins with
            closing.set()
        copy(target, source)

    channel = node.connect(node)
    monkeypatch.setattr(shm.np, "copyto", counted_copy)
    ticket = channel.write(node.region, node.remote(node), [Op(0, 2 * MIB, MIB)])
    assert closing.wait(10)
    assert node.status(ticket) is Status.CANCELLED
    assert copied == [4096] * 3


def test_close_says_if_a_peer_still_holds_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_CLOSE_SECONDS", 0.2)
    node, peer = Node("shm", tmp_path), Process("shm", tmp_path)
    peer.flood(node)
    node.wait(lambda: node.memory.any())
    peer.send(signal.SIGSTOP)
    with pytest.raises(TimeoutError, match=peer.address):
        node.transport.close()
    node.poll()
    assert not node.lost()
    peer.close()
    node.close()


def test_nobody_polls_and_immediates_are_bounded(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxdual.transport import events

    monkeypatch.setattr(events, "_MOST_RECEIVED", 50)
    other = Node("shm", tmp_path)
    channel = other.connect(node)
    for _ in range(200):
        channel.write(other.region, other.remote(node), [], 1)
    other.wait(other.lost, "PeerLost")
    node.wait(node.lost, "PeerLost")
    assert len(node.immediates()) == 50
    assert "nobody polls" in node.lost()[0].reason
    other.close()


def test_nothing_is_left_of_a_killed_process(node: Node, tmp_path: Path) -> None:
    before = sorted(os.listdir("/dev/shm"))
    peer = Process("shm", tmp_path)
    peer.flood(node)
    peer.close()
    node.wait(node.lost, "PeerLost")
    assert sorted(os.listdir("/dev/shm")) == before
    assert peer.address not in Path("/proc/net/unix").read_text()


def test_a_slab_of_two_regions_is_mapped_once(node: Node) -> None:
    regions = [node.transport.register(node.memory[i * 1000 : i * 1000 + 1000]) for i in range(3)]
    other = ShmTransport()
    source = other.register(bytearray(b"z" * 1000), remote_write=False, remote_read=False)
    channel = other.connect(node.address, KV)
    for region in regions:
        channel.write(source, other.remote(region.descriptor), [Op(0, 1, 999)])
    done: list[object] = []
    end = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < end:
        done += other.poll()
    assert len(channel._mapped) == 1  # type: ignore[attr-defined]
    assert [int(node.memory[i * 1000]) for i in range(3)] == [0, 0, 0]
    assert bytes(node.memory[1:1000]) == bytes(node.memory[2001:3000]) == b"z" * 999
    other.close()
