"""Runs Mosaic GPU kernels on a CPU: memory and barriers as a Hopper has them, with races and bad reads found.

On a GPU they are compiled and run as they are.
"""

import contextlib
import os

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

ON_GPU = jax.default_backend() == "gpu"


def on_hopper(multiprocessors=1):
    """What is traced within is for a GPU of so many multiprocessors."""
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", multiprocessors, "cuda"))
    )


@contextlib.contextmanager
def interpreted(multiprocessors=1):
    """Kernels called within are for a GPU of so many multiprocessors; data races fail."""
    if ON_GPU:
        yield
        return
    # Warpgroups that wait for each other each hold a thread of XLA's pool, which has one a core if not told otherwise.
    if int(os.environ.get("PJRT_NPROC", "0")) < 8:
        pytest.skip("needs PJRT_NPROC=16 in the environment, as make test-kernels sets it")
    strict = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    try:
        with on_hopper(multiprocessors), plgpu.force_gpu_interpret_mode(strict):
            yield
    except BaseException:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise
    assert not interpret_pallas_call.get_races().races_found
