"""The way to cuDNN's paged attention: refused where there is no cuDNN, and traced as far as it goes without a GPU."""

from __future__ import annotations

import functools
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import cudnn

BATCH, WIDTH, ROWS, PAGE, KV_HEADS, GROUP, HEAD_DIM = 3, 4, 50, 16, 2, 4, 64


def arguments(dtype: Any = jnp.bfloat16, pages_dtype: Any = None) -> tuple[jax.Array, ...]:
    pages = jnp.ones((ROWS, PAGE, KV_HEADS, HEAD_DIM), pages_dtype or dtype)
    table = jnp.zeros((BATCH, WIDTH), jnp.int32)
    return (
        jnp.ones((BATCH, KV_HEADS * GROUP, HEAD_DIM), dtype),
        pages,
        pages,
        table,
        table,
        jnp.asarray([0, 5, PAGE * WIDTH], jnp.int32),
    )


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The private module, on a machine that seems to have a cuDNN."""
    module = pytest.importorskip(cudnn._MODULE)
    monkeypatch.setattr(module, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 92000))
    return module


def lowered() -> str:
    attend = functools.partial(cudnn._attend, scale=0.5)
    return jax.jit(attend).trace(*arguments()).lower(lowering_platforms=("cuda",)).as_text()


def test_a_cpu_has_no_cudnn() -> None:
    with pytest.raises(NotImplementedError, match="cuDNN can't be used: needs an NVIDIA GPU, not cpu"):
        cudnn.paged_decode_attention(*arguments(), 0.5)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, not cpu"):
        jax.jit(cudnn.paged_decode_attention, static_argnums=6).lower(*arguments(), 0.5)


@pytest.mark.parametrize("types", [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float16)])
def test_other_types_are_refused(types: tuple[Any, Any]) -> None:
    with pytest.raises(NotImplementedError, match=f"{types[0].__name__}, {types[1].__name__}"):
        cudnn.paged_decode_attention(*arguments(*types), 0.5)


def test_a_machine_without_cudnn_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(cudnn._MODULE)
    monkeypatch.setattr(module, "cuda_versions", None)
    monkeypatch.setattr(cudnn, "_platform", lambda: "gpu")
    cudnn._refusal.cache_clear()
    with pytest.raises(NotImplementedError, match="cuDNN is not detected"):
        cudnn.paged_decode_attention(*arguments(), 0.5)


def test_what_does_not_compile_is_refused_once(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def attend(*args: jax.Array, scale: float) -> jax.Array:
        tries.append(scale)
        raise NotImplementedError("head dim must be smaller")

    monkeypatch.setattr(cudnn, "_attend", attend)
    monkeypatch.setattr(cudnn, "_platform", lambda: "gpu")
    cudnn._refusal.cache_clear()
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="head dim must be smaller"):
            cudnn.paged_decode_attention(*arguments(), 0.5)
    assert tries == [0.5]


def test_a_module_that_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_MODULE", "jax._src.cudnn.nowhere")
    with pytest.raises(NotImplementedError, match="nowhere"):
        cudnn._attend(*arguments(), scale=0.5)


def test_the_call_says_pages_lengths_and_scale(fused: Any) -> None:
    text = lowered()
    (call,) = (line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line)
    (config,) = re.findall(r'backend_config = "((?:[^"\\]|\\.)*)"', call)
    config = json.loads(re.sub(r"\\22", '"', config))["cudnn_fmha_backend_config"]
    assert config["is_paged_attention"]
    assert config["mask_type"] == "PADDING"
    assert config["fmha_scale"] == 0.5
    assert config["dropout_rate"] == 0
    assert config["sliding_window_length"] == 0
    types = re.findall(r"tensor<(\w+)>", call[call.rindex(": (") :])
    pages, table = f"{ROWS}x{PAGE}x{KV_HEADS}x{HEAD_DIM}xbf16", f"{BATCH}x1x{WIDTH}x1xi32"
    assert types[0] == f"{BATCH}x1x{KV_HEADS * GROUP}x{HEAD_DIM}xbf16"
    assert types[1:7] == [pages, pages, f"{BATCH}xi32", f"{BATCH}xi32", table, table]


def test_arrays_are_handed_on_and_padding_rows_are_zero_whatever_comes_back(
    fused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = []

    def attention(q: jax.Array, *others: Any) -> jax.Array:
        handed.extend([q, *others])
        return jnp.full_like(q, jnp.nan).at[1:].set(2)

    monkeypatch.setattr(fused, "_dot_product_attention", attention)
    q, k_pages, v_pages, k_table, v_table, lengths = arguments()
    v_pages, v_table = v_pages + 1, v_table + 1
    out = cudnn._attend(q, k_pages, v_pages, k_table, v_table, lengths, scale=0.5)
    assert handed[1] is k_pages
    assert handed[2] is v_pages
    assert handed[4].tolist() == [1] * BATCH
    assert handed[5] is lengths
    assert not handed[8].any()
    assert handed[9].all()
    assert out.shape == (BATCH, KV_HEADS * GROUP, HEAD_DIM)
    assert out.dtype == jnp.bfloat16
    assert not out[0].any()
    assert (out[1:] == 2).all()
