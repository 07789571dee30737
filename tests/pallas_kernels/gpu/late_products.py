"""Operands of wgmma stay in shared memory until their products are waited for, whatever the interpreter does."""

import collections
import contextlib

import jax
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

_WGMMA_WAIT = 1 << 16


@contextlib.contextmanager
def late_products(monkeypatch):
    """Kernels interpreted within read the operands of a product again where it is waited for: overwriting them races.

    The interpreter multiplies at once and has no wgmma_wait; the GPU multiplies later. `wgmma_wait(n)` is traced as a
    wait for stores with a number that none has, so that the interpreter calls back.
    """
    pending = collections.defaultdict(collections.deque)
    wgmma, wait, deref = gpu_callbacks.wgmma, gpu_callbacks.wait_smem_to_gmem, gpu_callbacks.wgmma_accumulator_deref

    def read(thread, operands):
        memory = gpu_callbacks._get_shared_memory()
        for key, transforms, source_info in operands:
            position = memory.get_next_tma_thread_id()
            with memory.lock:
                memory.clocks[thread].inc(position)
                clock = memory.clocks[thread].async_smem_clock.copy()
            access = memory.access(key, transforms)
            gpu_callbacks.get_races().check_read(thread, clock, key, access, source_info=source_info)

    def finish(thread, n):
        while len(pending[thread]) > n:
            read(thread, pending[thread].popleft())

    @gpu_callbacks.fail_on_exception
    def late_wgmma(*, thread, source_info=None, **arguments):
        token = wgmma(thread=thread, source_info=source_info, **arguments)
        operands = []
        for name in ("a", "b"):
            key = gpu_callbacks.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
            transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{name}_transforms"])
            operands.append((key, jax.tree.map(int, transforms), source_info))
        read(thread, operands)
        pending[thread].append(operands)
        return token

    @gpu_callbacks.fail_on_exception
    def late_wait(*, token, thread, n, **arguments):
        if n < _WGMMA_WAIT:
            return wait(token=token, thread=thread, n=n, **arguments)
        finish(thread, n - _WGMMA_WAIT)
        return token

    @gpu_callbacks.fail_on_exception
    def late_deref(*, thread, wait_n, **arguments):
        finish(thread, wait_n or 0)
        return deref(thread=thread, wait_n=wait_n, **arguments)

    def traced_wait(n):
        primitives.wait_smem_to_gmem_p.bind(n=_WGMMA_WAIT + n, wait_read_only=True)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_callbacks, "wgmma", late_wgmma)
        patch.setattr(gpu_callbacks, "wait_smem_to_gmem", late_wait)
        patch.setattr(gpu_callbacks, "wgmma_accumulator_deref", late_deref)
        patch.setattr(plgpu, "wgmma_wait", traced_wait)
        jax.clear_caches()  # a trace holds the callbacks
        yield
    jax.clear_caches()
    assert not any(pending.values())
