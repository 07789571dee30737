"""Start-up of a fresh process: to a loaded model, to its first token, to all shapes compiled."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from bench.workers import Worker

_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def measure_startup(
    model: str, hf_python: str | None, cores: Sequence[int], settings: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Seconds since the start of the process, interpreter and imports included.

    Args:
      model: folder.
      hf_python: of the reference side, or None without it.
      cores: that processes may use.
      settings: of the engine, its defaults if left out.

    Returns:
      By kind of start: "empty_cache" and "warm_cache" of the engine, "hf" of transformers.
    """
    results = {}
    with tempfile.TemporaryDirectory(prefix="jaxdual-bench-") as cache:
        for kind in ("empty_cache", "warm_cache"):
            # The first process fills the cache for the second: it compiles all shapes before it ends.
            command = [sys.executable, "-m", "bench.engine_worker"]
            with Worker(f"jaxdual, {kind}", command, cores=cores) as worker:
                loaded = worker.ask("load", model=model, settings={**(settings or {}), "compilation_cache_dir": cache})
                first = worker.ask("generate", prompts=[_PROMPT], new_tokens=1)
                warm = worker.ask("warm_up")
                results[kind] = {
                    "process_to_loaded": loaded["loaded_at"] - worker.started,
                    "load": loaded["seconds"],
                    "process_to_first_token": first["finished_at"] - worker.started,
                    "process_to_all_shapes": warm["finished_at"] - worker.started,
                    "programs": warm["compiled"],
                    "shapes": warm["shapes"],
                }
    if hf_python is not None:
        with Worker("transformers", [hf_python, "-m", "bench.hf_worker"], cores=cores) as worker:
            loaded = worker.ask("load", model=model, threads=len(cores))
            first = worker.ask("generate", prompts=[_PROMPT], new_tokens=1, cache="dynamic")
            results["hf"] = {
                "process_to_loaded": loaded["loaded_at"] - worker.started,
                "load": loaded["seconds"],
                "process_to_first_token": first["finished_at"] - worker.started,
            }
    return results
