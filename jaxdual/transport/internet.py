"""Addresses of the carriers that speak over TCP, and the sockets behind them.

They are HOST:PORT#NUMBER: a random number tells a listener from an earlier one that had the same port.
"""

from __future__ import annotations

import secrets
import socket
from typing import Any

_LEAST_SECRET = 16


def check_secret(secret: bytes) -> None:
    """Raises `ValueError` for a secret that is too short to be one."""
    if len(secret) < _LEAST_SECRET:
        raise ValueError(f"a secret of {len(secret)} bytes, at least {_LEAST_SECRET} are needed")


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket, and its address for peers.

    Args:
      port: 0 for a free one.

    Raises:
      OSError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=128)
    bound = listener.getsockname()[1]
    return listener, f"{f'[{host}]' if ':' in host else host}:{bound}#{secrets.token_hex(4)}"


def socket_to(address: str) -> tuple[socket.socket, Any]:
    """A socket that is not connected yet, and what to connect it to.

    Raises:
      ValueError: not an address.
      OSError: no such host.
    """
    host, _, port = address.partition("#")[0].rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    return socket.socket(family, kind, protocol), target
