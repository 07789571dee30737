"""Prompts that may be refused: what lies on the device for them, and the verdicts under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxdual.cascade.probe import Probe, ProbeParameters
from jaxdual.engine.buckets import PrefillShape
from jaxdual.engine.device import Device
from jaxdual.engine.gated_programs import GatedPrograms


@dataclass(frozen=True, slots=True)
class Asked:
    """P(IK) of prompts under way: `rows` names the sequence of each row that is asked."""

    p_ik: jax.Array
    rows: tuple[tuple[int, int], ...]

    def fetch(self) -> Iterator[tuple[int, float]]:
        """Waits for the device; sequence and P(IK)."""
        values = np.asarray(self.p_ik)
        for row, seq_id in self.rows:
            yield seq_id, float(values[row])


class GatedPrefill:
    """Owns the probe and the stash of an engine on one device, and calls their programs.

    Args:
      device: of the engine.
      probe: of its model.
      num_pages: of its KV memory.
    """

    def __init__(self, device: Device, probe: Probe, num_pages: int) -> None:
        self._device = device
        self._programs = GatedPrograms(device.programs, probe.tap, device.layout.page_size)
        where = device.programs.slot_sharding
        self._probe: ProbeParameters = jax.device_put(probe.parameters, where)
        shape = num_pages, device.layout.page_size, probe.hidden_size
        self._stash = jnp.zeros(shape, device.layout.dtype, device=where)

    def lower(
        self,
        tokens: Int32[np.ndarray, "1 rows chunk"],
        starts: Int32[np.ndarray, "1 rows"],
        counts: Int32[np.ndarray, "1 rows"],
        slots: Int32[np.ndarray, "1 rows"],
    ) -> jax.Array:
        """Starts the lower layers of chunks: P(IK) at the last token of each."""
        device, programs = self._device, self._device.programs
        p_ik: jax.Array
        device.arenas, self._stash, p_ik = self._programs.lower(
            programs.leaves,
            self._probe,
            device.arenas,
            self._stash,
            tokens[0],
            starts[0],
            counts[0],
            device.group_tables(slots, tokens.shape[2]),
            experts=programs.experts,
        )
        return p_ik

    def upper(
        self,
        starts: Int32[np.ndarray, "1 rows"],
        counts: Int32[np.ndarray, "1 rows"],
        slots: Int32[np.ndarray, "1 rows"],
        chunk: int,
    ) -> jax.Array:
        """Starts the upper layers of chunks, padded to `chunk` tokens: residual stream of the last token of each."""
        device, programs = self._device, self._device.programs
        last: jax.Array
        device.arenas, self._stash, last = self._programs.upper(
            programs.leaves,
            device.arenas,
            self._stash,
            starts[0],
            counts[0],
            device.group_tables(slots, chunk),
            chunk=chunk,
            experts=programs.experts,
        )
        return last

    def warm_ups(self, shapes: Sequence[PrefillShape]) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of both programs in every shape, all on padding."""

        def lower(shape: PrefillShape) -> object:
            slots, empty = self._padding(shape)
            return self.lower(np.zeros((1, shape.rows, shape.chunk), np.int32), empty, empty, slots)

        def upper(shape: PrefillShape) -> object:
            slots, empty = self._padding(shape)
            return self.upper(empty, empty, slots, shape.chunk)

        for shape in shapes:
            yield f"lower rows={shape.rows} tokens={shape.chunk}", partial(lower, shape)
            yield f"upper rows={shape.rows} tokens={shape.chunk}", partial(upper, shape)

    def _padding(self, shape: PrefillShape) -> tuple[np.ndarray, np.ndarray]:
        slots = np.full((1, shape.rows), self._device.padding_slot, np.int32)
        return slots, np.zeros_like(slots)
