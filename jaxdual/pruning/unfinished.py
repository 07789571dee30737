"""A run that may be stopped at any time: the layers that are done lie in the output folder until the model does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxdual.pruning.layer_state import write_layer
from models import Decoder
from models.shapes import parameters_of

_FOLDER, _SETTINGS = "unfinished", "settings.json"


class OfLayer(Protocol):
    """What became of a layer, as plain data."""

    @property
    def layer(self) -> int:
        """Its number."""


class UnfinishedRun[Record: OfLayer]:
    """Layers of a run, kept in a folder below its output.

    Args:
      record: the type of what is told of each layer.
      out: of the model; made if missing.
      settings: what the layers depend on.

    Raises:
      ValueError: `out` holds other things, or a run of other settings.
    """

    def __init__(self, record: type[Record], out: Path, settings: dict[str, Any]) -> None:
        self._record = record
        self._folder = out / _FOLDER
        file = self._folder / _SETTINGS
        # A run that was stopped while the model was written has both.
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not file.is_file())):
            raise ValueError(f"{out}: exists; a new or an empty folder is expected, or one of a run that was stopped")
        self._folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _replace(file, json.dumps(settings))
        elif json.loads(file.read_text()) != settings:
            raise ValueError(f"{out}: holds a stopped run of other settings; remove {self._folder} to begin anew")

    def resume(self, model: Decoder) -> list[Record]:
        """Puts the layers that are done into a model; what became of them, from the first on."""
        done: list[Record] = []
        for index, layer in enumerate(model.layers):
            try:
                told = msgspec.json.decode(self._file(index, "json").read_bytes(), type=self._record)
                parameters = load_file(self._file(index, "safetensors"))
            except (OSError, ValueError, SafetensorError):
                break
            write_layer(layer, parameters)
            done.append(told)
        return done

    def keep(self, model: Decoder, pruned: Record) -> None:
        """Keeps a layer."""
        parameters = parameters_of(model.layers[pruned.layer])
        file = self._file(pruned.layer, "safetensors")
        part = file.with_suffix(".part")
        save_file({path: np.ascontiguousarray(value, np.float32) for path, value in parameters.items()}, part)
        os.replace(part, file)
        _replace(self._file(pruned.layer, "json"), msgspec.json.encode(pruned).decode())

    def remove(self) -> None:
        """Ends it: the model is written."""
        shutil.rmtree(self._folder)

    def _file(self, index: int, kind: str) -> Path:
        return self._folder / f"layer-{index:05}.{kind}"


def _replace(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)
