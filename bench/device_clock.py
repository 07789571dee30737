"""How long calls take on the device, and what it can do at most.

On an NVIDIA GPU the time of a call is that of its kernels, as CUPTI says, without the gaps between them; elsewhere,
and where CUPTI can't be had, it is the wall clock over calls that are enqueued back to back. The clock in use is said.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_WARM_UPS = 3
_SECONDS = 0.3  # of measured calls, about
_MIN_CALLS, _MAX_CALLS = 5, 200


class Timing(NamedTuple):
    """Of one call, in seconds.

    Attributes:
      device: median of the time of the call's kernels; None where CUPTI can't be had.
      wall: mean of calls that are enqueued back to back, the launch of each hidden behind the one before.
    """

    device: float | None
    wall: float

    @property
    def seconds(self) -> float:
        return self.wall if self.device is None else self.device


class Ceilings(NamedTuple):
    """Measured bounds: bytes read and written by a copy, and multiply-adds, counted twice, of a matrix product."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float
    copied_bytes: int
    matmul: str

    def seconds(self, bytes_moved: int, flops: int) -> float:
        """The least that so much traffic and arithmetic can take: the roofline."""
        return max(bytes_moved / self.copy_bytes_per_second, flops / self.matmul_flops_per_second)


def measure(calls: Sequence[Callable[[], Any]]) -> Timing:
    """Calls in turn, each warmed up; different inputs keep one call's data out of the caches of the next."""
    for _ in range(_WARM_UPS):
        for call in calls:
            _wait(call())
    start = time.perf_counter()
    _wait([call() for call in calls])
    one = (time.perf_counter() - start) / len(calls)
    count = min(_MAX_CALLS, max(_MIN_CALLS, len(calls), round(_SECONDS / one)))
    turns = [calls[i % len(calls)] for i in range(count)]
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        last = None
        for call in turns:
            last = call()  # results are dropped: to hold them all would take memory
        _wait(last)
        rounds.append((time.perf_counter() - start) / count)
    return Timing(_cupti(turns), statistics.median(rounds))


def _cupti(calls: Sequence[Callable[[], Any]]) -> float | None:
    """Median over calls of the time of their kernels."""
    if jax.default_backend() != "gpu":
        return None
    # What JAX's own `profiler.measure` stands on; that one repeats a single input, which then lies in the L2 cache.
    from jax.experimental.mosaic.gpu import profiler

    extension = getattr(getattr(profiler, "mosaic_gpu_lib", None), "_mosaic_gpu_ext", None)
    if extension is None:
        return None
    extension._cupti_init()
    try:
        for call in calls:
            _wait(call())
    finally:
        kernels = extension._cupti_get_timings(True)
    if not kernels or len(kernels) % len(calls):
        return None
    each = len(kernels) // len(calls)
    of_calls = [kernels[i : i + each] for i in range(0, len(kernels), each)]
    return statistics.median(sum(milliseconds for _, milliseconds in call) for call in of_calls) / 1e3


def _wait(results: Any) -> None:
    """Until results of JAX or torch are there."""
    jax.block_until_ready(results)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings() -> Ceilings:
    """Measured now: memory by a copy of a large array, arithmetic by a large matrix product of random numbers."""
    on_gpu = jax.default_backend() == "gpu"
    numbers = jnp.arange(2**30 if on_gpu else 2**25, dtype=jnp.int32)
    # By a kernel: a bare copy is none, and CUPTI would not count it.
    copy = jax.jit(lambda x: x + 1)
    copied = 2 * numbers.nbytes
    copying = measure([functools.partial(copy, numbers)]).seconds
    del numbers
    size, dtype = (8192, jnp.bfloat16) if on_gpu else (2048, jnp.float32)
    pairs = [jax.random.normal(jax.random.key(i), (2, size, size), dtype) for i in range(2)]
    product = jax.jit(jnp.matmul)
    multiplying = measure([functools.partial(product, a, b) for a, b in pairs]).seconds
    return Ceilings(copied / copying, 2 * size**3 / multiplying, copied, f"{size}^3 {jnp.dtype(dtype).name}")
