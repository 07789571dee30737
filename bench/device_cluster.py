"""A cluster on this device: one prefill and one decode engine as two processes, and how fast bytes get on and off it.

`python -m bench.device_cluster --json FILE`. The tokens of the cluster, with nothing stored and with all prompts
stored, are compared with those of one engine; one answer may differ, where two tokens tie. Blocks as large as those of
common models are copied between the device and a slab such as KV agents share; the ceiling beside it is a copy within
the host's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import header, table, write_json

_NEEDS = ("msgspec", "xxhash", "obstore")  # of clusters; a machine for kernels may lack them
_FRACTION = 0.4  # of the device's memory, for each of both engines
_PROMPTS, _PROMPT, _TOKENS = 8, 512, 24
_SIZES = (256 << 10, 2 << 20, 16 << 20)  # a Layer Block and a Full Block of 8B models in bfloat16, and a piece of many
_MOVED = 256 << 20  # bytes a measurement
_REPEATS = 5


def copies() -> list[dict[str, Any]]:
    """Rates of copies between a slab and the device, by size."""
    import jax

    from jaxdual.transport.slab import SharedSlab

    slab = SharedSlab(_MOVED, populate=True)
    other = np.zeros(_MOVED, np.uint8)
    found = []
    for size in _SIZES:
        parts = [slab.array[start : start + size] for start in range(0, _MOVED, size)]

        def to_device(parts: Sequence[np.ndarray] = parts) -> object:
            return jax.block_until_ready([jax.device_put(part) for part in parts])

        blocks = [jax.device_put(part) + np.uint8(0) for part in parts]
        jax.block_until_ready(blocks)

        def from_device(blocks: Sequence[Any] = blocks, parts: Sequence[np.ndarray] = parts) -> None:
            for block in blocks:
                block.copy_to_host_async()
            for block, part in zip(blocks, parts, strict=True):
                part[:] = np.asarray(block)
            # What was brought here once is kept by the array: make it anew.
            blocks[:] = jax.block_until_ready([block + np.uint8(0) for block in blocks])  # type: ignore[index]

        found.append(
            {
                "bytes": size,
                "to_device_gb_s": _rate(to_device),
                "from_device_gb_s": _rate(from_device),
                "memcpy_gb_s": _rate(lambda: np.copyto(other, slab.array[:_MOVED])),
            }
        )
    return found


def _rate(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return _MOVED / statistics.median(seconds) / 1e9


async def cluster_tokens(folder: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a cluster gives, twice: the second time it finds the prompts stored."""
    from jaxdual import AsyncLLM, EngineConfig, SamplingParams
    from jaxdual.config import ClusterConfig

    config = EngineConfig(
        max_model_len=1024,
        max_num_seqs=16,
        gpu_memory_utilization=_FRACTION,
        kv_store=str(folder),
        kv_store_capacity_bytes=10**10,
        seed=0,
    )
    params = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)

    async def complete(prompt: Sequence[int]) -> tuple[list[int], int]:
        final = None
        async for output in llm.generate({"prompt_token_ids": list(prompt)}, params):
            final = output
        assert final is not None
        return list(final.outputs[0].token_ids), final.num_cached_tokens

    async with AsyncLLM.from_config(config, cluster=ClusterConfig(prefill=1, decode=1)) as llm:
        device = llm.info.device
        rounds = []
        for _ in range(2):
            begin = time.perf_counter()
            answers = await asyncio.gather(*map(complete, prompts))
            rounds.append(
                {
                    "seconds": time.perf_counter() - begin,
                    "tokens": [tokens for tokens, _ in answers],
                    "cached_tokens": sum(cached for _, cached in answers),
                }
            )
            await _stored(llm)
        await llm.check_integrity()
        return {"device": device, "rounds": rounds, "card_bytes": dict((await llm.stats()).card_bytes)}


async def _stored(llm: Any) -> None:
    """Waits until all that is full is stored."""
    before = None
    while (now := (await llm.stats()).card_bytes) != before:
        before = now
        await asyncio.sleep(0.5)


def single_tokens(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What one engine gives."""
    from jaxdual import LLM, SamplingParams

    llm = LLM(max_model_len=1024, max_num_seqs=16, gpu_memory_utilization=_FRACTION, seed=0)
    params = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def make_prompts() -> list[list[int]]:
    """Random tokens, the same in every run."""
    return np.random.default_rng(0).integers(4096, size=(_PROMPTS, _PROMPT)).tolist()  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.device_cluster", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--part", choices=["single", "copies"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part is not None:
        # In a process of its own, which gives the device's memory back when it ends.
        write_json(options.json, {"result": single_tokens(make_prompts()) if options.part == "single" else copies()})
        return 0
    missing = [name for name in _NEEDS if find_spec(name) is None]
    results: dict[str, Any] = header("bench.device_cluster")
    if missing:
        results["skipped"] = f"clusters need {', '.join(missing)}, which are not installed here"
        print(results["skipped"])
    else:
        with tempfile.TemporaryDirectory(prefix="jaxdual-device-cluster-") as folder:
            want = _part("single", Path(folder))
            results["cluster"] = asyncio.run(cluster_tokens(Path(folder, "store"), make_prompts()))
        for one in results["cluster"]["rounds"]:
            one["equal"] = sum(got == expected for got, expected in zip(one.pop("tokens"), want, strict=True))
            one["prompts"] = len(want)
            read, seconds = one["cached_tokens"], one["seconds"]
            print(f"{one['equal']} of {len(want)} answers equal, {read} tokens read, {seconds:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        results["copies"] = _part("copies", Path(folder))
    rows = [tuple(one.values()) for one in results["copies"]]
    print(table(("bytes", "to the device GB/s", "from it GB/s", "memcpy GB/s"), rows))
    write_json(options.json, results)
    rounds = results.get("cluster", {}).get("rounds", [])
    return 0 if all(one["equal"] >= one["prompts"] - 1 for one in rounds) else 1


def _part(name: str, folder: Path) -> Any:
    import json

    file = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.device_cluster", "--part", name, "--json", str(file)]
    subprocess.run(command, check=True)
    return json.loads(file.read_text())["result"]


if __name__ == "__main__":
    sys.exit(main())
