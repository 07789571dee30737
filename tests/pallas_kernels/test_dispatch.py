"""Choice of an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch


def able(x: jax.Array, *, more: float = 0.0) -> jax.Array:
    return x + 1 + more


def unable(x: jax.Array, *, more: float = 0.0) -> jax.Array:
    raise NotImplementedError("only on Tuesdays")


def broken(x: jax.Array, *, more: float = 0.0) -> jax.Array:
    raise ValueError("a wrong call")


ONE = jnp.float32(1)


def test_auto_takes_the_first_that_can() -> None:
    implementations = {"mosaic": unable, "xla": able, "reference": broken}
    assert float(dispatch.run("op", implementations, "auto", ONE, more=0.5)) == 2.5


def test_a_named_one_is_used_and_its_refusal_not_hidden() -> None:
    assert float(dispatch.run("op", {"mosaic": broken, "xla": able}, "xla", ONE)) == 2
    with pytest.raises(NotImplementedError, match="Tuesdays"):
        dispatch.run("op", {"mosaic": unable, "xla": able}, "mosaic", ONE)


def test_a_wrong_call_is_not_taken_for_a_refusal() -> None:
    with pytest.raises(ValueError, match="a wrong call"):
        dispatch.run("op", {"mosaic": broken, "xla": able}, "auto", ONE)


def test_when_none_can_each_reason_is_told() -> None:
    with pytest.raises(NotImplementedError) as caught:
        dispatch.run("op", {"mosaic": unable, "xla": unable}, "auto", ONE)
    assert str(caught.value) == (
        "op: no implementation can do these arguments: mosaic: only on Tuesdays; xla: only on Tuesdays"
    )
    assert isinstance(caught.value.__cause__, ExceptionGroup)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"op: implementation='quick' is none of \['auto', 'mosaic', 'cudnn', 'xla'"):
        dispatch.run("op", {"xla": able}, "quick", ONE)


def test_a_form_that_an_operation_lacks_is_no_wrong_call() -> None:
    with pytest.raises(NotImplementedError, match=r"op has no form named 'cudnn', only \['xla'\]"):
        dispatch.run("op", {"xla": able}, "cudnn", ONE)
