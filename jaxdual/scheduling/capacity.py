"""How many prefill and decode nodes keep the storage NICs the bottleneck (DualPath 4.2), and what a run moves where.

Flows have the step numbers of the paper's Figure 4. PE1: storage to the prefill node, PE2: into its memory, PE3, PE4:
on to the prefill GPU, PE5 to PE7: from there to the decode node's memory, PE8, PE9: on to the decode GPU. DE1: storage
to the decode node, DE2: into its memory, DE3 to DE5: on to the prefill GPU, DE6, DE7: to the decode GPU. Every byte
into or out of a GPU passes its compute NIC, which reads one memory and writes the other; "read" and "write" below are
the NIC's view.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxdual.scheduling.quota import AttentionShape
from jaxdual.scheduling.read_side import ReadSide


@dataclass(frozen=True, slots=True)
class NodeRates:
    """Hardware of one node; all nodes are alike.

    Attributes:
      gpus: g, each with one compute NIC.
      nic: B, bytes per second and direction of one compute NIC.
      storage: s, bytes per second that the node reads from the store, in units of B.
      dram: M, bytes per second of the node's memory, reads and writes together.

    Raises:
      ValueError: a number is not positive.
    """

    gpus: int = 8
    nic: float = 50e9
    storage: float = 1.0
    dram: float = 500e9

    def __post_init__(self) -> None:
        if min(self.gpus, self.nic, self.storage, self.dram) <= 0:
            raise ValueError(f"{self} must have positive numbers only")

    @property
    def read_rate(self) -> float:
        """s * B: bytes per second that the node reads from the store."""
        return self.storage * self.nic


@dataclass(frozen=True, slots=True)
class Loads:
    """Bytes per second of each compute NIC by direction, and of each node's memory, while all nodes read at full rate.

    Balanced tasks, hit KV only: without miss KV, persistence and collectives.
    """

    prefill_nic_read: float
    prefill_nic_write: float
    decode_nic_read: float
    decode_nic_write: float
    prefill_dram: float
    decode_dram: float


def loads(prefill_nodes: int, decode_nodes: int, rates: NodeRates) -> Loads:
    """Loads of every resource (DualPath 4.2).

    Raises:
      ValueError: a number of nodes is below 1.
    """
    _check_nodes(prefill_nodes, decode_nodes)
    total, gpus = rates.read_rate, rates.gpus
    ratio = prefill_nodes / decode_nodes
    per_nic = total / gpus
    return Loads(
        prefill_nic_read=2 * per_nic,  # PE3, PE5
        prefill_nic_write=per_nic * (1 + 1 / ratio),  # PE4, DE5
        decode_nic_read=per_nic * (ratio + 2),  # PE8, DE3, DE6
        decode_nic_write=per_nic * (2 * ratio + 1),  # PE7, PE9, DE7
        prefill_dram=2 * total,  # PE2, PE3
        decode_dram=(3 + 2 * ratio) * total,  # PE7, PE8, DE2, DE3, DE6
    )


def overloaded(prefill_nodes: int, decode_nodes: int, rates: NodeRates) -> tuple[str, ...]:
    """Resources, named as in `Loads`, that can't carry what the storage NICs read: those whose condition fails.

    They are conditions (1), (2), (4), (6) and (8) of DualPath 4.2, and that of the prefill node's memory, which the
    paper takes for granted. A resource that is just full is not among them.
    """
    found = loads(prefill_nodes, decode_nodes, rates)
    limits = {"prefill_dram": rates.dram, "decode_dram": rates.dram}
    exceeds = 1 + 1e-12  # a resource that is exactly full may round to either side
    return tuple(f.name for f in fields(found) if getattr(found, f.name) > exceeds * limits.get(f.name, rates.nic))


@dataclass(frozen=True, slots=True)
class RatioInterval:
    """Prefill nodes per decode node for which only the storage NICs are full; empty if `low > high`."""

    low: float
    high: float

    @property
    def is_empty(self) -> bool:
        return self.low > self.high


def allowed_ratio(rates: NodeRates) -> RatioInterval:
    """Condition (9): `s/(g-s) <= P/D <= min((g-2s)/s, (g-s)/(2s), (M/(Bs)-3)/2)`, of which the parts are (3), (5), (7)
    and (8).

    With `s > g/2` no ratio is allowed: (5) is then negative, which stands for (1) too (the paper's text has `s <= g`).
    """
    g, s = rates.gpus, rates.storage
    if s >= g:
        return RatioInterval(float("inf"), 0.0)
    return RatioInterval(
        low=s / (g - s),
        high=min((g - 2 * s) / s, (g - s) / (2 * s), (rates.dram / rates.read_rate - 3) / 2),
    )


def speedup_ceiling(prefill_nodes: int, decode_nodes: int) -> float:
    """`(P + D) / P`: how much faster a run can get that only storage reads limit, when decode nodes read too.

    Raises:
      ValueError: a number of nodes is below 1.
    """
    _check_nodes(prefill_nodes, decode_nodes)
    return (prefill_nodes + decode_nodes) / prefill_nodes


def _check_nodes(prefill_nodes: int, decode_nodes: int) -> None:
    if prefill_nodes < 1 or decode_nodes < 1:
        raise ValueError(f"{prefill_nodes=} and {decode_nodes=} must be at least 1")


@dataclass(frozen=True, slots=True)
class ResourceBytes:
    """Bytes through each kind of resource, summed over all nodes: what the byte counters of a run must show.

    Attributes:
      prefill_store_read, decode_store_read: storage NICs, from the store.
      decode_store_write: storage NICs, to the store.
      prefill_nic_read, prefill_nic_write, decode_nic_read, decode_nic_write: compute NICs on their memory side.
      prefill_dram, decode_dram: node memory, reads and writes together.
      to_decode, to_prefill: the network between compute NICs, in each direction.
    """

    prefill_store_read: int = 0
    decode_store_read: int = 0
    decode_store_write: int = 0
    prefill_nic_read: int = 0
    prefill_nic_write: int = 0
    decode_nic_read: int = 0
    decode_nic_write: int = 0
    prefill_dram: int = 0
    decode_dram: int = 0
    to_decode: int = 0
    to_prefill: int = 0

    def __add__(self, other: ResourceBytes) -> ResourceBytes:
        return ResourceBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def path_bytes(side: ReadSide, hit: int, miss: int) -> ResourceBytes:
    """Bytes that requests read on one side move until they decode (DualPath 4.1, Figure 4).

    For a request that both sides read, add the two, with its miss bytes in one of them.

    Args:
      side: which side reads the hit KV from the store.
      hit: bytes of hit KV, all layers.
      miss: bytes of KV that prefill computes, all layers. The paper's analysis leaves it out.
    """
    prompt = hit + miss
    if side is ReadSide.PREFILL:
        return ResourceBytes(
            prefill_store_read=hit,  # PE1
            prefill_nic_read=hit + prompt,  # PE3, PE5
            prefill_nic_write=hit,  # PE4
            decode_nic_read=prompt,  # PE8
            decode_nic_write=prompt + prompt,  # PE7, PE9
            prefill_dram=hit + hit,  # PE2, PE3
            decode_dram=prompt + prompt,  # PE7, PE8
            to_decode=prompt,  # PE6
        )
    return ResourceBytes(
        decode_store_read=hit,  # DE1
        prefill_nic_read=miss,  # return of the miss KV
        prefill_nic_write=hit,  # DE5
        decode_nic_read=hit + prompt,  # DE3, DE6
        decode_nic_write=miss + prompt,  # return, DE7
        decode_dram=hit + hit + miss + prompt,  # DE2, DE3, return, DE6
        to_decode=miss,
        to_prefill=hit,  # DE4
    )


def restream_bytes(buffer: ReadSide, streamed: int) -> ResourceBytes:
    """Bytes that later chunks of a prompt move again under layerwise prefill, which keeps no layer on the GPU.

    Args:
      buffer: whose memory the earlier KV comes from. The decode side has all of it on both paths; the prefill side has
        the hit KV that it read itself.
      streamed: bytes of KV streamed to the prefill GPU for second and later chunks, all layers.
    """
    if buffer is ReadSide.PREFILL:
        return ResourceBytes(prefill_nic_read=streamed, prefill_nic_write=streamed, prefill_dram=streamed)
    return ResourceBytes(
        decode_nic_read=streamed, prefill_nic_write=streamed, decode_dram=streamed, to_prefill=streamed
    )


def persist_bytes(from_gpu: int, from_buffer: int = 0) -> ResourceBytes:
    """Bytes that writing new KV to the store moves, on the decode side.

    Args:
      from_gpu: bytes that leave the decode GPU for the node's memory first, through the compute NIC.
      from_buffer: bytes that are in the node's memory already, as the prompt's before its buffer is freed.
    """
    written = from_gpu + from_buffer
    return ResourceBytes(
        decode_store_write=written,
        decode_nic_read=from_gpu,
        decode_nic_write=from_gpu,
        decode_dram=from_gpu + written,
    )


def cache_compute_ratio(
    context: int, append: int, kv_token_bytes: int, active_parameters: float, attention: AttentionShape
) -> float:
    """GB of KV to load for each PFLOP of prefill (DualPath Table 1; the paper prints no formula).

    Args:
      context: tokens before the appended ones.
      append: tokens to compute.
      kv_token_bytes: KV of one token, all layers.
      active_parameters: that a token passes through; each takes 2 operations.
      attention: taken at the full context for each appended token.
    """
    flops = append * (2 * active_parameters + attention.token_flops(context))
    return context * kv_token_bytes / 1e9 / (flops / 1e15)
