"""Where the experts of each layer lie: packing by load, copies of the busiest, pools of those that follow each other.

"EPLB" is DeepSeek's algorithm: experts of a layer are packed by descending load, each onto the lightest device that has
a slot left, after the busiest were given copies. "EDR" is Algorithm 3 of arXiv 2602.21626: experts that often follow
each other in neighbouring layers (the pool) lie on one device, and stay there; the others are packed by load.

Arrays: loads `[layers, experts]`, transitions `[layers - 1, experts, experts]` (from expert i of a layer to j of the
next), placements `[layers, slots]`, where the slots of device d are `d * slots_per_device` and on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAIR_SHARE = 0.43  # of all tokens, from which a pair of experts belongs to the pool: the paper's 100,000 of 230,400
TOP_EDGES = 64  # pairs of the pool where no pair is that frequent
INTERVAL = 3000  # steps between relocations: tau of the paper


@dataclass(frozen=True, slots=True)
class Placement:
    """Which expert each slot holds.

    Attributes:
      experts: `[layers, slots]`, the expert in each slot; all are there at least once in every layer.
      devices: that the slots are split over, evenly and in order.
      num_experts: of a layer.

    Raises:
      ValueError: slots that can't be split so, or an expert that is missing.
    """

    experts: np.ndarray
    devices: int
    num_experts: int

    def __post_init__(self) -> None:
        slots = self.experts.shape[1]
        if self.devices < 1 or slots % self.devices:
            raise ValueError(f"{slots} slots can't be split over {self.devices} devices")
        for layer, row in enumerate(self.experts):
            missing = np.setdiff1d(np.arange(self.num_experts), row)
            if missing.size or row.min() < 0 or row.max() >= self.num_experts:
                raise ValueError(f"layer {layer} has no slot for experts {missing.tolist()} of {self.num_experts}")

    @property
    def slots_per_device(self) -> int:
        return int(self.experts.shape[1]) // self.devices

    @property
    def device_of_slot(self) -> np.ndarray:
        return np.arange(self.experts.shape[1], dtype=np.int32) // self.slots_per_device

    def device_shares(self) -> np.ndarray:
        """`[layers, experts, devices]`: part of an expert's tokens on each device, if its copies share them evenly."""
        shares = np.zeros((len(self.experts), self.num_experts, self.devices))
        np.add.at(shares, (np.arange(len(self.experts))[:, None], self.experts, self.device_of_slot[None, :]), 1.0)
        evenly: np.ndarray = shares / self.copies()[:, :, None]
        return evenly

    def copies(self) -> np.ndarray:
        """`[layers, experts]`: how many slots hold each."""
        counts = np.zeros((len(self.experts), self.num_experts), np.int32)
        np.add.at(counts, (np.arange(len(self.experts))[:, None], self.experts), 1)
        return counts

    def devices_of(self) -> np.ndarray:
        """`[layers, experts]`: the device of each, of several copies the first one's."""
        found = np.full((len(self.experts), self.num_experts), self.devices, np.int32)
        np.minimum.at(found, (np.arange(len(self.experts))[:, None], self.experts), self.device_of_slot[None, :])
        return found

    def slots_of(self) -> tuple[np.ndarray, np.ndarray]:
        """The slots of each expert, ascending, padded with the first to as many as it can have; and how many it has."""
        counts = self.copies()
        slots = np.zeros((*counts.shape, 1 + self.experts.shape[1] - self.num_experts), np.int32)
        for layer, row in enumerate(self.experts):
            filled = np.zeros(self.num_experts, np.int32)
            for slot, expert in enumerate(row):
                if not filled[expert]:
                    slots[layer, expert] = slot
                slots[layer, expert, filled[expert]] = slot
                filled[expert] += 1
        return slots, counts


def linear_placement(layers: int, experts: int, devices: int) -> Placement:
    """Experts in order, without copies: what a model has before anything is known of its router.

    Raises:
      ValueError: the experts can't be split evenly.
    """
    return Placement(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), devices, experts)


