"""Compiles the GPU kernels for an H200 on a machine without one, and counts what came out.

`python -m bench.aot --json FILE`, with JAX's CUDA plugin on PYTHONPATH and CUDA's tools on the machine: see `make aot`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from bench.aot_mesh import measure_meshes
from bench.aot_steps import steps
from bench.operations import Case, operations

_MARKS = "<!-- table of make aot -->", "<!-- end of the table -->"
DEVICE, MULTIPROCESSORS = "NVIDIA H200", 132
_TARGET = (
    "gpu_device_info{threads_per_block_limit:1024 threads_per_warp:32 shared_memory_per_block:49152 "
    "shared_memory_per_core:233472 threads_per_core_limit:2048 core_count:132 fpus_per_core:128 "
    "block_dim_limit_x:2147483647 block_dim_limit_y:65535 block_dim_limit_z:65535 memory_bandwidth:4800000000000 "
    "l2_cache_size:62914560 clock_rate_ghz:1.98 device_memory_size:150000000000 shared_memory_per_block_optin:232448 "
    "cuda_compute_capability{major:9} registers_per_core_limit:65536 registers_per_block_limit:65536} "
    'platform_name:"CUDA" dnn_version_info{major:9 minor:20} runtime_version{major:13} '
    'device_description_str:"NVIDIA H200"'
)


def compile_for_h200(trace: Callable[..., Any], arguments: Any) -> Any:
    """The compiled program of what `trace(**arguments)`, of a jitted function, traces."""
    sharding = SingleDeviceSharding(_devices()[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(DEVICE, MULTIPROCESSORS, "cuda"))
    with jax.sharding.use_abstract_mesh(mesh):
        return trace(**placed).lower(lowering_platforms=("cuda",)).compile()


def _devices() -> list[jax.Device]:
    """Eight H200s of one host that isn't there."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=DEVICE, target_config=_TARGET, topology="1x1x8"
    )
    return list(topology.devices)


def measure(case: Case) -> dict[str, Any]:
    """Registers, spilled bytes and instructions of each kernel; temporary and aliased bytes of the program."""
    arguments = jax.eval_shape(case.spec.make, jax.random.key(0))
    with _dump() as folder:
        compiled = compile_for_h200(case.call("mosaic").trace, arguments)
        kernels = {
            re.sub(r"_\d+$", "", log.stem): _count(log.read_text(), log.with_suffix(".ptx").read_text())
            for log in sorted(folder.glob("*.ptxas"))
        }
    memory = compiled.memory_analysis()
    donated = arguments[case.donated] if case.donated else None
    return {
        "kernels": kernels,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "donated_bytes": math.prod(donated.shape) * donated.dtype.itemsize if donated else 0,
    }


def measure_steps() -> dict[str, Any]:
    """Memory of whole engine steps."""
    report = {}
    for name, step in steps().items():
        print(f"engine step {name}", file=sys.stderr, flush=True)
        memory = compile_for_h200(step.trace, step.arguments).memory_analysis()
        donated = jax.tree.leaves([step.arguments[argument] for argument in step.donated])
        report[name] = {
            "temporary_bytes": memory.temp_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
            "donated_bytes": sum(array.size * array.dtype.itemsize for array in donated),
            "arena_bytes": step.arena_bytes,
            "activation_bytes": step.activation_bytes,
            "page_bytes": step.page_bytes,
        }
    return report


@contextlib.contextmanager
def _dump() -> Iterator[Path]:
    """A folder that Mosaic leaves the PTX of each kernel in, and what ptxas said of it."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        os.environ |= variables
        try:
            yield Path(folder)
        finally:
            for name in variables:
                del os.environ[name]


def _count(log: str, ptx: str) -> dict[str, int]:
    """What ptxas says of a kernel, and the instructions of its PTX."""
    return {
        "registers": int(re.findall(r"Used (\d+) registers", log)[-1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk"),
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown, one row a kernel of each spec, and one an engine step."""
    lines = [
        "| operation | spec | kernel | registers | spilled bytes | wgmma | TMA | temporary MiB |",
        "|" + "---|" * 8,
    ]
    for op, specs in report["operations"].items():
        for spec, one in specs.items():
            for kernel, counts in one["kernels"].items():
                cells = [op, spec, kernel, *counts.values(), round(one["temporary_bytes"] / 2**20, 2)]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    if "steps" in report:
        names = ("temporary_bytes", "aliased_bytes", "donated_bytes", "arena_bytes", "activation_bytes", "page_bytes")
        lines += [
            "",
            "| engine step | temporary MiB | aliased | donated | arena | activations | a page |",
            "|" + "---|" * 7,
        ]
        for step, one in report["steps"].items():
            lines.append("| " + " | ".join([step, *(f"{one[name] / 2**20:.1f}" for name in names)]) + " |")
    if "meshes" in report:
        names = ("temporary_bytes", "aliased_bytes", "arena_bytes", "dense_bytes")
        counted = ("ragged_all_to_alls", "all_reduces", "all_gathers")
        lines += [
            "",
            "| step on a mesh | temporary MiB | aliased | arena | all tokens for every expert | ragged all-to-alls | "
            "all-reduces | all-gathers |",
            "|" + "---|" * 8,
        ]
        for step, one in report["meshes"].items():
            cells = [step, *(f"{one[name] / 2**20:.1f}" for name in names), *(str(one[name]) for name in counted)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table between the marks of this document")
    parser.add_argument("--op", choices=list(operations()), help="only this operation")
    options = parser.parse_args()
    # No GPU is looked for, and the plugin doesn't ask for the libraries that only running needs.
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    report: dict[str, Any] = {"device": DEVICE, "jax": jax.__version__, "operations": {}}
    for op, cases in operations().items():
        if options.op in (None, op):
            report["operations"][op] = {}
            for name, case in cases.items():
                print(f"{op} {name}", file=sys.stderr, flush=True)
                report["operations"][op][name] = measure(case)
    if options.op is None:
        report["steps"] = measure_steps()
        report["meshes"] = {}
        for name, figures in measure_meshes(_devices()):
            print(f"engine step on a mesh: {name}", file=sys.stderr, flush=True)
            report["meshes"][name] = figures
    print(table(report))
    if options.docs:
        before, rest = options.docs.read_text().split(_MARKS[0])
        after = rest.split(_MARKS[1])[1]
        options.docs.write_text(f"{before}{_MARKS[0]}\n\n{table(report)}\n\n{_MARKS[1]}{after}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
