"""Checks of arguments that the operations share: `ValueError` with what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_array(name: str, array: Any, dtype: Any, shape: Sequence[int | str]) -> None:
    """Raises `ValueError` for anything but an array of this type and shape.

    Args:
      name: of the argument.
      dtype: exactly this type, or any of a kind such as `jnp.floating`; None for any.
      shape: sizes; a name stands for any size.
    """
    if (
        not isinstance(array, jax.Array | np.ndarray)
        or not (dtype is None or jnp.issubdtype(array.dtype, dtype))
        or array.ndim != len(shape)
        or any(size != wanted for size, wanted in zip(array.shape, shape, strict=True) if not isinstance(wanted, str))
    ):
        kind = "any" if dtype is None else dtype.__name__ if isinstance(dtype, type) else jnp.dtype(dtype).name
        raise ValueError(f"{name} must be {kind}[{', '.join(map(str, shape))}]: {show(array)}")


def show(value: Any) -> str:
    """Type and shape of an array; anything else as it is written."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    return f"{value.dtype}{list(value.shape)}" if is_array else repr(value)
