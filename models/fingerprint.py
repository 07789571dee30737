"""What identifies the weights of a model folder, cheaply."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from models.tensor_files import ORBAX_FOLDER

_SAMPLES = 64
_SAMPLE_BYTES = 4096
# Smaller tensors are read whole: norms and mixing weights may be all that two models differ in.
_SMALL_TENSOR_BYTES = 1 << 20
_MOST_HEADER_BYTES = 100 << 20  # what safetensors accepts


def model_fingerprint(folder: Path, dtype: str, *, random_weights: bool = False) -> bytes:
    """A digest that differs between models whose keys and values differ.

    It covers the configuration, and of each weight file the name, the size, the beginning (which lists all tensors),
    64 evenly spaced pieces of 4 KiB, and of safetensors all tensors of up to 1 MiB: reading whole files would take as
    long as loading them. Orbax gives its files other names each time.

    Args:
      folder: in Hugging Face layout, or converted to Orbax.
      dtype: that the model computes in.
      random_weights: those of `models.init` are used and not those of the folder.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(dtype.encode() + b"\0" + (folder / "config.json").read_bytes())
    if random_weights:
        digest.update(b"\0random")
        return digest.digest()
    orbax = [file for file in (folder / ORBAX_FOLDER).rglob("*") if file.is_file()]
    for file in sorted([*folder.glob("*.safetensors"), *orbax]):
        size = file.stat().st_size
        digest.update(f"\0{file.relative_to(folder)}\0{size}\0".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
            for begin, end in _small_tensors(stream) if file.suffix == ".safetensors" else ():
                stream.seek(begin)
                digest.update(stream.read(end - begin))
    return digest.digest()


def _small_tensors(stream: BinaryIO) -> list[tuple[int, int]]:
    """Where the small tensors of a safetensors file begin and end; of a damaged one nothing, which loading tells of."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(min(length, _MOST_HEADER_BYTES)))
        offsets = [tensor["data_offsets"] for name, tensor in sorted(header.items()) if name != "__metadata__"]
        places = [(8 + length + int(begin), 8 + length + int(end)) for begin, end in offsets]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(begin, end) for begin, end in places if 0 <= end - begin <= _SMALL_TENSOR_BYTES]
