"""`python -m tests.parallel.logits_of_processes PORT PROCESS FILE`: logits on meshes of two processes' four devices."""

from __future__ import annotations

import sys

import jax
import numpy as np

from jaxdual.parallel.mesh import ParallelSizes
from jaxdual.scheduling.experts import eplb
from tests.parallel.test_mesh_programs import logits_on_mesh, on_mesh, tokens_of

SIZES = [
    ("moe", ParallelSizes(1, 2, 2), 0),
    ("moe", ParallelSizes(2, 2, 1), 4),
    ("dense", ParallelSizes(1, 1, 4), 0),
]


def main() -> None:
    port, process, path = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process), initialization_timeout=60)
    found = {}
    for number, (name, sizes, redundant) in enumerate(SIZES):
        placement = None
        if redundant:
            placement = eplb(np.random.default_rng(0).gamma(1.0, 1.0, (2, 16)), sizes.expert, redundant=redundant)
        programs, layout = on_mesh(name, sizes, placement=placement)
        assert programs._mesh.spans_processes
        found[str(number)] = logits_on_mesh(programs, layout, sizes.ranks, tokens_of(name, sizes.ranks))
    if process == "0":
        np.savez(path, **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
