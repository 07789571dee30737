"""Blocks that are written straight into KV memory, behind XLA's back, where the host can address it: on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxdual.config import ConfigError, EngineConfig


def lands_directly(config: EngineConfig) -> bool:
    """Whether blocks are to be written straight into KV memory.

    Raises:
      ConfigError: it can't be done on this device.
    """
    if config.kv_landing == "direct" and jax.default_backend() != "cpu":
        raise ConfigError(
            f"kv_landing='direct' needs KV memory that the host can address; that of {jax.default_backend()} is not"
        )
    return config.kv_landing == "direct"


class DirectLanding:
    """A copy without a program, without padding, and without memory of its own: several times as fast as a scatter.

    XLA orders nothing here. So a page may only be written when no program is under way any more that writes it, or
    reads it: the last owner's last step, or a copy off the device. And since every program that is dispatched later
    takes the arena over, it finds what was written.

    Args:
      block_shapes: of each layer group.
      check_arenas: raises if an arena is not where it was, where what was written would be lost.
    """

    def __init__(self, block_shapes: Sequence[tuple[int, ...]], check_arenas: Callable[[], None]) -> None:
        self._block_shapes = tuple(block_shapes)
        self._check_arenas = check_arenas
        self._reading: list[jax.Array] = []

    def reads(self, blocks: jax.Array) -> None:
        """A program is under way that copies blocks off the device."""
        self._reading = [one for one in self._reading if not one.is_ready()]  # type: ignore[attr-defined]
        self._reading.append(blocks)

    def land(
        self, arenas: Sequence[jax.Array], group: int, pages: Sequence[int], host: np.ndarray, slots: Sequence[int]
    ) -> None:
        """Copies blocks of host memory into pages of a group's arena.

        Args:
          arenas: what the last program has made of them.
          host: `[slots, *block_shape]`.
        """
        jax.block_until_ready((arenas, self._reading))
        self._reading.clear()
        self._check_arenas()
        arena = arenas[group]
        memory = (ctypes.c_ubyte * arena.nbytes).from_address(arena.unsafe_buffer_pointer())
        blocks = np.frombuffer(memory, arena.dtype).reshape(-1, *self._block_shapes[group])
        for page, slot in zip(pages, slots, strict=True):
            np.copyto(blocks[page], host[slot])
