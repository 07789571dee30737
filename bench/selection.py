"""`python -m bench.selection`: what DySCO's selection takes, by a search for its cut and by a sort of all keys.

Both forms of the search are measured, of digits of one bit, which runs on a CPU, and of four, which runs elsewhere. The
relevance has a long tail, as attention has: of a Dirichlet distribution. `--seconds` bounds the time: shapes that were
not reached are missing from the report.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.device_clock import measure
from bench.report import header, table, write_json
from jaxdual.decoding.relevance import select_above_cut, select_by_sort

FORMS: dict[str, Callable[..., jax.Array]] = {
    "sort": select_by_sort,
    "search, 1 bit": functools.partial(select_above_cut, digit_bits=1),
    "search, 4 bits": functools.partial(select_above_cut, digit_bits=4),
}
_CONCENTRATION = 0.05
_INPUTS = 2  # that take turns


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status: 1 if forms select more or fewer tokens than rounding allows."""
    parser = argparse.ArgumentParser(prog="python -m bench.selection", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[4096, 32768, 131072], help="of a sequence")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--top-p", type=float, default=0.975)
    parser.add_argument("--top-k", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further shape after so many")
    parser.add_argument("--json", metavar="FILE", help="where results go")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    report = header("bench.selection") | {"device": jax.devices()[0].device_kind, "shapes": []}
    for keys in options.keys:
        for sequences in options.sequences:
            if time.monotonic() > end:
                print(f"no time for {keys} keys, {sequences} sequences", file=sys.stderr)
                continue
            found = measure_shape(keys, sequences, options.top_p, options.top_k)
            report["shapes"].append({"keys": keys, "sequences": sequences} | found)
            write_json(options.json, report)
    names = list(FORMS)
    rows = [
        [of_shape["keys"], of_shape["sequences"], *(of_shape["ms"][name] for name in names), of_shape["differ"]]
        for of_shape in report["shapes"]
    ]
    print(table(["keys", "sequences", *(f"{name}: ms" for name in names), "tokens that differ"], rows))
    return int(any(of_shape["differ"] > of_shape["sequences"] for of_shape in report["shapes"]))


def measure_shape(keys: int, sequences: int, top_p: float, top_k: int) -> dict[str, Any]:
    """Milliseconds of each form, the gaps between kernels included, and how many tokens not all forms select."""
    rng = np.random.default_rng(0)
    inputs = [_arguments(rng, keys, sequences, top_p, top_k) for _ in range(_INPUTS)]
    milliseconds, selections = {}, []
    for name, form in FORMS.items():
        run = jax.jit(form)
        selections.append(np.asarray(run(*inputs[0])))
        milliseconds[name] = measure([functools.partial(run, *arguments) for arguments in inputs]).wall * 1e3
    differ = np.any(np.stack(selections) != selections[0], axis=0)
    return {"ms": milliseconds, "differ": int(differ.sum())}


def _arguments(
    rng: np.random.Generator, keys: int, sequences: int, top_p: float, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of `select`."""
    relevance = rng.dirichlet(np.full(keys, _CONCENTRATION), size=sequences).astype(np.float32)
    limits = jnp.full(sequences, top_p, jnp.float32), jnp.full(sequences, top_k, jnp.int32)
    return jnp.asarray(relevance), jnp.full(sequences, keys, jnp.int32), *limits


if __name__ == "__main__":
    sys.exit(main())
