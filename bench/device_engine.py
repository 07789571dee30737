"""Speed of the engine on this device beside the device's own bounds: shipped models, and one in the shape of Qwen3-8B.

`python -m bench.device_engine --json FILE`. All prompts are submitted at once and are random tokens. Prefill is prompt
tokens over the seconds to one token of each prompt; its roofline is two operations a weight and token, and those of
causal attention, at the measured rate of a large matrix product. A decode step is the mean over the steps in which all
sequences decode; its roofline is the bytes of all weights and of the keys and values of all sequences, at the measured
rate of a copy. Weights of the large shape are random. Everything runs twice, and the second time counts: what is
compiled in the first is found again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.aot_steps import QWEN3_8B
from bench.device_clock import Ceilings, ceilings
from bench.engine_worker import Ours
from bench.report import header, table, write_json
from jaxdual.model_folder import shipped_model
from models import ModelConfig, load_config
from models.families import to_hf


@dataclasses.dataclass(frozen=True)
class Load:
    """So many sequences, and settings of the engine for them."""

    batch: int
    prompt: int
    new_tokens: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


_LOADS = {
    "small": Load(16, 256, 64),
    "base": Load(16, 256, 64),
    "moe": Load(16, 256, 64),
    "qwen3_8b": Load(32, 4096, 64, {"load_format": "dummy", "max_num_batched_tokens": 8192, "max_model_len": 8192}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.device_engine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--model", action="append", choices=list(_LOADS), help="only this; may be repeated")
    options = parser.parse_args(arguments)
    on_gpu = jax.default_backend() == "gpu"
    report = header("bench.device_engine")
    report["device"] = jax.devices()[0].device_kind
    limits = ceilings()
    report["ceilings"] = limits._asdict()
    report["models"] = {}
    for name in options.model or [name for name in _LOADS if on_gpu or name != "qwen3_8b"]:
        with tempfile.TemporaryDirectory() as temporary:
            if name == "qwen3_8b":
                folder = Path(temporary)
                (folder / "config.json").write_text(json.dumps(to_hf(QWEN3_8B)))
            else:
                folder = shipped_model(name)
            report["models"][name] = _measure(folder, _LOADS[name], limits)
        write_json(options.json, report)
        gc.collect()
    print(_table(report["models"]))
    return 0


def _measure(folder: Path, load: Load, limits: Ceilings) -> dict[str, Any]:
    ours = Ours()
    settings = {"max_num_seqs": load.batch, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}
    ours.load(str(folder), settings | load.settings)
    config = load_config(folder)
    rng = np.random.default_rng(0)
    prompts = rng.integers(config.vocab_size, size=(load.batch, load.prompt)).tolist()
    for _ in range(2):
        prefill = ours.generate(prompts, 1)["seconds"]
        decoded = ours.generate(prompts, load.new_tokens)
    step = statistics.fmean(decoded["steady_steps"])
    leaves = ours.llm._engine.runner.device.programs.leaves
    # Of a table of its own, tokens read a row each.
    table_size = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    itemsize = leaves[0].dtype.itemsize
    weight_bytes = sum(leaf.nbytes for leaf in leaves) - table_size * itemsize
    context = load.prompt + load.new_tokens / 2
    kv_bytes = load.batch * context * config.num_layers * 2 * config.num_kv_heads * config.head_dim * itemsize
    attention = 2 * load.prompt**2 * config.num_layers * config.num_heads * config.head_dim
    prefill_flops = load.batch * (2 * _multiplied(config) * load.prompt + attention)
    prefill_roofline = prefill_flops / limits.matmul_flops_per_second
    step_roofline = (weight_bytes + kv_bytes) / limits.copy_bytes_per_second
    return {
        "load": dataclasses.asdict(load),
        "dtype": ours.llm.info.dtype,
        "prefill_tokens_per_second": load.batch * load.prompt / prefill,
        "prefill_over_roofline": prefill / prefill_roofline,
        "decode_tokens_per_second": load.batch / step,
        "decode_step_ms": step * 1e3,
        "decode_step_over_roofline": step / step_roofline,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
    }


def _multiplied(config: ModelConfig) -> int:
    """Weights that each token of a prompt is multiplied with: all but the table, the head, and experts not chosen."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # queries and output, keys and values
    columns = config.num_layers * heads * config.head_dim
    for layer in range(config.num_layers):
        if config.moe is not None and config.is_sparse(layer):
            columns += 3 * config.moe.intermediate_size * config.moe.num_experts_per_tok + config.moe.num_experts
        else:
            columns += 3 * config.intermediate_size_of(layer)
    return columns * config.hidden_size


def _table(models: dict[str, dict[str, Any]]) -> str:
    names = ("prefill_tokens_per_second", "prefill_over_roofline", "decode_tokens_per_second", "decode_step_ms")
    names = (*names, "decode_step_over_roofline")
    return table(
        ("", *(name.replace("_", " ") for name in names)), [(m, *(r[n] for n in names)) for m, r in models.items()]
    )


if __name__ == "__main__":
    sys.exit(main())
