"""Operations of other libraries on the workloads of `bench.kernels`, each fed in the layout that it wants.

What a library is given beforehand, pages gathered into one array for instance, is not timed: it gets its best case.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import unpack_blocks
from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention.reference import gathered
from pallas_kernels.sparse_matmul import unpack

type Arrays = dict[str, Any]
type Contender = Callable[[Arrays, dict[str, Any]], Callable[[], Any]]


def cudnn_contiguous(arrays: Arrays, options: dict[str, Any]) -> Callable[[], jax.Array]:
    """cuDNN by `jax.nn.dot_product_attention`, on keys and values without pages."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    q, k, v, lengths = _contiguous(arrays, options)
    return functools.partial(_attend_with_cudnn, q, k, v, lengths)


@jax.jit
def _attend_with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    attend = jax.nn.dot_product_attention
    return attend(q[:, None], k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, 0]


def torch_sdpa(arrays: Arrays, options: dict[str, Any]) -> Callable[[], Any]:
    """torch's scaled_dot_product_attention, on keys and values without pages, all sequences of one length."""
    torch = _imported("torch")
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    q, k, v, lengths = _contiguous(arrays, options)
    if lengths is not None and (lengths != k.shape[1]).any():
        raise NotImplementedError("sequences of different lengths")
    causal = lengths is None
    q = q if causal else q[:, None]
    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention

    def run() -> Any:
        out = attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return out if causal else out[:, 0]

    return run


def flashinfer_paged(arrays: Arrays, options: dict[str, Any]) -> Callable[[], Any]:
    """FlashInfer's decode on pages of 64 or fewer tokens, its plan made beforehand."""
    flashinfer, torch = _imported("flashinfer"), _imported("torch")
    _plain(arrays, options)
    if "lengths" not in arrays:
        raise NotImplementedError("decode only")
    page_size, kv_heads, head_dim = arrays["k_pages"].shape[1:]
    q, lengths = torch.from_dlpack(arrays["q"]), torch.from_dlpack(arrays["lengths"])
    counts = (lengths + page_size - 1) // page_size
    tables = [torch.from_dlpack(arrays[name]).long() for name in ("page_table", "v_page_table")]
    # One table for both: keys and values are put in the order of the tables.
    k, v = (torch.from_dlpack(arrays[n])[t.flatten()] for n, t in zip(("k_pages", "v_pages"), tables, strict=True))
    width = tables[0].shape[1]
    ids = torch.arange(q.shape[0] * width, device=q.device, dtype=torch.int32).reshape(-1, width)
    wanted = torch.arange(width, device=q.device) < counts[:, None]
    indptr = torch.nn.functional.pad(torch.cumsum(counts, 0), (1, 0)).int()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**28, dtype=torch.uint8, device=q.device), kv_layout="NHD", use_tensor_cores=True
    )
    wrapper.plan(
        indptr,
        ids[wanted],
        ((lengths - 1) % page_size + 1).int(),
        q.shape[1],
        kv_heads,
        head_dim,
        page_size,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    run: Callable[[], Any] = functools.partial(wrapper.run, q, (k, v))
    return run


def jax_ragged_dot(arrays: Arrays, options: dict[str, Any]) -> Callable[[], Any]:
    """JAX's own Mosaic kernel of the grouped product; for the gated form two of them."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    return functools.partial(_multiply_with_jax, **arrays)


@jax.jit
def _multiply_with_jax(
    lhs: jax.Array,
    group_sizes: jax.Array,
    rhs: jax.Array | None = None,
    gate: jax.Array | None = None,
    up: jax.Array | None = None,
) -> jax.Array:
    # Imported where a GPU is: the module asks for CUDA's plugin.
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    def product(matrices: Any) -> jax.Array:
        block_m = 64 if lhs.shape[0] < 64 * matrices.shape[0] else 128
        try:
            found: jax.Array = ragged_dot_mgpu.ragged_dot(
                lhs,
                matrices,
                group_sizes=group_sizes,
                block_m=block_m,
                block_n=128,
                block_k=64,
                max_concurrent_steps=4,
                grid_block_n=2,
            )
        except ValueError as error:
            raise NotImplementedError(str(error)) from error
        return found

    return product(rhs) if gate is None else jax.nn.silu(product(gate)) * product(up)


def dense_of_packed(arrays: Arrays, options: dict[str, Any]) -> Callable[[], jax.Array]:
    """XLA's product with the same weights unpacked: what a server does without a sparse form."""
    return functools.partial(
        _multiply, arrays["x"], jax.jit(unpack, static_argnums=2)(arrays["values"], arrays["mask"], options["of"])
    )


def dense_of_blocks(arrays: Arrays, options: dict[str, Any]) -> Callable[[], jax.Array]:
    """The same of block-sparse weights."""
    x, blocks, indices = arrays["x"], arrays["blocks"], arrays["indices"]
    return functools.partial(_multiply, x, jax.jit(unpack_blocks, static_argnums=2)(blocks, indices, x.shape[1]))


@jax.jit
def _multiply(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.dot(x, weights)


CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "prefill_attention": {"cudnn_contiguous": cudnn_contiguous, "torch_sdpa": torch_sdpa},
    "decode_attention": {
        "cudnn_contiguous": cudnn_contiguous,
        "torch_sdpa": torch_sdpa,
        "flashinfer": flashinfer_paged,
    },
    "grouped_matmul": {"jax_ragged_dot": jax_ragged_dot},
    "sparse_matmul": {"dense": dense_of_packed},
    "block_sparse_matmul": {"dense": dense_of_blocks},
}


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotImplementedError(f"{name} is not installed") from error


def _plain(arrays: Arrays, options: dict[str, Any]) -> None:
    if options.get("window") or "key_bias" in arrays or "k_scales" in arrays:
        raise NotImplementedError("compared on workloads without window, bias and scales")


def _contiguous(arrays: Arrays, options: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Queries, keys and values in token order, and lengths; no lengths for causal attention without a prefix."""
    _plain(arrays, options)
    lengths = arrays.get("lengths")
    if lengths is None and arrays["starts"].any():
        raise NotImplementedError("compared on chunks without a prefix")
    k = gathered(Pages(arrays["k_pages"], arrays["page_table"]))
    v = gathered(Pages(arrays["v_pages"], arrays["v_page_table"]))
    if lengths is None:
        k, v = (x[:, : arrays["q"].shape[1]] for x in (k, v))
    return arrays["q"], k, v, lengths
