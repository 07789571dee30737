"""What packed weights cost and save beside dense ones: single products, and decode steps of the engine.

`python -m bench.pruning.packed --json FILE`. The forms are dense weights, the same with the zeros of 2:4, 2:4 packed,
and half of the square blocks of 64. They take turns; the time of a product is the median of its turns, and that of a
decode step the median over the engine's steps while all sequences decode, and over turns. Weights are in float32, as an
engine on a CPU has them, and in bfloat16 in the files. `of_dense` is over the dense form's time in the same run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from bench.pruning.turns import medians, medians_of
from bench.report import header, table, write_json
from jaxdual import LLM, SamplingParams
from jaxdual.model_folder import shipped_model
from jaxdual.pruning.pack import packed_form, packed_model
from jaxdual.pruning.pattern import Pattern
from models import Decoder, ModelConfig
from models.layers import Linear
from models.packed import BlockSparseLinear, PackedLinear, packed_parameters
from models.packed_config import PackedConfig, projections
from models.shapes import parameters_of, with_parameters
from pallas_kernels.block_sparse_matmul import block_bytes
from pallas_kernels.sparse_matmul import packed_bytes

Row = dict[str, Any]

DENSE, ZEROS = "dense", "dense with zeros"
# Packed forms by name, and their patterns; the zeros of `ZEROS` are of the first.
PATTERNS = {"packed 2:4": "2:4", "block-sparse 64": "0.5@64"}
FORMS = (DENSE, ZEROS, *PATTERNS)
# Inputs and outputs: up and down of the shipped model, and of a model of a few billion parameters.
PRODUCTS = ((256, 704), (704, 256), (2048, 8192), (8192, 2048))
BATCHES = (1, 16)
_LARGER = ModelConfig(
    family="qwen3",
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=4,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    qk_norm=True,
    tie_word_embeddings=True,
)
_PROMPT = 16  # tokens
_EDGE = 3  # steps


def rows(seconds: float = 6.0) -> Iterator[Row]:
    """All measurements, each of about so many seconds beside compiling."""
    for inputs, outputs in PRODUCTS:
        yield from products(inputs, outputs, seconds)
    yield from steps("shipped base", models.load(shipped_model("base"), dtype="float32"), 32, seconds)
    yield from steps("random, 1024 wide, 4 layers", models.init(_LARGER), 16, 4 * seconds)


def products(inputs: int, outputs: int, seconds: float) -> Iterator[Row]:
    """Rows of one projection, for each batch and form."""
    kernel = np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)
    by_form: dict[str, dict[str, jax.Array]] = {DENSE: {"kernel": jnp.asarray(kernel)}}
    for form, text in PATTERNS.items():
        pruned = np.asarray(_pruned(jnp.asarray(kernel), Pattern.parse(text)))
        by_form.setdefault(ZEROS, {"kernel": jnp.asarray(pruned)})
        made = packed_parameters(packed_form(text), "", pruned)
        by_form[form] = {name.removeprefix("."): value for name, value in made.items()}
    for batch in BATCHES:
        x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, inputs)), jnp.float32)
        calls = {form: _product(form, x, parameters) for form, parameters in by_form.items()}
        times = medians(calls, seconds)
        for form, parameters in by_form.items():
            yield {
                "kind": "product",
                "of": f"{inputs} x {outputs}",
                "batch": batch,
                "form": form,
                "ms": 1e3 * times[form],
                "of_dense": times[form] / times[DENSE],
                "bytes": sum(value.nbytes for value in parameters.values()),
                "bytes_computed": _computed_bytes(form, inputs, outputs, 4),
            }


def _product(form: str, x: jax.Array, parameters: dict[str, jax.Array]) -> Callable[[], jax.Array]:
    if form in PATTERNS:
        packed = packed_form(PATTERNS[form])
        kind: Any = functools.partial(PackedLinear if packed.of else BlockSparseLinear, packed)
    else:
        kind = Linear
    outputs = parameters["kernel"].shape[1] if "kernel" in parameters else _outputs(parameters)
    layer = kind(x.shape[1], outputs, bias=False, dtype="float32", rngs=nnx.Rngs(params=0))
    for name, value in parameters.items():
        getattr(layer, name)[...] = value
    graph, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return functools.partial(run, state, x)


def _outputs(parameters: dict[str, jax.Array]) -> int:
    if "mask" in parameters:
        return int(parameters["mask"].shape[0])
    return int(parameters["blocks"].shape[0] * parameters["blocks"].shape[2])


def steps(name: str, dense: Decoder, tokens: int, seconds: float) -> Iterator[Row]:
    """Rows of the decode steps of a model, for each batch and form.

    Args:
      name: of the model.
      dense: before it is pruned, by magnitude.
      tokens: that a sequence generates in a turn.
    """
    variants = {DENSE: dense}
    for form, text in PATTERNS.items():
        pruned = pruned_by_magnitude(dense, text)
        variants.setdefault(ZEROS, pruned)
        variants[form] = packed_model(pruned, packed_form(text))
    with tempfile.TemporaryDirectory() as place:
        llms, files = {}, {}
        for form, model in variants.items():
            folder = Path(place) / form.replace(" ", "_").replace(":", "_")
            models.save(model, folder, dtype="bfloat16")
            files[form] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            llms[form] = LLM(
                folder, max_model_len=128, max_num_seqs=max(BATCHES), max_num_batched_tokens=512, dtype="float32"
            )
        for batch in BATCHES:
            generated: dict[str, list[tuple[int, ...]]] = {}
            step = medians_of(
                {form: functools.partial(_decode, llm, batch, tokens, form, generated) for form, llm in llms.items()},
                seconds,
            )
            for form, model in variants.items():
                yield {
                    "kind": "decode step",
                    "of": name,
                    "batch": batch,
                    "form": form,
                    "ms": 1e3 * step[form],
                    "of_dense": step[form] / step[DENSE],
                    "bytes": _projection_bytes(model),
                    "bytes_computed": sum(
                        _computed_bytes(form, *size, 4)
                        for layer in range(model.config.num_layers)
                        for size in projections(model.config, layer).values()
                    ),
                    "all_parameter_bytes": sum(value.nbytes for value in parameters_of(model).values()),
                    "file_bytes": files[form],
                    "tokens_of_zeros": generated[form] == generated[ZEROS],
                }


def pruned_by_magnitude(model: Decoder, pattern: str) -> Decoder:
    """A model without the smallest weights of its projections."""
    parameters, chosen = parameters_of(model), Pattern.parse(pattern)
    for layer in range(model.config.num_layers):
        for path in projections(model.config, layer):
            name = f"layers.{layer}.{path}.kernel"
            parameters[name] = _pruned(parameters[name], chosen)
    return with_parameters(model.config, parameters)


def _pruned(kernel: jax.Array, pattern: Pattern) -> jax.Array:
    return jnp.where(pattern.kept(jnp.abs(kernel.T), "row").T, kernel, 0)


def _decode(llm: LLM, batch: int, tokens: int, form: str, generated: dict[str, list[tuple[int, ...]]]) -> float:
    """Seconds of a step while all sequences decode; what they generate goes to `generated`."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    outputs = [
        llm.submit({"prompt_token_ids": [7 * row + at for at in range(_PROMPT)]}, params) for row in range(batch)
    ]
    times = []
    while llm.has_unfinished:
        begin = time.perf_counter()
        llm.step()
        times.append(time.perf_counter() - begin)
    generated[form] = [tuple(output.outputs[0].token_ids) for output in outputs]
    # Without prefill, and without the end, where a step only takes what was under way.
    return statistics.median(times[_EDGE:-_EDGE])


