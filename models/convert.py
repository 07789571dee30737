"""`python -m models.convert --to orbax DIR OUT` and `--to safetensors DIR OUT`: weights from one format to the other.

Everything else in the folder (configuration, tokenizer, chat template, generation defaults) is copied as it is. The
stored type of the weights is kept.
"""

import argparse
import shutil
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from models.checkpoint import load, save, stored_dtype
from models.errors import ModelError
from models.families import load_config
from models.hub import resolve
from models.orbax_files import load_orbax, orbax_dtype, save_orbax
from models.tensor_files import ORBAX_FOLDER

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf")


def to_orbax(source: Path, out: Path) -> None:
    """Write the safetensors checkpoint in folder `source` as an Orbax checkpoint to the new folder `out`.

    Raises:
      ModelError: `source` is no usable checkpoint, or `out` is not empty.
    """
    model = load(source, dtype=stored_dtype(source))
    prepare(out)
    save_orbax(model, out)
    copy_other_files(source, out)


def to_safetensors(source: Path, out: Path) -> None:
    """Write the Orbax checkpoint in folder `source` as safetensors files to the new folder `out`.

    Raises:
      ModelError: `source` is no usable checkpoint, or `out` is not empty.
    """
    dtype = orbax_dtype(source)
    model = load_orbax(load_config(source), source, dtype)
    prepare(out)
    save(model, out, dtype)
    copy_other_files(source, out)


def prepare(out: Path) -> None:
    """Make the folder of a new checkpoint; raises `ModelError` if there is something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: exists; a new or an empty folder is expected")
    out.mkdir(parents=True, exist_ok=True)


# Files of a model folder that speak of its weights: of no other model made of it.
OF_WEIGHTS = ("README.md", "metrics.json", "config.json")


def copy_other_files(source: Path, out: Path, but: Container[str] = ()) -> None:
    """Copy the files of a checkpoint folder that are no weights, but those of these names."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name not in but:
            shutil.copyfile(file, out / file.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m models.convert", description="Convert a checkpoint folder.")
    parser.add_argument("--to", choices=["orbax", "safetensors"], required=True, help="format to write")
    parser.add_argument("source", metavar="DIR", help="checkpoint folder, or (to orbax) a model on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    options = parser.parse_args(arguments)
    try:
        source = resolve(options.source)
        if options.to == "orbax":
            to_orbax(source, options.out)
        else:
            if not (source / ORBAX_FOLDER).is_dir():
                raise ModelError(f"{source}: has no folder '{ORBAX_FOLDER}'; an Orbax checkpoint is expected")
            to_safetensors(source, options.out)
    except (ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
