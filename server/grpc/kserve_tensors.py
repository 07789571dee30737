"""Tensors of the Open Inference Protocol to Python values and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from server.proto.kserve import open_inference_pb2 as pb

# Datatype -> NumPy's name of it, None for BYTES; and the field of InferTensorContents that holds it, None where raw
# contents are the only form.
_DATATYPES: dict[str, tuple[str | None, str | None]] = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("<i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "UINT8": ("<u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "FP16": ("<f2", None),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
    "BYTES": (None, "bytes_contents"),
}


def read_inputs(request: pb.ModelInferRequest) -> Iterator[tuple[str, str, list[Any]]]:
    """Name, datatype and elements of each input tensor; elements of BYTES are `bytes`, others bool, int or float.

    Raises:
      ValueError: datatype, shape and contents of a tensor contradict each other, or it refers to shared memory.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise ValueError(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    for i, tensor in enumerate(request.inputs):
        name = f"input {tensor.name[:64]!r}"
        if tensor.parameters:
            raise ValueError(f"{name}: the parameter {min(tensor.parameters)[:64]!r} is not supported")
        if tensor.datatype not in _DATATYPES:
            raise ValueError(f"{name}: datatype {tensor.datatype[:64]!r} must be one of {', '.join(_DATATYPES)}")
        if any(size < 0 for size in tensor.shape):
            raise ValueError(f"{name}: shape {_shape(tensor.shape)} has a negative size")
        if raw and tensor.HasField("contents"):
            raise ValueError(f"{name} has contents, and the request raw_input_contents: use one of them")
        elements = _read_raw(name, tensor.datatype, raw[i]) if raw else _read_contents(name, tensor)
        if len(elements) != math.prod(tensor.shape):
            raise ValueError(f"{name}: shape {_shape(tensor.shape)} does not fit its {len(elements)} elements")
        yield tensor.name, tensor.datatype, elements


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    """Elements of a BYTES tensor as raw contents: each after its length, 4 bytes little-endian."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def pack_int32(elements: Sequence[int]) -> bytes:
    """Elements of an INT32 tensor as raw contents."""
    return struct.pack(f"<{len(elements)}i", *elements)


def _read_raw(name: str, datatype: str, data: bytes) -> list[Any]:
    number, _ = _DATATYPES[datatype]
    if number is None:
        return _unpack_bytes(name, data)
    if len(data) % np.dtype(number).itemsize:
        raise ValueError(f"{name}: {len(data)} bytes are no whole number of {datatype} elements")
    elements: list[Any] = np.frombuffer(data, number).tolist()
    return elements


def _unpack_bytes(name: str, data: bytes) -> list[bytes]:
    elements, at = [], 0
    while at < len(data):
        start = at + 4
        length = int.from_bytes(data[at:start], "little")
        at = start + length
        if at > len(data):
            raise ValueError(
                f"{name}: raw contents of {len(data)} bytes end within an element; each one of a BYTES tensor stands "
                "after its length in 4 bytes, little-endian"
            )
        elements.append(data[start:at])
    return elements


def _read_contents(name: str, tensor: pb.ModelInferRequest.InferInputTensor) -> list[Any]:
    _, field = _DATATYPES[tensor.datatype]
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise ValueError(f"{name}: {other.name} does not hold elements of datatype {tensor.datatype}")
    return [] if field is None else list(getattr(tensor.contents, field))


def _shape(shape: Sequence[int]) -> str:
    return str(list(shape[:8])) if len(shape) <= 8 else f"of {len(shape)} dimensions"
