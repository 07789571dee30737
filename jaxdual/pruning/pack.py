"""`python -m jaxdual.pruning.pack --model DIR --pattern 2:4 --out DIR`: stores a pruned model without its zeros."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdual.arguments import run_command
from jaxdual.config import EngineConfig
from jaxdual.model_folder import find_model
from jaxdual.pruning.pattern import Pattern
from models import Decoder, load, save
from models.checkpoint import stored_dtype
from models.convert import copy_other_files, prepare
from models.packed import packed_parameters
from models.packed_config import PackedConfig, projections
from models.shapes import parameters_of, with_parameters

_PROG = "python -m jaxdual.pruning.pack"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=_PROG, description="Stores a pruned model without its zeros.")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a model that was pruned")
    parser.add_argument("--pattern", required=True, help="that its zeros follow: N:M, or 0.5@64 for blocks")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder of the model")
    options = parser.parse_args(arguments)
    return run_command(_PROG, lambda: _pack(options.model, packed_form(options.pattern), options.out))


def packed_form(pattern: str) -> PackedConfig:
    """How weights of a pattern, as it is written on a command line, are stored.

    Raises:
      ValueError: no pattern, or one whose zeros cost as much as other numbers.
    """
    parsed = Pattern.parse(pattern)
    if parsed.share is None:
        return PackedConfig(keep=parsed.keep, of=parsed.of)
    if parsed.block:
        return PackedConfig(block=parsed.block, share=parsed.share)
    raise ValueError(f"pattern {pattern}: single weights anywhere have no packed form; N:M and blocks do")


def packed_model(model: Decoder, packed: PackedConfig) -> Decoder:
    """A model of the family jaxdual_pruned with the same weights, but for the sign of zeros.

    Raises:
      ValueError: weights that don't follow the pattern or can't be packed so, or a model that can't be; the message
        names the projection.
    """
    if model.config.packed is not None or model.config.iha is not None:
        what = "is packed already" if model.config.iha is None else "has heads that are mixed"
        raise ValueError(f"the model {what}: its weights can't be packed")
    config = dataclasses.replace(model.config, family="jaxdual_pruned", packed=packed)
    parameters = parameters_of(model)
    for layer in range(config.num_layers):
        for path in projections(config, layer):
            kernel = np.asarray(parameters.pop(f"layers.{layer}.{path}.kernel"))
            parameters |= packed_parameters(packed, f"layers.{layer}.{path}", kernel)
    return with_parameters(config, parameters)


def _pack(name: str, packed: PackedConfig, out: Path) -> int:
    folder, _ = find_model(EngineConfig(model=name))
    dtype = stored_dtype(folder)
    dense = load(folder, dtype=dtype)
    model = packed_model(dense, packed)
    prepare(out)
    save(model, out, dtype)
    copy_other_files(folder, out, but=("config.json",))
    before, after = (sum(one.nbytes for one in parameters_of(each).values()) for each in (dense, model))
    print(f"{out}: {after} bytes of parameters, {after / before:.3f} of the {before} of {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