def _projection_bytes(model: Decoder) -> int:
    prefixes = tuple(
        f"layers.{layer}.{path}."
        for layer in range(model.config.num_layers)
        for path in projections(model.config, layer)
    )
    return sum(
        value.nbytes
        for path, value in parameters_of(model).items()
        if path.startswith(prefixes) and not path.endswith(".bias")
    )


def _computed_bytes(form: str, inputs: int, outputs: int, itemsize: int) -> int:
    """By the formulas of the forms."""
    if form not in PATTERNS:
        return inputs * outputs * itemsize
    packed: PackedConfig = packed_form(PATTERNS[form])
    if packed.of:
        return packed_bytes(inputs, outputs, packed.keep, packed.of, f"float{8 * itemsize}")
    return block_bytes(outputs, packed.block, packed.blocks_kept(inputs), f"float{8 * itemsize}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pruning.packed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement, about; default %(default)s")
    options = parser.parse_args(arguments)
    report = header("bench.pruning.packed") | {"device": jax.devices()[0].device_kind}
    found: list[Row] = []
    for row in rows(options.seconds):
        found.append(row)
        if row["form"] == FORMS[-1]:
            some = found[-len(FORMS) :]
            cells = [(one["form"], one["ms"], one["of_dense"], one["bytes"] / 2**20) for one in some]
            print(f"\n{row['kind']} {row['of']}, batch {row['batch']}", flush=True)
            print(table(("", "ms", "of dense", "MiB"), cells), flush=True)
            write_json(options.json, report | {"rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