def pack(
    weights: np.ndarray,
    packs: int,
    *,
    capacity: int | None = None,
    loads: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Items by descending weight (of equal ones the lower number first), each into the lightest pack with room.

    Args:
      weights: `[items]`.
      packs: how many.
      capacity: items that a pack holds; an equal part of all where left out.
      loads, counts: `[packs]`, weight and items that each has already.

    Returns:
      `[items]`: the pack of each.

    Raises:
      ValueError: the items don't fit.
    """
    load = np.zeros(packs) if loads is None else loads.astype(float)
    count = np.zeros(packs, np.int32) if counts is None else counts.copy()
    room = len(weights) // packs if capacity is None else capacity
    if (room - count).sum() < len(weights) or (room < count).any():
        raise ValueError(f"{len(weights)} items don't fit into {packs} packs of {room} that hold {count.tolist()}")
    chosen = np.zeros(len(weights), np.int32)
    for item in np.argsort(-weights, kind="stable"):
        pack_of_item = int(np.argmin(np.where(count < room, load, np.inf)))
        chosen[item] = pack_of_item
        load[pack_of_item] += weights[item]
        count[pack_of_item] += 1
    return chosen


def replicate(weights: np.ndarray, slots: int) -> np.ndarray:
    """Experts for `slots` slots: each once, then one more of whichever has the greatest load for each of its copies.

    Raises:
      ValueError: fewer slots than experts.
    """
    if slots < len(weights):
        raise ValueError(f"{slots} slots can't hold {len(weights)} experts")
    copies = np.ones(len(weights))
    chosen = np.empty(slots, np.int32)
    chosen[: len(weights)] = np.arange(len(weights))
    for slot in range(len(weights), slots):
        chosen[slot] = np.argmax(weights / copies)
        copies[chosen[slot]] += 1
    return chosen


def eplb(loads: np.ndarray, devices: int, *, redundant: int = 0, groups: int = 1, nodes: int = 1) -> Placement:
    """Balances loads layer by layer.

    Where the groups of experts can be split evenly over the nodes, groups are packed onto nodes, experts copied within
    a node and packed onto its devices, so that a router that is limited to some groups reaches few nodes; otherwise
    all devices are one node.

    Args:
      devices: that share each layer's experts.
      redundant: slots of a layer beyond one for each expert.
      groups: of experts, of equal size, as the router has them.
      nodes: that the devices are on, evenly.

    Raises:
      ValueError: sizes that can't be divided.
    """
    layers, experts = loads.shape
    slots = experts + redundant
    for total, what, parts in ((slots, "slots", devices), (devices, "devices", nodes), (experts, "experts", groups)):
        if total % parts:
            raise ValueError(f"{total} {what} can't be divided by {parts}")
    if groups % nodes:
        groups, nodes = 1, 1
    placed = np.empty((layers, slots), np.int32)
    for layer in range(layers):
        weights, at = loads[layer].astype(float), 0
        group_loads = weights.reshape(groups, -1).sum(axis=1)
        node_of_group = pack(group_loads, nodes)
        for node in range(nodes):
            members = np.flatnonzero(node_of_group[np.arange(experts) // (experts // groups)] == node)
            held = members[replicate(weights[members], slots // nodes)]
            copies = np.bincount(held, minlength=experts)
            device_of = pack(weights[held] / copies[held], devices // nodes)
            placed[layer, at : at + len(held)] = held[np.argsort(device_of, kind="stable")]
            at += len(held)
    return Placement(placed, devices, experts)


@dataclass(frozen=True, slots=True)
class Pool:
    """Experts of each layer that often follow one another.

    Attributes:
      experts: `[layers, experts]`, whether each belongs to it.
      edges: pairs of neighbouring layers that made it.
      threshold: the part of all tokens that the rarest of these pairs had; 0 where there is no pair.
    """

    experts: np.ndarray
    edges: int
    threshold: float


def build_pool(
    transitions: np.ndarray,
    tokens: float,
    capacity: int,
    *,
    share: float = PAIR_SHARE,
    top_edges: int = TOP_EDGES,
) -> Pool:
    """Pairs that at least `share` of all tokens take, or the `top_edges` most frequent ones where there are none.

    The rarest pairs are left out again until no layer has more pooled experts than one device has slots.

    Args:
      transitions: `[layers - 1, experts, experts]` counts.
      tokens: that were counted.
      capacity: slots of a layer on the pool's device.
    """
    gaps, experts, _ = transitions.shape
    flat = transitions.reshape(-1)
    order = np.argsort(-flat, kind="stable")
    frequent = int((flat >= share * tokens).sum()) if tokens else 0
    order = order[: frequent or min(top_edges, int((flat > 0).sum()))]
    pooled, used = np.zeros((gaps + 1, experts), bool), 0
    # Pairs as frequent as one another belong to it together or not at all.
    for count in dict.fromkeys(flat[order].tolist()):
        edges = order[used:][flat[order[used:]] == count]
        gap, (before, after) = edges // experts**2, np.divmod(edges % experts**2, experts)
        tried = pooled.copy()
        tried[gap, before] = tried[gap + 1, after] = True
        if tried.sum(axis=1).max() > capacity:
            break
        pooled, used = tried, used + len(edges)
    rarest = float(flat[order[used - 1]] / tokens) if used and tokens else 0.0
    return Pool(pooled, used, rarest)


def edr(loads: np.ndarray, pool: np.ndarray, devices: int, *, anchor: int = 0) -> Placement:
    """Algorithm 3: pooled experts on the anchor, the others by descending load onto the lightest device with a slot.

    The paper leaves out that devices have slots for an equal part of the experts; its formal problem has it.

    Args:
      pool: `[layers, experts]`, whether each expert is pooled; none makes this `eplb` without copies.
      devices: that share each layer's experts.
      anchor: the device of the pool.

    Raises:
      ValueError: sizes that can't be divided, no such device, or more pooled experts than its slots.
    """
    layers, experts = loads.shape
    if experts % devices or not 0 <= anchor < devices:
        raise ValueError(f"{experts} experts, {devices} devices and {anchor=} don't go together")
    capacity = experts // devices
    placed = np.empty((layers, experts), np.int32)
    for layer in range(layers):
        pinned = np.flatnonzero(pool[layer])
        others = np.flatnonzero(~pool[layer])
        start = np.zeros(devices)
        start[anchor] = loads[layer, pinned].sum()
        counts = np.zeros(devices, np.int32)
        counts[anchor] = len(pinned)
        device_of = np.full(experts, anchor, np.int32)
        device_of[others] = pack(
            loads[layer, others].astype(float), devices, capacity=capacity, loads=start, counts=counts
        )
        placed[layer] = np.argsort(device_of, kind="stable")
    return Placement(placed, devices, experts)


def by_column(loads: np.ndarray, pool: np.ndarray, devices: int, *, anchor: int = 0) -> Placement:
    """`edr` with one assignment for all layers, as the paper's formal problem has it: expert j of every layer lies on
    one device.

    Raises:
      ValueError: as `edr`, of the pools of all layers together.
    """
    column = edr(loads.sum(axis=0, keepdims=True), pool.any(axis=0, keepdims=True), devices, anchor=anchor)
    return Placement(np.repeat(column.experts, len(loads), axis=0), devices, column.num_experts)


def by_source(sources: np.ndarray, *, balance: float = 1.0, locality: float = 1.0) -> Placement:
    """Experts near the engines whose tokens choose them, as far as the balance allows.

    Greedy, by descending load: each expert goes to the device with a slot where `balance` times the device's load so
    far, less `locality` times the tokens of its own that it saves from travelling, is least.

    Args:
      sources: `[layers, devices, experts]`, tokens of each device's engine that chose each expert.
    """
    layers, devices, experts = sources.shape
    capacity = experts // devices
    if experts % devices:
        raise ValueError(f"{experts} experts can't be split over {devices} devices")
    placed = np.empty((layers, experts), np.int32)
    for layer in range(layers):
        weights = sources[layer].sum(axis=0).astype(float)
        load, count, device_of = np.zeros(devices), np.zeros(devices, np.int32), np.zeros(experts, np.int32)
        for expert in np.argsort(-weights, kind="stable"):
            cost = balance * load - locality * sources[layer, :, expert]
            device = int(np.argmin(np.where(count < capacity, cost, np.inf)))
            device_of[expert] = device
            load[device] += weights[expert]
            count[device] += 1
        placed[layer] = np.argsort(device_of, kind="stable")
    return Placement(placed, devices, experts)


def keep_slots(old: Placement, new: Placement) -> Placement:
    """The new placement, with each expert that stays on a device in the slot that it had there.

    Raises:
      ValueError: placements of different shapes.
    """
    if old.experts.shape != new.experts.shape or old.devices != new.devices:
        raise ValueError(f"placements of {old.experts.shape} and {new.experts.shape} slots can't be compared")
    size = new.slots_per_device
    kept = np.full_like(new.experts, -1)
    for layer in range(len(kept)):
        for device in range(new.devices):
            part = slice(device * size, (device + 1) * size)
            wanted = list(new.experts[layer, part])
            row = kept[layer, part]
            for slot, expert in enumerate(old.experts[layer, part]):
                if expert in wanted:
                    row[slot] = expert
                    wanted.remove(expert)
            row[row < 0] = wanted
    return Placement(kept, new.devices, new.num_experts)


@dataclass(frozen=True, slots=True)
class Move:
    """One expert's weights into one slot, from a slot that holds them before anything moves."""

    layer: int
    expert: int
    source: int
    target: int


def moves(old: Placement, new: Placement) -> list[Move]:
    """What must be copied to come from one placement to another, nearest copies first as sources."""
    return list(_moves(old, new))


def _moves(old: Placement, new: Placement) -> Iterator[Move]:
    device = old.device_of_slot
    for layer in range(len(old.experts)):
        for target in np.flatnonzero(old.experts[layer] != new.experts[layer]):
            expert = int(new.experts[layer, target])
            sources = np.flatnonzero(old.experts[layer] == expert)
            near = sources[device[sources] == device[target]]
            yield Move(layer, expert, int((near if near.size else sources)[0]), int(target))


@dataclass(frozen=True, slots=True)
class MigrationCost:
    """What moving takes.

    Attributes:
      copies: experts that are written somewhere.
      bytes_between: of weights that go from one device to another.
      most_received: bytes, by the device that receives most.
      stall_seconds: while nothing else runs, at the given bandwidth.
    """

    copies: int
    bytes_between: int
    most_received: int
    stall_seconds: float


def migration_cost(planned: Sequence[Move], placement: Placement, expert_bytes: int, bandwidth: float) -> MigrationCost:
    """Bytes and time of moves.

    Args:
      planned: from `moves`.
      placement: either of the two.
      expert_bytes: of one expert's weights in one layer.
      bandwidth: bytes per second that a device receives.
    """
    device = placement.device_of_slot
    received = np.zeros(placement.devices, np.int64)
    for move in planned:
        if device[move.source] != device[move.target]:
            received[device[move.target]] += expert_bytes
    most = int(received.max(initial=0))
    return MigrationCost(len(planned), int(received.sum()), most, most / bandwidth)
