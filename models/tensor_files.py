"""The safetensors files of a checkpoint folder, read slice by slice."""

import contextlib
import re
from collections.abc import Set
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from models.config_reader import read_json
from models.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ORBAX_FOLDER = "orbax"

INTEGER_TYPES = {"U16": "uint16", "I32": "int32"}
FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Buffers of older checkpoints that are computed from the configuration.
HARMLESS_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|\.self_attn\.(masked_)?bias$")


class TensorFiles:
    """Named tensors over one safetensors file, or the several that an index lists.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and its files.

    Raises:
      ModelError: no weights, a malformed or truncated file, or an index that does not match its files.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        try:
            self._open_all(folder)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open_all(self, folder: Path) -> None:
        single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
        if single.is_file():
            self._add(single)
        elif index.is_file():
            listed = _read_index(index)
            for file in dict.fromkeys(listed.values()):
                if not file.is_file():
                    raise ModelError(f"{index}: names {file.name}, and there is no such file")
                self._add(file)
            for name, file in listed.items():
                if self._file_of.get(name) != file:
                    raise ModelError(f"{index}: says that {file.name} holds tensor '{name}', which it does not")
        else:
            raise ModelError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")

    def _add(self, file: Path) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, framework="np"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a complete safetensors file ({error})") from None
        self._open[file] = handle
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            if name in self._file_of:
                raise ModelError(f"{file}: tensor '{name}' is also in {self._file_of[name].name}")
            self._file_of[name] = file

    def check_names(self, wanted: Set[str], harmless: Set[str]) -> None:
        """Refuse a checkpoint that lacks tensors or has others.

        Args:
          wanted: names that must be there.
          harmless: names that may be there besides.

        Raises:
          ModelError: naming the first tensor and its file.
        """
        some_file = next(iter(self._open))
        missing = sorted(wanted - self._file_of.keys())
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ModelError(f"{some_file.parent}: tensor '{missing[0]}'{more} is missing")
        for name in sorted(self._file_of.keys() - wanted - harmless):
            if not HARMLESS_TENSORS.search(name):
                raise ModelError(f"{self._file_of[name]}: tensor '{name}' has no place in this model")

    def dtype(self, name: str) -> str:
        """Type of a tensor as a numpy name.

        Raises:
          ModelError: the tensor is missing, or is not of a floating-point type that is read.
        """
        stored = self._slice(name).get_dtype()
        if stored not in FLOAT_TYPES:
            raise ModelError(
                f"{self._file_of[name]}: tensor '{name}' has type {stored}; supported: {', '.join(FLOAT_TYPES)}"
            )
        return FLOAT_TYPES[stored]

    def check_shape(self, name: str, expected: tuple[int, ...], integers: str = "") -> None:
        """Refuse a tensor of another shape or of an unsupported type.

        Args:
          name: of the tensor.
          expected: its shape.
          integers: the type of integers that it must have; empty for floating-point numbers.

        Raises:
          ModelError: naming tensor, file and both shapes.
        """
        if not integers:
            self.dtype(name)
        elif INTEGER_TYPES.get(stored := self._slice(name).get_dtype()) != integers:
            raise ModelError(f"{self._file_of[name]}: tensor '{name}' has type {stored}; {integers} is expected")
        found = tuple(self._slice(name).get_shape())
        if found != expected:
            raise ModelError(
                f"{self._file_of[name]}: tensor '{name}' has shape {list(found)}; {list(expected)} is expected"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor, reading no more than that."""
        try:
            part: np.ndarray = self._slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._file_of[name]}: tensor '{name}' cannot be read ({error})") from None
        return part

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(f"{next(iter(self._open)).parent}: tensor '{name}' is missing")
        return self._open[self._file_of[name]].get_slice(name)


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: key 'weight_map' is missing or not an object of tensor names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index}: key 'weight_map.{name}' is {file!r}; a file name is expected")
    return {name: index.parent / file for name, file in weight_map.items()}
