"""KV accounting of one engine: which sequence owns which pages, what is cached, what moves between tiers.

It moves no bytes: it lists the copies that the runner must make before the next step, in order. Contents follow device
order: a page given back may be handed out at once, since whoever writes it next is dispatched later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.prefix_tree import Node, PrefixTree
from jaxdual.kv.slots import IntegrityError, SlotPool


@dataclass(frozen=True, slots=True)
class PageCopy:
    """One Full Block to move between the device and the host tier.

    Attributes:
      direction: "out" from page to slot, "in" from slot to page.
      page: device page.
      slot: host slot.
    """

    direction: Literal["out", "in"]
    page: int
    slot: int


@dataclass(frozen=True, slots=True)
class Admission:
    """What a sequence starts with.

    Attributes:
      computed: tokens whose keys and values are there (or listed to be copied in).
      cached: how many of them came from the prefix cache, in tokens.
    """

    computed: int
    cached: int


@dataclass(slots=True)
class _Held:
    """Pages of a running sequence: cached blocks first, which it has locked, then pages of its own."""

    path: list[Node]
    pages: list[int]  # all of them, in token order

    @property
    def own(self) -> list[int]:
        return self.pages[len(self.path) :]


@dataclass(slots=True)
class _Swapped:
    """A preempted sequence's own pages in the host tier: blocks from number `first` on; `computed` tokens in all."""

    first: int
    slots: list[int]
    computed: int


