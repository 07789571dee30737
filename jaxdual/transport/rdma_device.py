"""RDMA devices by pyverbs: what is opened once, the memory that is registered with it, and the ways of pyverbs.

pyverbs is imported when a device is opened. It comes from the host's distribution, since it must match the rdma-core
that is installed; version 44 and newer will do. It never releases the interpreter's lock, so that nothing may be called
that waits; and older versions don't tell the descriptor of a completion channel, which is therefore found among those
of this process.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

_LOG = logging.getLogger(__name__)
_PARTS = {
    "device": ("Context", "get_device_list"),
    "pd": ("PD",),
    "mr": ("MR",),
    "cq": ("CQ", "CompChannel"),
    "qp": ("QP", "QPAttr", "QPCap", "QPInitAttr"),
    "addr": ("AHAttr", "GID", "GlobalRoute"),
    "wr": ("SGE", "RecvWR", "SendWR"),
    "pyverbs_error": ("PyverbsError",),
}
_CLOSE_SECONDS = 30.0  # that threads have to let go of their queue pairs
_MOST_READS = 16
# Held while descriptors of events come and go, so that a new one can be told from the others.
_DESCRIPTORS = threading.Lock()


@dataclass(frozen=True, slots=True)
class Memory:
    """A registration: address and length of the bytes, and the keys of this side and of peers."""

    handle: Any
    address: int
    length: int
    local_key: int
    remote_key: int


def load_pyverbs() -> SimpleNamespace:
    """The names of pyverbs that are used here.

    Raises:
      NotImplementedError: it is not installed, or not for this interpreter.
    """
    found: dict[str, Any] = {}
    try:
        for part, names in _PARTS.items():
            module = importlib.import_module(f"pyverbs.{part}")
            found.update({name: getattr(module, name) for name in names})
        try:
            found["enums"] = importlib.import_module("pyverbs.libibverbs_enums")
        except ModuleNotFoundError:  # before version 56
            found["enums"] = importlib.import_module("pyverbs.enums")
    except ImportError as error:
        raise NotImplementedError(
            f"pyverbs can't be imported ({error}). Install the distribution's python3-pyverbs (Debian, Ubuntu, Fedora, "
            "RHEL), which matches its rdma-core, and use the distribution's Python or one of the same version"
        ) from error
    return SimpleNamespace(**found)


def device_names(pyverbs: SimpleNamespace | None = None) -> list[str]:
    """RDMA devices of this host.

    Raises:
      NotImplementedError: pyverbs is not installed, or the kernel has no RDMA.
    """
    pyverbs = pyverbs or load_pyverbs()
    try:
        return sorted(device.name.decode() for device in pyverbs.get_device_list())
    except pyverbs.PyverbsError as error:
        raise NotImplementedError(f"no RDMA devices: {error} (is the kernel module ib_uverbs loaded?)") from error


def device_at(host: str, port: int = 1, devices: Path = Path("/sys/class/infiniband")) -> str | None:
    """The device with a port that has an address of this host (RoCE); None if there is none, as with InfiniBand.

    Args:
      host: name or address.
      port: of the device, counted from 1.
      devices: where the kernel lists them.
    """
    try:
        found = {ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return None
    for table in sorted(devices.glob(f"*/ports/{port}/gids")):
        for entry in table.iterdir():
            with contextlib.suppress(OSError, ValueError):  # an empty entry can't be read
                gid = ipaddress.IPv6Address(entry.read_text().strip())
                if (gid.ipv4_mapped or gid) in found:
                    return table.parts[-4]
    return None


class Device:
    """An opened device with its protection domain, memory and queue pairs.

    Args:
      name: None for the first one.
      port: counted from 1.
      gid_index: None for that of RoCE v2 over IPv4, or else over IPv6; with InfiniBand the first.

    Raises:
      NotImplementedError: this host has no RDMA device, or lacks pyverbs.
      ValueError: no such device, or the port has no address of that kind.
      OSError: it can't be opened.
    """

    def __init__(self, name: str | None = None, port: int = 1, gid_index: int | None = None) -> None:
        self.pyverbs = load_pyverbs()
        names = device_names(self.pyverbs)
        if not names:
            raise NotImplementedError("this host has no RDMA device")
        if name is not None and name not in names:
            raise ValueError(f"device={name!r} must be one of {', '.join(names)}")
        self.name = name or names[0]
        self.port = port
        self._idle = threading.Condition()
        self._pairs = 0
        self._closed = False
        self._memory: list[Memory] = []
        with _DESCRIPTORS, self.errors(f"device {self.name}"):
            self.context = self.pyverbs.Context(name=self.name)
        try:
            with self.errors(f"device {self.name}"):
                attributes = self.context.query_port(port)
                limits = self.context.query_device()
                self.gid_index = self._gid_index(attributes) if gid_index is None else gid_index
                gid = str(self.context.query_gid(port, self.gid_index))
                self.domain = self.pyverbs.PD(self.context)
        except BaseException:
            with _DESCRIPTORS:
                self.context.close()
            raise
        self.gid = ipaddress.IPv6Address(gid).packed
        self.lid = attributes.lid
        self.mtu = int(attributes.active_mtu)
        self.serves_reads = max(1, min(_MOST_READS, limits.max_qp_rd_atom))
        self.asks_reads = max(1, min(_MOST_READS, limits.max_qp_init_rd_atom))

    def register(self, buffer: memoryview, *, remote_write: bool, remote_read: bool) -> Memory:
        """Registers bytes until the device is closed; they must stay where they are.

        Raises:
          ValueError: the device can't use that memory, or too little of it may be locked (`ulimit -l`).
        """
        flags = self.pyverbs.enums
        access = 0 if buffer.readonly else flags.IBV_ACCESS_LOCAL_WRITE
        access |= flags.IBV_ACCESS_REMOTE_WRITE if remote_write else 0
        access |= flags.IBV_ACCESS_REMOTE_READ if remote_read else 0
        address = int(np.frombuffer(buffer, np.uint8).ctypes.data)
        with self._idle:
            if self._closed:
                raise ValueError("the device is closed")
            try:
                handle = self.pyverbs.MR(self.domain, buffer.nbytes, access, address=address)
            except self.pyverbs.PyverbsError as error:
                raise ValueError(f"{self.name} can't register {buffer.nbytes} bytes: {error}") from error
            memory = Memory(handle, address, buffer.nbytes, handle.lkey, handle.rkey)
            self._memory.append(memory)
        return memory

    def hold(self) -> None:
        """Says that a queue pair is in use, until `let_go`.

        Raises:
          OSError: the device is closed.
        """
        with self._idle:
            if self._closed:
                raise OSError(errno.EBADF, "the device is closed")
            self._pairs += 1

    def let_go(self) -> None:
        """Says that a queue pair is closed."""
        with self._idle:
            self._pairs -= 1
            self._idle.notify_all()

    def open_channel(self) -> tuple[Any, int]:
        """A completion channel and its descriptor, which doesn't block.

        Raises:
          OSError: the device has none left.
        """
        with _DESCRIPTORS, self.errors("completion channel"):
            before = _event_descriptors()
            channel = self.pyverbs.CompChannel(self.context)
            fd = getattr(channel, "fd", None)
            fd = (_event_descriptors() - before).pop() if fd is None else fd
        os.set_blocking(fd, False)
        return channel, fd

    def close_channel(self, channel: Any) -> None:
        """Closes one, and with it its descriptor."""
        with _DESCRIPTORS, self.errors("completion channel"):
            channel.close()

    def close(self) -> None:
        """Waits until the queue pairs are closed, and lets go of memory and device. May be called again."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            if not self._idle.wait_for(lambda: not self._pairs, _CLOSE_SECONDS):
                # What they are made of must not be freed below them.
                _LOG.error("%s stays open: %d queue pairs are in use", self.name, self._pairs)
                return
            for memory in self._memory:
                memory.handle.close()
            self._memory.clear()
            self.domain.close()
            with _DESCRIPTORS:
                self.context.close()

    def _gid_index(self, attributes: Any) -> int:
        """The entry of the port's table of addresses that is used unless one is named."""
        flags = self.pyverbs.enums
        if attributes.link_layer != flags.IBV_LINK_LAYER_ETHERNET:
            return 0
        v2 = flags.IBV_GID_TYPE_SYSFS_ROCE_V2  # query_gid_type counts otherwise than query_gid_ex
        version_6 = None
        for index in range(attributes.gid_tbl_len):
            try:
                address = ipaddress.IPv6Address(str(self.context.query_gid(self.port, index)))
                if not int(address) or self.context.query_gid_type(self.port, index) != v2:
                    continue
            except self.pyverbs.PyverbsError:  # an empty entry
                continue
            if address.ipv4_mapped is not None:
                return index
            if version_6 is None:
                version_6 = index
        if version_6 is None:
            raise ValueError(f"port {self.port} of {self.name} has no address for RoCE v2")
        return version_6

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Has errors of pyverbs raised as `OSError`."""
        try:
            yield
        except self.pyverbs.PyverbsError as error:
            raise OSError(getattr(error, "error_code", 0) or errno.EIO, f"{what}: {error}") from error


def _event_descriptors() -> set[int]:
    """Those of this process that announce events of a device."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found
