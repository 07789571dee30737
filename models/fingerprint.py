"""What identifies the weights of a model folder, cheaply."""

from __future__ import annotations

import hashlib
from pathlib import Path

from models.tensor_files import ORBAX_FOLDER

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def model_fingerprint(folder: Path, dtype: str, *, random_weights: bool = False) -> bytes:
    """A digest that differs between models whose keys and values differ.

    It covers the configuration, and of each weight file the name, the size, the beginning (which lists all tensors) and
    64 evenly spaced pieces of 4 KiB: reading whole files would take as long as loading them.

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
    return digest.digest()
