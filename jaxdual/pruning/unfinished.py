"""A run that may be stopped at any time: the layers that are done lie in the output folder until the model does."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxdual.pruning.layer_state import read_layer, write_layer
from jaxdual.pruning.run import PrunedMatrix
from models import Decoder

_FOLDER, _SETTINGS = "unfinished", "settings.json"


class UnfinishedRun:
    """Layers of a run, kept in a folder below its output.

    Args:
      out: of the model; made if missing.
      settings: what the layers depend on.

    Raises:
      ValueError: `out` holds other things, or a run of other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._folder = out / _FOLDER
        if out.exists() and (not out.is_dir() or any(entry.name != _FOLDER for entry in out.iterdir())):
            raise ValueError(f"{out}: exists; a new or an empty folder is expected, or one of a run that was stopped")
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / _SETTINGS
        if not file.exists():
            _replace(file, json.dumps(settings))
        elif json.loads(file.read_text()) != settings:
            raise ValueError(f"{out}: holds a stopped run of other settings; remove {self._folder} to begin anew")

    def resume(self, model: Decoder) -> list[PrunedMatrix]:
        """Puts the layers that are done into a model; what became of their matrices, from the first layer on."""
        done: list[PrunedMatrix] = []
        for index, layer in enumerate(model.layers):
            try:
                told = json.loads(self._file(index, "json").read_text())
                parameters = load_file(self._file(index, "safetensors"))
            except (OSError, ValueError, SafetensorError):
                break
            write_layer(layer, parameters)
            done += [PrunedMatrix(**one) for one in told]
        return done

    def keep(self, model: Decoder, index: int, pruned: Sequence[PrunedMatrix]) -> None:
        """Keeps a layer."""
        parameters = read_layer(model.layers[index])
        file = self._file(index, "safetensors")
        part = file.with_suffix(".part")
        save_file({path: np.ascontiguousarray(value, np.float32) for path, value in parameters.items()}, part)
        os.replace(part, file)
        _replace(self._file(index, "json"), json.dumps([dataclasses.asdict(one) for one in pruned]))

    def remove(self) -> None:
        """Ends it: the model is written."""
        shutil.rmtree(self._folder)

    def _file(self, index: int, kind: str) -> Path:
        return self._folder / f"layer-{index:05}.{kind}"


def _replace(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)
