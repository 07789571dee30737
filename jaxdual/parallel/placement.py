"""The experts of a model on its devices, as a placement says, and their way from one placement to the next."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from jaxdual.parallel.exchange import ExpertSlots
from jaxdual.parallel.mesh import EXPERT, TENSOR, DeviceMesh
from jaxdual.scheduling.experts import Move, Placement, eplb, linear_placement
from models import Decoder, ModelConfig
from models.sharding import sharding_rule

STACKS = ("gate", "up", "down")


def first_placement(config: ModelConfig, mesh: DeviceMesh, redundant: int) -> Placement | None:
    """Where experts are before anything is known of their loads; None for a model without.

    Args:
      redundant: slots of each layer beyond one for each expert.
    """
    layers = len(config.sparse_layers)
    if config.moe is None or not layers:
        return None
    experts, devices = config.moe.num_experts, mesh.sizes.expert
    if not redundant:
        return linear_placement(layers, experts, devices)
    return eplb(np.ones((layers, experts)), devices, redundant=redundant)


def put_experts(model: Decoder, placement: Placement, mesh: DeviceMesh) -> None:
    """Puts experts, which are in order, into the slots of a placement; layer by layer, so that one is held twice."""
    order, rule = np.arange(placement.num_experts), sharding_rule(mesh.mesh, mesh.rules)
    for row, layer in enumerate(model.config.sparse_layers):
        held = placement.experts[row]
        if np.array_equal(held, order):
            continue
        experts = model.layers[layer].mlp.experts
        for name in STACKS:
            parameter: nnx.Param = getattr(experts, name)
            shape = (len(held), *parameter.shape[1:])
            target = rule(f"layers.{layer}.mlp.experts.{name}", shape)
            parameter.set_value(
                jax.jit(jnp.take, static_argnames="axis", out_shardings=target)(parameter[...], held, axis=0)
            )


def expert_slots(placement: Placement, mesh: DeviceMesh) -> list[ExpertSlots]:
    """What the steps are told of a placement: the slots of the experts of each layer that has some."""
    slots, copies = placement.slots_of()
    everywhere = mesh.sharding()

    def put(values: np.ndarray) -> jax.Array:
        # Unlike `device_put`, it doesn't have processes compare what they put.
        return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

    return [ExpertSlots(put(slots[row]), put(copies[row])) for row in range(len(slots))]


def move_sizes(slots: int) -> tuple[int, int]:
    """Moves of one layer that a program makes at most: few programs, whatever there is to move."""
    return (-(-slots // 4), slots)


class ExpertMover:
    """Copies weights of experts from slot to slot, one layer at a time, all at once within it.

    A program sends each expert to all devices along the expert axis, which keep what is for them; so memory for the
    moved experts of one layer is needed on each.

    Args:
      mesh: of the devices.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        gate = PartitionSpec(EXPERT, None, TENSOR)
        stacks = (gate, gate, PartitionSpec(EXPERT, TENSOR, None))
        whole = PartitionSpec()
        self._program = jax.jit(mesh.on_each(_move, (stacks, whole, whole), stacks), donate_argnums=0)

    def move(self, stacks: Sequence[jax.Array], moves: Sequence[Move], least: int = 0) -> Sequence[jax.Array]:
        """Starts the moves of a layer, whose stacks of gates, ups and downs are given up for the new ones.

        Args:
          least: moves that the program has room for, at least.
        """
        slots = stacks[0].shape[0]
        count = next(size for size in move_sizes(slots) if size >= max(len(moves), least))
        # What is behind the last slot is dropped.
        sources, targets = np.zeros(count, np.int32), np.full(count, slots, np.int32)
        sources[: len(moves)] = [move.source for move in moves]
        targets[: len(moves)] = [move.target for move in moves]
        moved: Sequence[jax.Array] = self._program(tuple(stacks), sources, targets)
        return moved


def _move(
    stacks: tuple[jax.Array, ...], sources: Int32[Array, " moves"], targets: Int32[Array, " moves"]
) -> tuple[jax.Array, ...]:
    first, own = jax.lax.axis_index(EXPERT) * stacks[0].shape[0], stacks[0].shape[0]
    here = (sources >= first) & (sources < first + own)
    at = targets - first
    at = jnp.where((at >= 0) & (at < own), at, own)

    def of_stack(stack: jax.Array) -> jax.Array:
        held = jnp.where(here[:, None, None], stack[jnp.clip(sources - first, 0, own - 1)], 0)
        return stack.at[at].set(jax.lax.psum(held, EXPERT), mode="drop")

    return tuple(of_stack(stack) for stack in stacks)
