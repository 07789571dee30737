"""Arguments that the attentions over pages share: what is refused, and what is brought into bounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import arg_specs as decode_specs
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.key_bias import KeyBias, pack
from pallas_kernels.prefill_attention import arg_specs as prefill_specs
from pallas_kernels.prefill_attention import prefill_attention

SEQS, CHUNK, HEADS, KV_HEADS, HEAD_DIM, PAGE, WIDTH = 2, 5, 4, 2, 8, 4, 2
KEYS = WIDTH * PAGE
PAGES = jnp.zeros((SEQS * WIDTH, PAGE, KV_HEADS, HEAD_DIM))
TABLE, NUMBERS = jnp.zeros((SEQS, WIDTH), jnp.int32), jnp.ones(SEQS, jnp.int32)
BIAS = KeyBias(jnp.zeros((SEQS, 1), jnp.uint32), jnp.zeros(SEQS))
SHARED = {"k_pages": PAGES, "v_pages": PAGES, "page_table": TABLE}
DECODE = {"q": jnp.zeros((SEQS, HEADS, HEAD_DIM)), **SHARED, "lengths": NUMBERS}
PREFILL = {"q": jnp.zeros((SEQS, CHUNK, HEADS, HEAD_DIM)), **SHARED, "starts": NUMBERS, "counts": NUMBERS}
BOTH = pytest.mark.parametrize(("attention", "fitting"), [(decode_attention, DECODE), (prefill_attention, PREFILL)])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
decode, prefill = (
    jax.jit(attention, static_argnames=("window", "implementation"))
    for attention in (decode_attention, prefill_attention)
)
type Attention = Callable[..., Any]


@BOTH
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_pages": PAGES[0]}, r"k_pages must be floating\[rows, page_size, kv_heads, 8\]: float32\[4, 2, 8\]"),
        ({"k_pages": PAGES[..., :6]}, r"k_pages must be floating.*\[4, 4, 2, 6\]"),
        ({"k_pages": PAGES.astype(int), "v_pages": PAGES.astype(int)}, r"k_pages must be floating.*int32"),
        ({"v_pages": PAGES[:, :3]}, r"v_pages must be float32\[rows, 4, 2, 8\]: float32\[4, 3, 2, 8\]"),
        ({"v_pages": PAGES.astype(jnp.bfloat16)}, r"v_pages must be float32\[rows, 4, 2, 8\]: bfloat16"),
        ({"v_pages": PAGES[:0]}, r"pages must not be empty.*v_pages \[0, 4, 2, 8\]"),
        ({"page_table": TABLE[0, 0]}, r"page_table must be int32\[2, width\]: int32\[\]"),
        ({"page_table": TABLE[0]}, r"page_table must be int32\[2, width\]: int32\[2\]"),
        ({"page_table": TABLE[:1]}, r"page_table must be int32\[2, width\]: int32\[1, 2\]"),
        ({"page_table": TABLE.astype(jnp.float32)}, r"page_table must be int32\[2, width\]: float32"),
        ({"page_table": TABLE[:, :0]}, r"room for a page: int32\[2, 0\]"),
        ({"v_page_table": TABLE[:, :1]}, r"v_page_table must be int32\[2, 2\]: int32\[2, 1\]"),
        ({"k_scales": jnp.ones((4, PAGE, KV_HEADS))}, r"k_scales must be float32\[4, 2, 4\]: float32\[4, 4, 2\]"),
        ({"k_pages": PAGES.astype("float8_e4m3fn"), "v_pages": PAGES.astype("float8_e4m3fn")}, "need k_scales"),
        ({"window": 0}, "window=0 must be an int from 1 to 2147483647, or None"),
        ({"window": 2**31}, "window=2147483648 must be"),
        ({"window": True}, "window=True must be"),
        ({"window": 2.0}, r"window=2\.0 must be"),
        ({"window": "2"}, "window='2' must be"),
        ({"scale": float("nan")}, "scale=nan must be a finite number of Python or NumPy"),
        ({"scale": 1e39}, r"scale=1e\+39 must be"),
        ({"scale": True}, "scale=True must be"),
        ({"scale": jnp.float32(1)}, "scale=Array.* must be"),
        ({"key_bias": jnp.zeros(2)}, "key_bias must be a KeyBias or None, not a "),
        ({"key_bias": BIAS._replace(value=0.5)}, r"key_bias.value must be float32\[2\]: 0\.5"),
        ({"key_bias": BIAS._replace(value=jnp.zeros(3))}, r"key_bias.value must be float32\[2\]: float32\[3\]"),
        (
            {"key_bias": BIAS._replace(bits=jnp.zeros((2, 2), jnp.uint32))},
            r"bits must be uint32\[2, 1\]: uint32\[2, 2\]",
        ),
        ({"implementation": "fast"}, "_attention: implementation='fast' is none of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_refused(
    attention: Attention, fitting: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**fitting | changed)


@BOTH
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_queries_are_refused(attention: Attention, fitting: dict[str, Any]) -> None:
    q = fitting["q"]
    for wrong, message in (
        (q[0], "q must be floating.*q_heads, head_dim"),
        (q.astype(int), "q must be floating.*int32"),
        (q[..., :3, :], "q_heads=3 must be a multiple of kv_heads=2"),
        (q[..., :0, :], "q_heads=0 must be a multiple of kv_heads=2, and not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**fitting | {"q": wrong})


@pytest.mark.parametrize(
    ("attention", "fitting", "name"),
    [
        (decode_attention, DECODE, "lengths"),
        (prefill_attention, PREFILL, "starts"),
        (prefill_attention, PREFILL, "counts"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_numbers_are_refused(attention: Attention, fitting: dict[str, Any], name: str) -> None:
    for wrong in (NUMBERS[:1], NUMBERS.astype(jnp.float32)):
        with pytest.raises(ValueError, match=rf"{name} must be int32\[2\]"):
            attention(**fitting | {name: wrong})


@pytest.mark.usefixtures("unchecked_shapes")
def test_only_booleans_are_packed() -> None:
    with pytest.raises(ValueError, match=r"selected must be bool\[batch, keys\]: int32\[2, 3\]"):
        pack(jnp.ones((2, 3), jnp.int32))


@BOTH
@pytest.mark.usefixtures("unchecked_shapes")
def test_numbers_of_numpy_are_static_ones(attention: Attention, fitting: dict[str, Any]) -> None:
    jax.eval_shape(partial(attention, scale=np.float32(0.5), window=np.int64(3)), **fitting)


@BOTH
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_an_empty_batch_gives_empty_results(attention: Attention, fitting: dict[str, Any], implementation: str) -> None:
    arguments = {name: a if name.endswith("pages") else a[:0] for name, a in fitting.items()}
    out, lse = attention(**arguments, return_lse=True, implementation=implementation)
    assert out.shape == arguments["q"].shape
    assert lse.shape == arguments["q"].shape[:-1]


@IMPLEMENTATIONS
def test_an_empty_chunk_gives_empty_results(implementation: str) -> None:
    q = PREFILL["q"][:, :0]
    assert prefill_attention(**PREFILL | {"q": q}, implementation=implementation).shape == q.shape


def drawn(fitting: dict[str, Any]) -> dict[str, Any]:
    """Random numbers for zeros, and a page for each entry of the table."""
    q_key, arena_key = jax.random.split(jax.random.key(0))
    pages = jax.random.normal(arena_key, PAGES.shape)
    table = jnp.arange(SEQS * WIDTH, dtype=jnp.int32).reshape(TABLE.shape)
    q = jax.random.normal(q_key, fitting["q"].shape)
    return fitting | {"q": q, "k_pages": pages, "v_pages": pages, "page_table": table}


@IMPLEMENTATIONS
@pytest.mark.parametrize("window", [None, 3])
def test_lengths_beyond_the_table_are_those_of_the_table(window: int | None, implementation: str) -> None:
    def run(lengths: list[int]) -> Any:
        numbers = {"lengths": jnp.asarray(lengths, jnp.int32)}
        return decode(**drawn(DECODE) | numbers, window=window, implementation=implementation)

    np.testing.assert_array_equal(run([KEYS + 1, 3 * KEYS]), run([KEYS, KEYS]))
    np.testing.assert_array_equal(run([-5, 3]), run([0, 3]))


@IMPLEMENTATIONS
def test_queries_beyond_the_table_or_the_chunk_are_not_real(implementation: str) -> None:
    def run(starts: list[int], counts: list[int]) -> Any:
        numbers = {"starts": jnp.asarray(starts, jnp.int32), "counts": jnp.asarray(counts, jnp.int32)}
        return prefill(**drawn(PREFILL) | numbers, implementation=implementation)

    np.testing.assert_array_equal(run([KEYS - 3, 0], [CHUNK, CHUNK + 1]), run([KEYS - 3, 0], [3, CHUNK]))
    np.testing.assert_array_equal(run([KEYS + 1, 1], [2, -1]), run([0, 1], [0, 0]))


@BOTH
def test_the_reference_has_gradients_that_padding_does_not_spoil(attention: Attention, fitting: dict[str, Any]) -> None:
    numbers = {name: jnp.asarray([0, 3], jnp.int32) for name in ("lengths", "counts") if name in fitting}
    arguments = drawn(fitting) | numbers

    def total(q: jax.Array, pages: jax.Array) -> jax.Array:
        changed = {"q": q, "k_pages": pages, "v_pages": pages}
        return jnp.sum(attention(**arguments | changed, implementation="reference") ** 2)

    for gradient in jax.grad(total, (0, 1))(arguments["q"], arguments["k_pages"]):
        assert np.isfinite(gradient).all()
        assert np.asarray(gradient).any()


@pytest.mark.parametrize(
    "spec",
    [
        decode_specs.Spec(batch=2, context=40, q_heads=2, kv_heads=1, head_dim=8, page_size=24, biased=True),
        prefill_specs.Spec(seqs=2, chunk=40, q_heads=2, kv_heads=1, head_dim=8, page_size=24, biased=True),
    ],
)
def test_specs_have_a_bit_for_each_key(spec: Any) -> None:
    attention = decode_attention if isinstance(spec, decode_specs.Spec) else prefill_attention
    arguments = spec.make(jax.random.key(0))
    assert arguments["key_bias"].bits.shape == (2, 2)
    assert jax.jit(attention)(**arguments).shape == arguments["q"].shape
