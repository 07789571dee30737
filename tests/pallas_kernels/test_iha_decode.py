"""Interleaved Head Attention of one token on a CPU beside the paper's forward pass written out in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import xla as xla_attention
from pallas_kernels.iha_decode import arg_specs, iha_decode, mix, xla
from pallas_kernels.iha_decode.absorbed import absorbed_is_cheaper, absorbed_is_faster
from pallas_kernels.iha_prefill import virtual
from pallas_kernels.paged import Pages
from pallas_kernels.pseudo_heads import PseudoHeads
from tests.pallas_kernels.iha_battery import check_decode, mixing
from tests.pallas_kernels.paged_battery import case

type Attention = Callable[..., Any]
LENGTHS = [5, 0, 1, 9, 2, 12, 8]
LAYOUT: dict[str, Any] = {"page_size": 4}
compiled = jax.jit(iha_decode, static_argnames=("scale", "implementation"))


def _form(function: Attention) -> Attention:
    """A form of the XLA implementation with the arguments of the public function."""

    @partial(jax.jit, static_argnames="scale")
    def run(q: Any, k_pages: Any, v_pages: Any, page_table: Any, v_page_table: Any, lengths: Any, **others: Any) -> Any:
        return function(q, Pages(k_pages, page_table), Pages(v_pages, v_page_table), lengths, **others)

    return run


PUBLIC = {name: partial(compiled, implementation=name) for name in ("xla", "reference")}
FORMS = {"reference": PUBLIC["reference"], "absorbed": _form(xla.absorbed), "mixed": _form(xla.mixed)}


@pytest.fixture(params=list(PUBLIC))
def jitted(request: pytest.FixtureRequest) -> Attention:
    return PUBLIC[request.param]


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> Attention:
    return FORMS[request.param]


@pytest.mark.parametrize("pseudo_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("name", ["reference", "absorbed"])  # what is mixed are chunks, which tests of prefill compare
def test_agrees_with_the_forward_pass(name: str, mask: str, window: int | None, pseudo_heads: int) -> None:
    check_decode(FORMS[name], pseudo_heads, LENGTHS, mask=mask, window=window, pseudo_heads=pseudo_heads, **LAYOUT)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 4), (4, 1), (2, 3), (5, 2)])
def test_heads_and_groups(form: Attention, kv_heads: int, group: int) -> None:
    check_decode(form, group, LENGTHS, kv_heads=kv_heads, group=group, pseudo_heads=3, **LAYOUT)


@pytest.mark.parametrize("mask", ["flat", "token"])
def test_without_rotations(form: Attention, mask: str) -> None:
    check_decode(form, 1, LENGTHS, mask=mask, rotated=False, window=3, **LAYOUT)


@pytest.mark.parametrize(("mask", "left_out"), [("flat", 1), ("token", 2)])
def test_a_table_may_leave_out_the_pages_before_the_window(form: Attention, mask: str, left_out: int) -> None:
    # The newest token stands at position 12 and sees back to position 8, or 7 where pseudo keys are in order.
    check_decode(form, 9, [13], mask=mask, window=5, left_out=left_out, spare=0, **LAYOUT)


@pytest.mark.parametrize(
    "options", [{"separate_values": True}, {"one_table": True}, {"spare": 0}, {"scale": None}, {"scale": 1.9}]
)
def test_where_values_are_and_how_scores_are_scaled(jitted: Attention, options: dict[str, Any]) -> None:
    check_decode(jitted, 2, LENGTHS, **LAYOUT, **options)


def test_bfloat16_stays_bfloat16_and_close(jitted: Attention) -> None:
    check_decode(jitted, 3, LENGTHS, dtype=jnp.bfloat16, **LAYOUT)


@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("window", [None, 2])
def test_float64_is_computed_in_float64(form: Attention, mask: str, window: int | None) -> None:
    with jax.enable_x64(True):
        check_decode(form, 4, LENGTHS, mask=mask, window=window, pseudo_heads=3, dtype=jnp.float64, **LAYOUT)


def _one_pseudo_head(kv_heads: int, q_heads: int, head_dim: int, **options: Any) -> PseudoHeads:
    alpha = jnp.repeat(jnp.eye(kv_heads), q_heads // kv_heads, axis=1)[:, :, None]
    none = jnp.zeros((1, head_dim // 2))
    return PseudoHeads(alpha, alpha, none + 1, none, **options)


@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("window", [None, 3])
def test_one_pseudo_head_of_its_own_head_is_decode_attention(form: Attention, mask: Any, window: int | None) -> None:
    c = case(5, LENGTHS, kv_heads=2, head_dim=8, page_size=4, dtype=jnp.float32)
    q = jnp.asarray(c.rng.normal(size=(len(LENGTHS), 6, 8)), jnp.float32)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    pseudo = _one_pseudo_head(2, 6, 8, mask=mask, window=window)
    out = form(q=q[:, :, None], lengths=lengths, pseudo=pseudo, scale=0.3, **c.arrays)
    expected = decode_attention(q, lengths=lengths, window=window, scale=0.3, implementation="reference", **c.arrays)
    np.testing.assert_allclose(out[:, :, 0], expected, atol=1e-6)


def test_a_sequence_is_the_same_whatever_stands_beside_it(form: Attention) -> None:
    pseudo = mixing(6, 2, 4, 2, 8, window=3).pseudo(jnp.float32)
    c = case(8, [16, 16, 16], kv_heads=2, head_dim=8, page_size=4, dtype=jnp.float32)
    q = c.rng.normal(size=(3, 4, 2, 8))
    found = []
    for others in ([1, 2], [0, 0], [16, 11]):
        q[1:] = c.rng.normal(size=q[1:].shape)
        lengths = jnp.asarray([6, *others], jnp.int32)
        found.append(
            np.asarray(form(q=jnp.asarray(q, jnp.float32), lengths=lengths, pseudo=pseudo, scale=0.3, **c.arrays))[0]
        )
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_what_a_table_has_no_room_for_does_not_count(jitted: Attention) -> None:
    c = case(5, [8], kv_heads=2, head_dim=8, page_size=4, spare=0, dtype=jnp.float32)
    q = jnp.asarray(c.rng.normal(size=(1, 4, 2, 8)), jnp.float32)
    pseudo = mixing(6, 2, 4, 2, 8).pseudo(jnp.float32)
    beyond, within = (jitted(q=q, lengths=jnp.asarray([n], jnp.int32), pseudo=pseudo, **c.arrays) for n in (11, 8))
    assert (beyond == within).all()


def test_xla_takes_the_form_with_fewer_operations() -> None:
    for kv_heads in range(1, 40):
        for count in range(1, 21):
            # Multiplications for a cached token and a channel, of one query head.
            absorbed = count * count * kv_heads + count * kv_heads
            mixed = 2 * kv_heads * count + 2 * count * count
            assert absorbed_is_cheaper(kv_heads, count) == (absorbed < mixed)
    assert absorbed_is_cheaper(20, 1)
    assert absorbed_is_cheaper(2, 20)
    assert not absorbed_is_cheaper(8, 2)


by_virtual_sequences = _form(partial(mix.iha_decode, xla_attention.decode_attention))


@pytest.mark.parametrize(("window", "pseudo_heads"), [(None, 2), (None, 3), (1, 2), (2, 3), (3, 4), (100, 2), (3, 1)])
@pytest.mark.parametrize("mask", ["flat", "token"])
def test_pseudo_pages_give_the_same(mask: str, window: int | None, pseudo_heads: int) -> None:
    options = {"mask": mask, "window": window, "pseudo_heads": pseudo_heads} | LAYOUT
    check_decode(by_virtual_sequences, pseudo_heads, LENGTHS, **options)


@pytest.mark.parametrize("mask", ["flat", "token"])
def test_pseudo_pages_of_some_heads_at_a_time(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "group_sizes", lambda *_: (1, 2))
    jax.clear_caches()  # of programs that were traced with other groups
    check_decode(by_virtual_sequences, 5, LENGTHS, mask=mask, window=3, **LAYOUT)
    jax.clear_caches()


def test_pseudo_pages_keep_tables_that_leave_pages_out() -> None:
    check_decode(by_virtual_sequences, 9, [13], window=5, left_out=1, spare=0, **LAYOUT)


QUERIES = jnp.zeros((2, 4, 3, 8))
PSEUDO = mixing(0, 2, 4, 3, 8).pseudo(jnp.float32)
FITTING: dict[str, Any] = {
    "q": QUERIES,
    "k_pages": jnp.zeros((4, 4, 2, 8)),
    "v_pages": jnp.zeros((4, 4, 2, 8)),
    "page_table": jnp.zeros((2, 2), jnp.int32),
    "lengths": jnp.ones(2, jnp.int32),
    "pseudo": PSEUDO,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": QUERIES[0]}, r"q must be floating\[batch, q_heads, pseudo, head_dim\]: float32\[4, 3, 8\]"),
        ({"q": QUERIES[:, :, :2]}, r"q must be floating\[batch, q_heads, 3, head_dim\]: float32\[2, 4, 2, 8\]"),
        ({"q": QUERIES.astype(int)}, r"q must be floating.*int32"),
        ({"q": QUERIES[:, :3]}, "q_heads=3 must be a multiple of kv_heads=2"),
        ({"q": QUERIES[..., :6]}, r"k_pages must be floating.*6\]"),
        ({"lengths": jnp.ones(3, jnp.int32)}, r"lengths must be int32\[2\]: int32\[3\]"),
        ({"lengths": jnp.ones(2)}, r"lengths must be int32\[2\]: float32\[2\]"),
        ({"page_table": jnp.zeros((3, 2), jnp.int32)}, r"page_table must be int32\[2, width\]"),
        ({"v_page_table": jnp.zeros((2, 1), jnp.int32)}, r"v_page_table must be int32\[2, 2\]"),
        ({"pseudo": PSEUDO.alpha_k}, "pseudo must be a PseudoHeads, not a "),
        ({"pseudo": {"alpha_k": PSEUDO.alpha_k[:1]}}, r"alpha_k must be floating\[2, 4, pseudo\]: float32\[1, 4, 3\]"),
        ({"pseudo": {"alpha_v": PSEUDO.alpha_v[..., :2]}}, r"alpha_v must be floating\[2, 4, 3\]: float32\[2, 4, 2\]"),
        ({"pseudo": {"cos": PSEUDO.cos[:2]}}, r"cos must be floating\[3, 4\]: float32\[2, 4\]"),
        ({"pseudo": {"sin": PSEUDO.sin[:, :3]}}, r"sin must be floating\[3, 4\]: float32\[3, 3\]"),
        ({"pseudo": {"mask": "none"}}, "mask is 'none'; known: flat, token"),
        ({"pseudo": {"window": 0}}, "window=0 must be an int from 1"),
        ({"scale": float("inf")}, "scale=inf must be a finite number"),
        ({"implementation": "fast"}, "iha_decode: implementation='fast' is none of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    if isinstance(changed.get("pseudo"), dict):
        changed = {"pseudo": dataclasses.replace(PSEUDO, **changed["pseudo"])}
    with pytest.raises(ValueError, match=message):
        iha_decode(**FITTING | changed)


def test_the_reference_has_gradients() -> None:
    c = case(5, LENGTHS, kv_heads=2, head_dim=8, page_size=4, dtype=jnp.float32)
    arrays = {name: jnp.nan_to_num(a) if a.dtype == jnp.float32 else a for name, a in c.arrays.items()}
    q = jnp.asarray(c.rng.normal(size=(len(LENGTHS), 4, 2, 8)), jnp.float32)

    def total(alpha: Any) -> jax.Array:
        pseudo = PseudoHeads(alpha, alpha, jnp.ones((2, 4)), jnp.zeros((2, 4)))
        lengths = jnp.asarray(LENGTHS, jnp.int32)
        return iha_decode(q, lengths=lengths, pseudo=pseudo, implementation="reference", **arrays).sum()

    gradient = jax.jit(jax.grad(total))(jnp.asarray(c.rng.normal(size=(2, 4, 2)), jnp.float32))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_an_empty_batch_gives_an_empty_result(implementation: str) -> None:
    empty = {name: FITTING[name][:0] for name in ("q", "page_table", "lengths")}
    assert iha_decode(**FITTING | empty, implementation=implementation).shape == (0, 4, 3, 8)


def test_only_gpus_make_pseudo_pages_first() -> None:
    for implementation in ("mosaic", "cudnn"):
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            iha_decode(**FITTING, implementation=implementation)


def test_a_hopper_reads_raw_keys_where_that_is_less_work() -> None:
    for heads, count in ((8, 2), (8, 4), (16, 2), (16, 4), (20, 2), (20, 4), (32, 1)):
        assert absorbed_is_faster(heads, heads, count)
    assert absorbed_is_faster(32, 8, 4)  # pseudo keys of a key/value head are four times as many
    assert not absorbed_is_faster(16, 16, 16)
    assert not absorbed_is_faster(20, 20, 20)


def test_specs_are_what_they_count() -> None:
    spec = arg_specs.Spec(batch=2, context=40, q_heads=4, kv_heads=2, head_dim=8, pseudo_heads=3, page_size=8, window=9)
    arguments = spec.make(jax.random.key(0))
    assert compiled(**arguments).shape == arguments["q"].shape
    assert spec.bytes_moved == 2 * 2 * 9 * 2 * 8 * 2
    # Of each key in sight and pair of a query head's pseudo heads, two products with the numbers of both source heads,
    # or of a pseudo key and value made of both, and two products with each.
    assert spec.flops == 2 * 9 * 4 * min(3 * 3 * 2 * (2 * 8) * 2, 3 * 2 * (2 * 8) * 2 + 3 * 3 * (2 * 8) * 2)
