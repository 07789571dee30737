"""`python -m models.upcycle SOURCE OUT --pseudo-heads 2`: Interleaved Head Attention for a trained model.

All weights are kept, and every pseudo head begins as a copy of its head, so that the new model computes what the old
one does, exactly or nearly: exactly where the pseudo heads of a token share its rotary position and either see all of
each other (`--rope token --mask token`) or only the last one counts (`--rope token --mask flat --select last`). With
`--rope scaled --mask token --select mean` it is close, and training can tell the pseudo heads apart by their positions.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint import load, save, stored_dtype
from models.config import IHA_COLLAPSES, IHAConfig
from models.convert import OF_WEIGHTS, copy_other_files, prepare
from models.decoder import Decoder
from models.errors import ModelError
from models.families import load_config, to_hf
from models.hub import resolve
from models.iha import initial_collapse, initial_mixing, num_mixing_parameters
from models.orbax_files import orbax_dtype
from models.shapes import abstract, parameter_path
from models.tensor_files import ORBAX_FOLDER
from pallas_kernels.pseudo_heads import MASKS

FAMILIES = ("llama", "mistral", "qwen3")
ROPES = ("scaled", "token", "virtual")
SELECTS = ("mean", "last", "first")
MAX_NOISE = 100.0  # far beyond any use; weights stay finite

# Files that speak of the source's weights.


def upcycled(base: Decoder, iha: IHAConfig, *, select: str = "mean", noise: float = 0.0, seed: int = 0) -> Decoder:
    """A model with Interleaved Head Attention that has the weights of `base`, and pseudo heads that copy its heads.

    Args:
      base: a dense model of one of `FAMILIES`; its weights are shared, not copied.
      iha: what its layers get.
      select: the pseudo head whose output counts at first: "mean" of all, "last" or "first".
      noise: standard deviation of what is added to the mixing weights, collapse not included. Without any, pseudo heads
        that nothing tells apart stay copies for ever, see `stay_copies`.
      seed: of the noise.

    Raises:
      ModelError: a family that is not supported.
      ValueError: a layer that the model lacks, an unknown `select`, or a `noise` that is not a number from 0 on.
    """
    if base.config.family not in FAMILIES:
        raise ModelError(f"model family {base.config.family!r} cannot be upcycled; supported: {', '.join(FAMILIES)}")
    if not 0 <= noise <= MAX_NOISE:
        raise ValueError(f"noise is {noise}; a number from 0 to {MAX_NOISE} is expected")
    if seed < 0:
        raise ValueError(f"seed is {seed}; a whole number from 0 on is expected")
    config = replace(base.config, family="jaxdual_iha", iha=iha)
    # Refuses what a checkpoint of the family cannot hold.
    to_hf(config)
    heads, kv_heads, pseudo = config.num_heads, config.num_kv_heads, iha.pseudo_heads
    first_values = {
        "alpha_q": initial_mixing(heads, heads, pseudo),
        "alpha_k": initial_mixing(kv_heads, heads, pseudo),
        "alpha_v": initial_mixing(kv_heads, heads, pseudo),
        "collapse_weights": initial_collapse(heads, pseudo, iha.collapse, _selected(select, pseudo)),
    }
    kept: dict[str, jax.Array] = {
        parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(base))
    }
    rng = np.random.default_rng(seed)

    def value(path: tuple[Any, ...], _leaf: Any) -> jax.Array:
        name = parameter_path(path)
        if name in kept:
            return kept[name]
        kind = name.rpartition(".")[2]
        values = first_values[kind]
        if kind != "collapse_weights":
            values = values + noise * rng.standard_normal(values.shape)
        return jnp.asarray(values, jnp.float32)

    graphdef, state = nnx.split(abstract(config, base.embedding[...].dtype.name))
    model: Decoder = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, state))
    return model


def is_exact(iha: IHAConfig, select: str, noise: float = 0.0) -> bool:
    """Whether `upcycled` gives a model that computes what its base does, up to rounding."""
    same = iha.rope == "token" and (iha.mask == "token" or select == "last")
    return noise == 0 and (same or iha.pseudo_heads == 1)


def stay_copies(iha: IHAConfig, select: str, noise: float = 0.0) -> bool:
    """Whether some mixing weights of `upcycled`'s model have equal gradients for all pseudo heads, for ever.

    Neither positions nor the mask tell the pseudo keys and values of a token apart then.
    """
    return is_exact(iha, select, noise) and iha.pseudo_heads > 1


def upcycle(
    source: Path, out: Path, iha: IHAConfig, *, select: str = "mean", noise: float = 0.0, seed: int = 0
) -> Decoder:
    """Write the upcycled model of the checkpoint in folder `source` to the new folder `out`.

    The stored type of the weights is kept; tokenizer, chat template and generation defaults come along, model card and
    metrics don't, since they are another model's.

    Args:
      source: a checkpoint folder.
      out: made; it must not exist, or be empty.
      iha, select, noise, seed: as of `upcycled`.

    Returns:
      The model that was written.

    Raises:
      ModelError: `source` is no usable checkpoint or of another family, or `out` is not empty.
      ValueError: as `upcycled` does.
    """
    dtype = orbax_dtype(source) if (source / ORBAX_FOLDER).is_dir() else stored_dtype(source)
    model = upcycled(load(source, dtype=dtype), iha, select=select, noise=noise, seed=seed)
    prepare(out)
    save(model, out, dtype)
    copy_other_files(source, out, but=OF_WEIGHTS)
    return model


def _selected(select: str, pseudo_heads: int) -> int | None:
    if select not in SELECTS:
        raise ValueError(f"select is {select!r}; known: {', '.join(SELECTS)}")
    return {"mean": None, "last": pseudo_heads - 1, "first": 0}[select]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        source = resolve(options.source)
        layers = tuple(range(load_config(source).num_layers)) if options.layers is None else options.layers
        iha = IHAConfig(
            pseudo_heads=options.pseudo_heads,
            layers=layers,
            mask=options.mask,
            rope=options.rope,
            collapse=options.collapse,
        )
        more = {"select": options.select, "noise": options.noise}
        model = upcycle(source, options.out, iha, **more, seed=options.seed)
    except (ModelError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out}: {len(layers)} of {model.config.num_layers} layers with {iha.pseudo_heads} pseudo heads, "
        f"{num_mixing_parameters(model.config)} weights more; computes what {options.source} does "
        f"{'up to rounding' if is_exact(iha, **more) else 'nearly at best: measure it'}"
    )
    if stay_copies(iha, **more):
        print("training cannot tell these pseudo heads apart: for training, give --noise 0.02 or --rope scaled")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.upcycle", description="Give a trained model Interleaved Head Attention."
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, or a model on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--pseudo-heads", type=int, default=2, help="of each head (default %(default)s)")
    parser.add_argument("--rope", choices=ROPES, default="scaled", help="positions of pseudo heads (%(default)s)")
    parser.add_argument("--mask", choices=MASKS, default="token", help="what they see of each other (%(default)s)")
    parser.add_argument("--collapse", choices=IHA_COLLAPSES, default="global", help="its form (%(default)s)")
    parser.add_argument("--select", choices=SELECTS, default="mean", help="which count at first (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.0, help="on mixing weights (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--layers", type=_numbers, help="layers that get it, as 0,1,4; all by default")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them are expected") from None


if __name__ == "__main__":
    sys.exit(main())