@dataclass(slots=True)
class KVStats:
    """Counters since start, in tokens or pages, and present occupation in pages."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    host_hits: int = 0
    evictions: int = 0
    copied_out: int = 0
    copied_in: int = 0


class KVManager:
    """Pages, prefix tree and host tier of one engine.

    Args:
      num_pages: device pages.
      page_size: tokens a page.
      host_pages: capacity of the host tier in pages; 0 for none.
      prefix_caching: whether full blocks are shared between sequences.
    """

    def __init__(self, num_pages: int, page_size: int, *, host_pages: int = 0, prefix_caching: bool = True) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.prefix_caching = prefix_caching
        self.stats = KVStats()
        self._pool = SlotPool(num_pages)
        self._host = SlotPool(host_pages)
        self._tree = PrefixTree()
        self._held: dict[int, _Held] = {}
        self._swapped: dict[int, _Swapped] = {}
        self._copies: list[PageCopy] = []

    # What the scheduler asks.

    @property
    def num_available(self) -> int:
        """Pages that could be handed out now: free ones, and cached ones that nobody uses."""
        return self._pool.num_free + self._tree.num_evictable

    @property
    def num_cached(self) -> int:
        """Device pages that hold cached blocks which nobody uses."""
        return self._tree.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def pages_of(self, seq_id: int) -> list[int]:
        """Pages of a running sequence in token order; the manager's own list, not to be changed."""
        return self._held[seq_id].pages

    def num_cached_blocks(self, keys: Sequence[BlockKey]) -> int:
        """Blocks of the longest cached prefix of `keys`, in any tier."""
        return len(self._tree.match(keys)) if self.prefix_caching else 0

    def num_shared(self, seq_id: int) -> int:
        """Blocks of a running sequence that lie in the prefix tree: its first ones."""
        return len(self._held[seq_id].path)

    def admit(
        self, seq_id: int, keys: Sequence[BlockKey], num_tokens: int, *, reserve: int = 0, use_cache: bool = True
    ) -> Admission | None:
        """Gives a sequence pages for its first `num_tokens` tokens, cached and swapped ones where there are some.

        At least the last token is left to compute, since its logits are wanted.

        Args:
          seq_id: a sequence that holds nothing, or one that was swapped out.
          keys: keys of the full blocks among its first `num_tokens - 1` tokens.
          num_tokens: tokens to make room for.
          reserve: pages that must stay available afterwards.
          use_cache: False computes all tokens anew, for results that only computing gives.

        Returns:
          None, and nothing has changed, if there is no room.

        Raises:
          IntegrityError: the sequence holds pages already.
        """
        if seq_id in self._held:
            raise IntegrityError(f"sequence {seq_id} is admitted already")
        path = self._tree.match(keys) if self.prefix_caching and use_cache else []
        swapped = self._swapped.get(seq_id)
        new_pages = self.pages_for(num_tokens) - sum(node.page is not None for node in path)
        idle = sum(node.page is not None and node.locks == 0 for node in path)
        if self.num_available - idle < new_pages + reserve:
            return None

        self._tree.lock(path)
        for node in path:
            if node.page is None:
                node.page = self._take_page()
                self._copy("in", node.page, node.host_slot)
                self.stats.host_hits += self.page_size
        held = _Held(path=path, pages=[node.page for node in path if node.page is not None])
        self._held[seq_id] = held
        self._extend(held, self.pages_for(num_tokens))

        computed = cached = len(path) * self.page_size
        if swapped is not None:
            del self._swapped[seq_id]
            if swapped.first <= len(path) and swapped.computed > computed:
                for block, slot in enumerate(swapped.slots, start=swapped.first):
                    if block >= len(path):
                        self._copy("in", held.pages[block], slot)
                computed = swapped.computed
            self._host.free(swapped.slots)
        elif self.prefix_caching and use_cache:
            self.stats.prefix_queries += num_tokens
            self.stats.prefix_hits += cached
        return Admission(computed=computed, cached=cached)

    def grow(self, seq_id: int, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens of a running sequence; False, with nothing changed, if there is none."""
        held = self._held[seq_id]
        missing = self.pages_for(num_tokens) - len(held.pages)
        if missing > self.num_available:
            return False
        self._extend(held, self.pages_for(num_tokens))
        return True

    def publish(self, seq_id: int, keys: Sequence[BlockKey]) -> None:
        """Shares the first blocks of a running sequence: `keys` are those of its full blocks computed so far.

        Where another sequence was first with the same block, this one goes on with that one's page.
        """
        if not self.prefix_caching:
            return
        held = self._held[seq_id]
        while len(held.path) < len(keys):
            block = len(held.path)
            key = keys[block]
            page = held.pages[block]
            node = self._tree.get(key)
            if node is None:
                node = self._tree.insert(held.path[-1] if held.path else None, key)
                node.page = page
            elif node.page is None:
                node.page = page
            else:
                held.pages[block] = node.page
                self._pool.free([page])
            self._tree.lock([node])
            held.path.append(node)

    def release(self, seq_id: int) -> None:
        """Takes back everything that a sequence has, running or swapped out; what it published stays cached."""
        held = self._held.pop(seq_id, None)
        if held is not None:
            self._tree.unlock(held.path)
            self._pool.free(held.own)
        swapped = self._swapped.pop(seq_id, None)
        if swapped is not None:
            self._host.free(swapped.slots)

    def swap_out(self, seq_id: int, computed: int) -> bool:
        """Moves a running sequence's own pages to the host tier, and releases its cached ones.

        Args:
          seq_id: the sequence.
          computed: tokens whose keys and values it has.

        Returns:
          False, and nothing but the host tier's cached blocks has changed, if that tier has no room.
        """
        held = self._held[seq_id]
        moving = held.own[: max(0, self.pages_for(computed) - len(held.path))]
        slots: list[int] = []
        for _ in moving:
            slot = self._take_host_slot()
            if slot is None:
                self._host.free(slots)
                return False
            slots.append(slot)
        for page, slot in zip(moving, slots, strict=True):
            self._copy("out", page, slot)
        self._swapped[seq_id] = _Swapped(first=len(held.path), slots=slots, computed=computed)
        del self._held[seq_id]
        self._tree.unlock(held.path)
        self._pool.free(held.own)
        return True

    def take_copies(self) -> tuple[PageCopy, ...]:
        """Copies to make, in this order, before the next step; each is handed out once."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless every page and slot has exactly one owner and all links agree."""
        self._tree.check()
        on_device = [node.page for node in self._tree if node.page is not None]
        own = [page for held in self._held.values() for page in held.own]
        self._pool.check(on_device + own)
        on_host = [node.host_slot for node in self._tree if node.host_slot is not None]
        self._host.check(on_host + [slot for swapped in self._swapped.values() for slot in swapped.slots])
        locks: dict[BlockKey, int] = {}
        for seq_id, held in self._held.items():
            if held.pages[: len(held.path)] != [node.page for node in held.path]:
                raise IntegrityError(f"sequence {seq_id}: its first pages are not those of its cached blocks")
            for node in held.path:
                locks[node.key] = locks.get(node.key, 0) + 1
        for node in self._tree:
            if node.locks != locks.get(node.key, 0):
                raise IntegrityError(
                    f"block {node.key.hex()[:12]} has {node.locks} locks, not {locks.get(node.key, 0)}"
                )

    @property
    def num_held(self) -> int:
        """Sequences that hold pages or host slots."""
        return len(self._held) + len(self._swapped)

    # How pages and slots are found.

    def _extend(self, held: _Held, num_pages: int) -> None:
        while len(held.pages) < num_pages:
            held.pages.append(self._take_page())

    def _take_page(self) -> int:
        page = self._pool.take()
        return self._evict() if page is None else page

    def _evict(self) -> int:
        node = self._tree.pop_device_victim()
        if node is None or node.page is None:
            raise IntegrityError("a page was promised, but none can be had")
        page, node.page = node.page, None
        self.stats.evictions += 1
        if node.host_slot is None:
            slot = self._take_host_slot()
            if slot is None:
                self._drop(node)
                return page
            self._copy("out", page, slot)
            self._tree.set_host_slot(node, slot)
        return page

    def _take_host_slot(self) -> int | None:
        slot = self._host.take()
        if slot is not None:
            return slot
        victim = self._tree.host_victim()
        if victim is None:
            return None
        slot = victim.host_slot
        if victim.page is not None:
            self._tree.set_host_slot(victim, None)
        else:
            self._drop(victim, keep_slot=True)
        return slot

    def _drop(self, node: Node, *, keep_slot: bool = False) -> None:
        for removed in self._tree.remove(node):
            if removed.page is not None:
                self._pool.free([removed.page])
            if removed.host_slot is not None and not (keep_slot and removed is node):
                self._host.free([removed.host_slot])

    def _copy(self, direction: Literal["out", "in"], page: int, slot: int | None) -> None:
        if slot is None:
            raise IntegrityError("a block to be copied lies in no host slot")
        self._copies.append(PageCopy(direction, page, slot))
        if direction == "out":
            self.stats.copied_out += 1
        else:
            self.stats.copied_in += 1
