"""extract_kernel.py BZIMAGE OUT: the uncompressed kernel, so that the emulated processor need not unpack it."""

from __future__ import annotations

import ctypes
import lzma
import struct
import sys
import zlib
from pathlib import Path

SETUP_SECTORS, PAYLOAD = 0x1F1, 0x248  # of the header that Linux's x86 boot protocol describes


def unpack(payload: bytes) -> bytes:
    """The kernel, whatever it was compressed with.

    Raises:
      ValueError: unknown compression, or it does not unpack to an ELF file.
    """
    if payload.startswith(b"\xfd7zXZ\0"):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        kernel = zlib.decompressobj(31).decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        kernel = unpack_zstd(payload)
    else:
        raise ValueError(f"unknown compression {payload[:6]!r}")
    if not kernel.startswith(b"\x7fELF"):
        raise ValueError("not a kernel")
    return kernel


def unpack_zstd(payload: bytes) -> bytes:
    """By the library that dpkg needs; the kernel's build appends the size."""
    (size,) = struct.unpack("<I", payload[-4:])
    zstd = ctypes.CDLL("libzstd.so.1")
    zstd.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    zstd.ZSTD_decompress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(size)
    zstd.ZSTD_decompress(out, size, payload[:-4], len(payload) - 4)
    return out.raw


if __name__ == "__main__":
    image = Path(sys.argv[1]).read_bytes()
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = ((image[SETUP_SECTORS] or 4) + 1) * 512 + offset
    Path(sys.argv[2]).write_bytes(unpack(image[start : start + length]))
