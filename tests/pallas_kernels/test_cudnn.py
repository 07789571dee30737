"""The way to cuDNN's attention: refused where there is no cuDNN, and traced as far as it goes without a GPU."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cudnn
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.key_bias import KeyBias
from pallas_kernels.prefill_attention import prefill_attention

BATCH, WIDTH, ROWS, PAGE, KV_HEADS, GROUP, HEAD_DIM, CHUNK = 3, 4, 50, 16, 2, 4, 64, 32
HEADS = KV_HEADS * GROUP


def decode_arguments(dtype: Any = jnp.bfloat16, pages_dtype: Any = None) -> dict[str, jax.Array]:
    pages = jnp.ones((ROWS, PAGE, KV_HEADS, HEAD_DIM), pages_dtype or dtype)
    return {
        "q": jnp.ones((BATCH, HEADS, HEAD_DIM), dtype),
        "k_pages": pages,
        "v_pages": pages,
        "page_table": jnp.zeros((BATCH, WIDTH), jnp.int32),
        "lengths": jnp.asarray([0, 5, PAGE * WIDTH], jnp.int32),
    }


def prefill_arguments(dtype: Any = jnp.bfloat16, pages_dtype: Any = None) -> dict[str, jax.Array]:
    arguments = decode_arguments(dtype, pages_dtype)
    del arguments["lengths"]
    return arguments | {
        "q": jnp.ones((BATCH, CHUNK, HEADS, HEAD_DIM), dtype),
        "starts": jnp.asarray([0, 5, PAGE * WIDTH - CHUNK], jnp.int32),
        "counts": jnp.asarray([0, 7, CHUNK], jnp.int32),
    }


OPERATIONS = pytest.mark.parametrize(
    ("attention", "make"), [(decode_attention, decode_arguments), (prefill_attention, prefill_arguments)]
)
type Attention = Callable[..., Any]
type Make = Callable[..., dict[str, jax.Array]]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The private module, on a machine that seems to have a cuDNN."""
    module = pytest.importorskip(cudnn._MODULE)
    monkeypatch.setattr(module, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 92000))
    monkeypatch.setattr(cudnn, "_refusal", lambda *_: None)
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have a GPU."""
    monkeypatch.setattr(cudnn, "_platform", lambda: "gpu")
    cudnn._refusal.cache_clear()


@OPERATIONS
def test_a_cpu_has_no_cudnn(attention: Attention, make: Make) -> None:
    with pytest.raises(NotImplementedError, match="cuDNN can't be used: needs an NVIDIA GPU, not cpu"):
        attention(**make(), implementation="cudnn")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, not cpu"):
        jax.jit(functools.partial(attention, implementation="cudnn")).lower(**make())


@OPERATIONS
@pytest.mark.parametrize("types", [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float16)])
def test_other_types_are_refused(attention: Attention, make: Make, types: tuple[Any, Any]) -> None:
    with pytest.raises(NotImplementedError, match=f"{types[0].__name__}, {types[1].__name__}"):
        attention(**make(*types), implementation="cudnn")


@OPERATIONS
def test_a_bias_is_refused(attention: Attention, make: Make) -> None:
    bias = KeyBias(jnp.zeros((BATCH, PAGE * WIDTH // 32), jnp.uint32), jnp.ones(BATCH, jnp.float32))
    with pytest.raises(NotImplementedError, match="key_bias"):
        attention(**make(), key_bias=bias, implementation="cudnn")


@OPERATIONS
@pytest.mark.parametrize("name", ["k_scales", "v_scales"])
def test_scales_are_refused(attention: Attention, make: Make, name: str, fused: Any) -> None:
    scales = {name: jnp.full((ROWS, KV_HEADS, PAGE), 2, jnp.float32)}
    with pytest.raises(NotImplementedError, match="pages with scales"):
        attention(**make(), **scales, implementation="cudnn")


@OPERATIONS
def test_an_empty_batch_is_left_to_another(attention: Attention, make: Make, fused: Any) -> None:
    arguments = {name: a if name.endswith("pages") else a[:0] for name, a in make().items()}
    with pytest.raises(NotImplementedError, match="no queries"):
        attention(**arguments, implementation="cudnn")


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="window=5"):
        decode_attention(**decode_arguments(), window=5, implementation="cudnn")


def test_a_mask_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_MAX_MASK_BYTES", 2 * BATCH * CHUNK * WIDTH * PAGE - 1)
    with pytest.raises(NotImplementedError, match="a mask of 12288 bytes; at most 12287"):
        prefill_attention(**prefill_arguments(), implementation="cudnn")


@OPERATIONS
def test_a_machine_without_cudnn_is_found_by_trying(
    attention: Attention, make: Make, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip(cudnn._MODULE), "cuda_versions", None)
    with pytest.raises(NotImplementedError, match="cuDNN is not detected"):
        attention(**make(), implementation="cudnn")


def test_what_does_not_compile_is_refused_once(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fused(**arguments: Any) -> jax.Array:
        tries.append(arguments["scale"])
        raise NotImplementedError("head dim must be smaller")

    monkeypatch.setattr(cudnn, "_fused", fused)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="head dim must be smaller"):
            decode_attention(**decode_arguments(), scale=0.5, implementation="cudnn")
    assert tries == [0.5]


def test_a_module_that_moved_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_MODULE", "jax._src.cudnn.nowhere")
    with pytest.raises(NotImplementedError, match="nowhere"):
        decode_attention(**decode_arguments(), implementation="cudnn")


def custom_call(attention: Attention, arguments: dict[str, jax.Array], **options: Any) -> tuple[Any, list[str]]:
    """The configuration that cuDNN gets, and the types of what it is handed."""
    call = functools.partial(attention, scale=0.5, implementation="cudnn", **options)
    text = jax.jit(call).trace(**arguments).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = (line for line in text.splitlines() if "@__cudnn$fmha" in line)
    (config,) = re.findall(r'backend_config = "((?:[^"\\]|\\.)*)"', line)
    found = json.loads(re.sub(r"\\22", '"', config))["cudnn_fmha_backend_config"]
    assert found["fmha_scale"] == 0.5
    assert found["mask_type"] == "PADDING"
    assert found["dropout_rate"] == 0
    assert found["sliding_window_length"] == 0
    return found, re.findall(r"tensor<(\w+)>", line[line.rindex(": (") :])


def test_the_call_of_decode_says_pages_lengths_and_scale(fused: Any) -> None:
    config, types = custom_call(decode_attention, decode_arguments())
    assert config["is_paged_attention"]
    pages, table = f"{ROWS}x{PAGE}x{KV_HEADS}x{HEAD_DIM}xbf16", f"{BATCH}x1x{WIDTH}x1xi32"
    assert types[0] == f"{BATCH}x1x{HEADS}x{HEAD_DIM}xbf16"
    assert types[1:7] == [pages, pages, f"{BATCH}xi32", f"{BATCH}xi32", table, table]


def test_the_call_of_prefill_says_keys_and_mask(fused: Any) -> None:
    config, types = custom_call(prefill_attention, prefill_arguments(), window=9)
    assert not config["is_paged_attention"]
    keys = f"{BATCH}x{WIDTH * PAGE}x{KV_HEADS}x{HEAD_DIM}xbf16"
    assert types[0] == f"{BATCH}x{CHUNK}x{HEADS}x{HEAD_DIM}xbf16"
    assert types[1:6] == [keys, keys, f"{BATCH}x1x{CHUNK}x{WIDTH * PAGE}xbf16", f"{BATCH}xi32", f"{BATCH}xi32"]


def written_out(handed: list[Any]) -> tuple[jax.Array, jax.Array]:
    """What cuDNN is documented to compute, of the arguments of the private function; NaN where nothing is said."""
    q, k, v, bias, q_lengths, k_lengths, _, _, k_table, v_table, scale, _, _, (biased, _), *_ = handed
    batch, queries, heads, _ = q.shape
    if k_table.size:
        k, v = (p[t.reshape(batch, -1)].reshape(batch, -1, *p.shape[2:]) for p, t in ((k, k_table), (v, v_table)))
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    k, v = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * scale
    if biased:
        scores += bias.astype(jnp.float32)
    keys = jnp.arange(k.shape[1]) < k_lengths[:, None]
    scores = jnp.where(keys[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    # Keys past the length are not read; a mask that is added multiplies what it hides with 0.
    v = jnp.where(keys[:, :, None, None], v, 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
    garbage = (jnp.arange(queries) >= q_lengths[:, None]) | (k_lengths == 0)[:, None]
    out = jnp.where(garbage[:, :, None, None], jnp.nan, out)
    return out.astype(jnp.bfloat16), jnp.where(garbage[:, None], jnp.nan, jax.nn.logsumexp(scores, axis=-1))


@pytest.mark.parametrize(
    ("attention", "make", "window"),
    [
        (decode_attention, decode_arguments, None),
        (prefill_attention, prefill_arguments, None),
        (prefill_attention, prefill_arguments, 9),
    ],
)
def test_what_is_handed_on_means_the_same_attention(
    attention: Attention, make: Make, window: int | None, fused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    arguments = make()
    for name in ("q", "k_pages", "v_pages"):
        arguments[name] = jnp.asarray(rng.standard_normal(arguments[name].shape), jnp.bfloat16)
    tables = rng.permutation(ROWS)[: 2 * BATCH * WIDTH].reshape(2, BATCH, WIDTH).astype(np.int32)
    arguments["page_table"], arguments["v_page_table"] = map(jnp.asarray, tables)
    if attention is prefill_attention:  # beyond the ends: what cuDNN's added mask would not hide
        ends = arguments["starts"] + arguments["counts"]
        for name, table in (("k_pages", tables[0]), ("v_pages", tables[1])):
            pages = np.array(arguments[name])
            for row, end in zip(table, ends.tolist(), strict=True):
                for slot in range(end, WIDTH * PAGE):
                    pages[row[slot // PAGE], slot % PAGE] = np.nan
            arguments[name] = jnp.asarray(pages)
    monkeypatch.setattr(fused, "_dot_product_attention", lambda *handed: written_out(list(handed)))
    out, lse = attention(**arguments, window=window, return_lse=True, implementation="cudnn")
    expected, expected_lse = attention(**arguments, window=window, return_lse=True, implementation="reference")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02)
    np.testing.assert_allclose(lse, expected_lse, atol=0.01)


def test_pages_are_handed_on_as_they_are(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []

    def attention(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        handed.extend(arguments)
        return written_out(list(arguments))

    monkeypatch.setattr(fused, "_dot_product_attention", attention)
    arguments = decode_arguments()
    decode_attention(**arguments, implementation="cudnn")
    assert handed[1] is arguments["k_pages"]
    assert handed[2] is arguments["v_pages"]
