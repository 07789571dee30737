"""Whole files read and written at once, with O_DIRECT where buffers allow it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable

import numpy as np

from jaxdual.kv.store.format import PAGE_BYTES

O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


def is_aligned(buffer: memoryview) -> bool:
    """Whether direct I/O can use a buffer: whole pages of memory."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return not address % PAGE_BYTES and not len(buffer) % PAGE_BYTES


def read_whole(descriptor: int, *buffers: memoryview) -> bool:
    """Fills the buffers from the start of a file; False if it is shorter."""
    return _transfer(os.preadv, descriptor, list(buffers))


def write_whole(descriptor: int, *buffers: memoryview) -> None:
    """Writes the buffers to the start of a file."""
    if not _transfer(os.pwritev, descriptor, list(buffers)):
        raise OSError(f"nothing more can be written to descriptor {descriptor}")


def _transfer(call: Callable[[int, list[memoryview], int], int], descriptor: int, buffers: list[memoryview]) -> bool:
    offset = 0
    while buffers:
        done = call(descriptor, buffers, offset)
        if not done:
            return False
        offset += done
        while buffers and done >= len(buffers[0]):
            done -= len(buffers.pop(0))
        if buffers:  # interrupted, or a full disk: the rest may start anywhere, which direct I/O can't
            buffers[0] = buffers[0][done:]
            fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
    return True
