"""Which side reads a request's hit KV from the store (DualPath 6.1 and 8)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ReadSide(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class ReadPolicy(Enum):
    """How the side is chosen; `NONE` reads nothing at all (the paper's Oracle)."""

    SHORTER_QUEUE = "shorter queue"
    ROUND_ROBIN = "round robin"
    PREFILL_ONLY = "prefill only"
    DECODE_ONLY = "decode only"
    SPLIT = "split"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Hit tokens that each side reads: the prefill side the first ones, the decode side those that follow."""

    prefill_tokens: int = 0
    decode_tokens: int = 0


class ReadChooser:
    """Chooses the side of one request after another.

    Queues are compared in tokens, since all nodes read at the same rate. A tie goes to the decode side: there a token
    that was read crosses the compute NICs' PCIe links four times instead of six, and no memory of the prefill node.

    Args:
      policy: how.
      block_tokens: tokens of a stored block, which one side reads whole.
    """

    def __init__(self, policy: ReadPolicy, block_tokens: int = 64) -> None:
        if block_tokens < 1:
            raise ValueError(f"{block_tokens=} must be at least 1")
        self.policy = policy
        self.block_tokens = block_tokens
        self._last: dict[tuple[int, int], ReadSide] = {}  # of each pair of nodes, by turns

    def choose(
        self, hit_tokens: int, prefill_queue: int, decode_queue: int, nodes: tuple[int, int] = (0, 0)
    ) -> ReadPlan:
        """Who reads a request's hit tokens.

        Args:
          hit_tokens: tokens to read.
          prefill_queue, decode_queue: tokens that the nodes of both its engines have yet to read.
          nodes: these two. Each pair has turns of its own: engines are chosen in turn, too, and with one turn for all,
            of two pairs one would read on the prefill side only and the other on the decode side only.
        """
        if hit_tokens == 0 or self.policy is ReadPolicy.NONE:
            return ReadPlan()
        if self.policy is ReadPolicy.SPLIT:
            return split_read(hit_tokens, prefill_queue, decode_queue, self.block_tokens)
        if self._side(prefill_queue, decode_queue, nodes) is ReadSide.PREFILL:
            return ReadPlan(prefill_tokens=hit_tokens)
        return ReadPlan(decode_tokens=hit_tokens)

    def _side(self, prefill_queue: int, decode_queue: int, nodes: tuple[int, int]) -> ReadSide:
        if self.policy is ReadPolicy.ROUND_ROBIN:
            side = ReadSide.DECODE if self._last.get(nodes) is ReadSide.PREFILL else ReadSide.PREFILL
            self._last[nodes] = side
            return side
        if self.policy is ReadPolicy.SHORTER_QUEUE:
            return ReadSide.PREFILL if prefill_queue < decode_queue else ReadSide.DECODE
        return ReadSide.PREFILL if self.policy is ReadPolicy.PREFILL_ONLY else ReadSide.DECODE


def split_read(hit_tokens: int, prefill_queue: int, decode_queue: int, block_tokens: int) -> ReadPlan:
    """Divides a read between both sides so that its last block is there as early as possible.

    Both queues then end within a block of each other, unless one of them is longer than the other with all of this
    read. A step beyond the paper, which reads a request on one side and names this as future work (DualPath 8).

    Args:
      hit_tokens: tokens to read, at least 1; only the last block may be a part of one.
      prefill_queue, decode_queue: tokens that each side has to read before.
      block_tokens: tokens of a block, which one side reads whole.
    """
    blocks = -(-hit_tokens // block_tokens)

    def end(first: int) -> int:
        """When the last block is there, in tokens read from now, if the prefill side reads the first ones."""
        prefill = min(first * block_tokens, hit_tokens)
        ends_prefill = prefill_queue + prefill if prefill else 0
        ends_decode = decode_queue + hit_tokens - prefill if prefill < hit_tokens else 0
        return max(ends_prefill, ends_decode)

    even = (hit_tokens + decode_queue - prefill_queue) // (2 * block_tokens)
    inner = (min(max(even + more, 0), blocks) for more in (0, 1))
    first = min(sorted({0, blocks, *inner}), key=end)
    prefill = min(first * block_tokens, hit_tokens)
    return ReadPlan(prefill, hit_tokens - prefill)
