"""Experts that lie on several devices: tokens travel to them and their results back, by all-to-all.

Each device sends a token at most once to each other device, however many of its experts are there. What it sends to one
device lies in a part of its own of the buffer, with room for all of its tokens, so nothing is ever left out. On GPUs
only the filled rows travel (`ragged_all_to_all`); a CPU, which has no such operation, sends whole parts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from jaxdual.parallel.mesh import EXPERT, RANKS, TENSOR, DeviceMesh
from models.moe import Experts
from pallas_kernels.grouped_matmul import gated_grouped_matmul, grouped_matmul

PASS_BYTES = 64 << 20  # of rows that go through a device's experts at a time
_ROWS = 128  # of a pass: a multiple of what a kernel's tile holds


class ExpertSlots(NamedTuple):
    """Where the experts of one layer are.

    Attributes:
      slots: `[experts, most]` slots that hold each expert; the slots of device d along the expert axis are
        `d * slots_per_device` and on.
      copies: `[experts]` how many of these there are.
    """

    slots: Int32[Array, "experts most"]
    copies: Int32[Array, " experts"]


def slots_of_choices(
    where: ExpertSlots, experts: Int32[Array, "T k"], real: Array, num_slots: int
) -> Int32[Array, "T k"]:
    """The slot that serves each choice: of several copies, tokens take one after another.

    Choices of padding get `num_slots`, which no device has.
    """
    turn = jnp.arange(experts.shape[0], dtype=jnp.int32)[:, None]
    copy = turn % where.copies[experts]
    chosen = where.slots[experts, copy]
    return jnp.where(real[:, None], chosen, num_slots)


class ExpertExchange:
    """Applies the experts of a layer, wherever they are.

    Args:
      mesh: whose expert axis they are split over.
      pass_bytes: of rows that go through a device's experts at a time.
    """

    def __init__(self, mesh: DeviceMesh, pass_bytes: int = PASS_BYTES) -> None:
        self._mesh, self._pass_bytes = mesh, pass_bytes
        self._ragged = mesh.platform != "cpu"

    def __call__(
        self,
        experts: Experts,
        x: Float[Array, "T D"],
        slots: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
    ) -> Float[Array, "T D"]:
        """Weighted sum of what the chosen experts make of each token.

        Args:
          experts: weights by slot, `[slots, ...]`.
          x: tokens, split over the ranks.
          slots: of each token's choices; `slots` or more for none.
          weights: of the choices.
        """
        rows, expert = PartitionSpec(RANKS, None), PartitionSpec(EXPERT, None, TENSOR)
        in_specs = (expert, expert, PartitionSpec(EXPERT, TENSOR, None), rows, rows, rows)
        stacks = (experts.gate[...], experts.up[...], experts.down[...])
        out: jax.Array = self._mesh.on_each(self._on_device, in_specs, rows)(*stacks, x, slots, weights)
        return out

    def _on_device(
        self,
        gate: Float[Array, "s D F"],
        up: Float[Array, "s D F"],
        down: Float[Array, "s F D"],
        x: Float[Array, "t D"],
        slots: Int32[Array, "t k"],
        weights: Float32[Array, "t k"],
    ) -> Float[Array, "t D"]:
        tokens, devices, own = x.shape[0], self._mesh.sizes.expert, gate.shape[0]
        if devices == 1:
            done = _apply((gate, up, down), x, slots, weights, self._pass_bytes)
            alone: Array = jax.lax.psum(done, TENSOR).astype(x.dtype)
            return alone
        goes = jnp.any(slots[:, None, :] // own == jnp.arange(devices)[None, :, None], axis=2)  # [t, devices]
        counts = goes.sum(axis=0, dtype=jnp.int32)
        # Place of a token among those that go to a device; what doesn't go there is put past the end and dropped.
        place = jnp.where(goes, jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1, tokens)
        at = (jnp.arange(devices)[None, :], place)

        def parts(values: Array, fill: int) -> Array:
            empty = jnp.full((devices, tokens, values.shape[1]), fill, values.dtype)
            return empty.at[at].set(values[:, None, :], mode="drop")

        received = self._all_to_all(parts(x, 0), counts)
        # All choices travel along, as small as they are; a device picks those that are its own.
        choices = self._all_to_all(parts(slots, devices * own), counts, fill=devices * own)
        shares = self._all_to_all(parts(weights, 0), counts)
        mine = choices.reshape(devices * tokens, -1) - jax.lax.axis_index(EXPERT) * own
        mine = jnp.where((mine >= 0) & (mine < own), mine, own)
        done = _apply(
            (gate, up, down),
            received.reshape(devices * tokens, -1),
            mine,
            shares.reshape(devices * tokens, -1),
            self._pass_bytes,
        )
        done = jax.lax.psum(done, TENSOR).astype(x.dtype).reshape(devices, tokens, -1)
        back = self._all_to_all(done, counts, returns=True)
        gathered = jnp.where(goes[:, :, None], back.at[at].get(mode="fill", fill_value=0), 0)
        return gathered.astype(jnp.float32).sum(axis=1).astype(x.dtype)

    def _all_to_all(
        self, parts: Array, counts: Int32[Array, " devices"], *, fill: int = 0, returns: bool = False
    ) -> Array:
        """Part d of each device to device d, where it becomes the part of the sender's number.

        Args:
          parts: `[devices, rows, ...]`.
          counts: filled rows of each part as they were first sent; those of the answers are the others'.
          fill: what rows that are not filled hold.
          returns: whether these are the answers.
        """
        if not self._ragged:
            moved: Array = jax.lax.all_to_all(parts, EXPERT, split_axis=0, concat_axis=0)
            return moved
        devices, rows = parts.shape[:2]
        others = jax.lax.all_to_all(counts, EXPERT, split_axis=0, concat_axis=0, tiled=True)
        sent, expected = (others, counts) if returns else (counts, others)
        starts = jnp.arange(devices, dtype=jnp.int32) * rows
        there = jnp.full(devices, jax.lax.axis_index(EXPERT) * rows, jnp.int32)
        flat = parts.reshape(devices * rows, *parts.shape[2:])
        moved = jax.lax.ragged_all_to_all(
            flat, jnp.full_like(flat, fill), starts, sent, there, expected, axis_name=EXPERT
        )
        received: Array = moved.reshape(parts.shape)
        return received


def _apply(
    experts: tuple[Array, Array, Array],
    x: Float[Array, "R D"],
    slots: Int32[Array, "R k"],
    weights: Float32[Array, "R k"],
    pass_bytes: int,
) -> Float32[Array, "R D"]:
    """Weighted sums over a device's own slots; choices of `own`, the number of its slots, are others'.

    Choices are sorted by slot, a device's own first. As many of them go through the experts at a time as `pass_bytes`
    hold, in one pass if that is all there could be: mostly few are a device's own, and room for all would be wasted.
    """
    own = experts[0].shape[0]
    most = min(slots.shape[1], own)
    if most < slots.shape[1]:  # a token's own choices are different slots, so no more than these
        order = jnp.argsort(slots, axis=1)[:, :most]
        slots, weights = (jnp.take_along_axis(values, order, axis=1) for values in (slots, weights))
    shares = jnp.where(slots < own, weights, 0).astype(jnp.float32)
    flat = slots.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32)).reshape(slots.shape)
    ends = jnp.cumsum(jnp.bincount(flat, length=own + 1)[:own]).astype(jnp.int32)
    room = max(pass_bytes // (x.shape[1] * x.dtype.itemsize) // _ROWS * _ROWS, _ROWS)

    def one_pass(first: int | Int32[Array, ""], count: int) -> Float32[Array, "R D"]:
        """What the choices number `first` to `first + count` add to each row."""
        inside = jnp.clip(ends - first, 0, count)
        rows = x[jax.lax.dynamic_slice_in_dim(order, first, count) // most]
        done = _mlp(experts, rows, jnp.diff(inside, prepend=0))
        # One choice of every row at a time, so that no array of all choices is made.
        total = jnp.zeros(x.shape, jnp.float32)
        for choice in range(most):
            at = places[:, choice] - first
            share = jnp.where((at >= 0) & (at < count), shares[:, choice], 0)
            total += share[:, None] * done[jnp.clip(at, 0, count - 1)].astype(jnp.float32)
        return total

    if flat.size <= room:
        return one_pass(0, flat.size)
    # The last pass may begin past the end of what is sorted.
    order = jnp.pad(order, (0, room))

    def add(number: Int32[Array, ""], total: Float32[Array, "R D"]) -> Float32[Array, "R D"]:
        return total + one_pass(number * room, room)

    summed: Array = jax.lax.fori_loop(0, -(-ends[-1] // room), add, jnp.zeros(x.shape, jnp.float32))
    return summed


def _mlp(
    experts: tuple[Array, Array, Array], rows: Float[Array, "M D"], sizes: Int32[Array, " s"]
) -> Float[Array, "M D"]:
    gate, up, down = experts
    inner = gated_grouped_matmul(rows, gate, up, sizes)
    done: Array = grouped_matmul(inner, down, sizes)
    return done
