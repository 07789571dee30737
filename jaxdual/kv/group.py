"""KV accounting of one layer group: its pages, the blocks cached in them, and its part of the host tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.layout import first_block, most_blocks
from jaxdual.kv.prefix_tree import Node, PrefixTree
from jaxdual.kv.slots import IntegrityError, SlotPool


@dataclass(frozen=True, slots=True)
class GroupPages:
    """Memory of one layer group.

    Attributes:
      num_pages: device pages.
      host_pages: capacity of its host tier in pages; 0 for none.
      window: sliding window of its layers in tokens; None for full attention.
      staging_pages: host pages behind those of the tier, which blocks on their way from or to elsewhere come through.
    """

    num_pages: int
    host_pages: int = 0
    window: int | None = None
    staging_pages: int = 0


@dataclass(frozen=True, slots=True)
class PageCopy:
    """One Full Block to move between the device and the host tier.

    Attributes:
      direction: "out" from page to slot, "in" from slot to page.
      page: device page.
      slot: host slot, of the host tier or behind it of the staging pages.
      group: number of the layer group that both belong to.
    """

    direction: Literal["out", "in"]
    page: int
    slot: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class PublishedBlock:
    """A block that has just been shared: computed by the steps planned before.

    Attributes:
      group: number of the layer group.
      key, parent: of the block, and of the one before it; None for a first block.
      page: that holds it, until the next step is dispatched at least.
    """

    group: int
    key: BlockKey
    parent: BlockKey | None
    page: int


@dataclass(slots=True)
class KVStats:
    """Counters since start: of the prefix cache in tokens, of evictions and copies in pages of all groups.

    `staged_hits` are tokens that were computed before and came through staging pages; `handed_over` those that came so
    from another engine, where they count as looked up.
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    host_hits: int = 0
    staged_hits: int = 0
    handed_over: int = 0
    evictions: int = 0
    copied_out: int = 0
    copied_in: int = 0


@dataclass(slots=True)
class Held:
    """Pages of a running sequence in one group: of its blocks from number `first` on.

    Attributes:
      first: number of the block in `pages[0]`; 0 under full attention.
      path: the cached blocks among them, which come first and which it has locked.
      pages: all of them, in token order.
      promised: pages that it was admitted for; it holds fewer while its prompt is being computed.
      admitted: tokens that it was admitted with.
      told: leading entries of `pages` that `KVManager.take_changes` has handed out as they are.
    """

    first: int
    path: list[Node]
    pages: list[int]
    promised: int
    admitted: int
    told: int = 0

    @property
    def own(self) -> list[int]:
        return self.pages[len(self.path) :]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a group could admit a sequence with: `path` for its blocks from `first` on, `pages` in all."""

    first: int
    path: list[Node]
    pages: int


@dataclass(frozen=True, slots=True)
class HostBlocks:
    """A waiting sequence's own blocks from number `first` on, in host memory.

    Attributes:
      slots: of the host tier for a sequence that was preempted, else of the staging pages, which others hand out.
      staged: which of the two.
    """

    first: int
    slots: Sequence[int]
    staged: bool = False


@dataclass(slots=True)
class Journal:
    """What all groups write to: copies to make, in order, blocks shared (if anybody asks for them), and counters."""

    copies: list[PageCopy] = field(default_factory=list)
    published: list[PublishedBlock] | None = None
    stats: KVStats = field(default_factory=KVStats)


class GroupAccount:
    """Pages, cached blocks and host slots of one layer group.

    Under full attention a cached block counts only with all blocks before it, so blocks hang on each other. Behind a
    window they stand alone: a sequence needs those that a later query can still see, and gives the others back.

    Args:
      number: of the group.
      memory: its sizes.
      page_size: tokens a page.
      max_chunk: tokens that a step computes of one sequence at most; None for a whole prompt.
      journal: where copies and counters go.
    """

    def __init__(
        self, number: int, memory: GroupPages, page_size: int, max_chunk: int | None, journal: Journal
    ) -> None:
        self.memory = memory
        self.held: dict[int, Held] = {}
        self.tree = PrefixTree()
        self._number = number
        self._page_size = page_size
        self._max_chunk = max_chunk
        self._journal = journal
        self._pool = SlotPool(memory.num_pages)
        self._host = SlotPool(memory.host_pages)
        self._swapped: dict[int, HostBlocks] = {}

    @property
    def num_available(self) -> int:
        """Pages that could be handed out now: free ones, and cached ones that nobody uses."""
        return self._pool.num_free + self.tree.num_evictable

    # Admission.

    def match(self, keys: Sequence[BlockKey], depth: int) -> int:
        """The greatest number of blocks, at most `depth`, after which a sequence could go on from cached ones."""
        if self.memory.window is None:
            return len(self.tree.match(keys if depth == len(keys) else keys[:depth]))
        while depth:
            needed, block = self._first_block(depth * self._page_size), depth - 1
            while block >= needed and self.tree.get(keys[block]) is not None:
                block -= 1
            if block < needed:
                break
            depth = block
        return depth

    def can_resume(self, seq_id: int, keys: Sequence[BlockKey], computed: int) -> bool:
        """Whether a swapped sequence can go on after `computed` tokens: what it had cached then still is."""
        first = self._first_block(computed)
        return first + len(self._path(first, keys)) >= self._swapped[seq_id].first

    def offer(self, keys: Sequence[BlockKey], start: int, num_tokens: int) -> Offer:
        """What a sequence of `num_tokens` tokens would get that goes on from position `start`; changes nothing.

        Args:
          keys: of the blocks before `start`.
        """
        first = self._first_block(start)
        pages = self._pages_for(num_tokens) - first
        if self.memory.window is not None and self._max_chunk is not None:
            pages = most_blocks(self.memory.window, self._max_chunk, self._page_size, pages)
        return Offer(first, self._path(first, keys), pages)

    def has_room(self, offer: Offer, reserve: int) -> bool:
        """Whether `offer` can be taken so that `reserve` pages stay, beside those promised to running sequences."""
        on_device = sum(node.page is not None for node in offer.path)
        idle = sum(node.page is not None and node.locks == 0 for node in offer.path)
        promised = 0
        if self.memory.window is not None:
            promised = sum(max(0, held.promised - len(held.pages)) for held in self.held.values())
        return self.num_available - promised - idle >= offer.pages - on_device + reserve

    def admit(self, seq_id: int, offer: Offer, num_tokens: int, resumed: int | None) -> set[int]:
        """Takes an offer that there is room for.

        Args:
          seq_id: a sequence that holds no pages.
          offer: from `offer`.
          num_tokens: tokens that it was made for.
          resumed: computed tokens of a swapped sequence that goes on from them; None for any other.

        Returns:
          Numbers of the cached blocks that come from the host tier.
        """
        path = offer.path
        self.tree.lock(path)
        from_host = set()
        for block, node in enumerate(path, start=offer.first):
            if node.page is None:
                node.page = self._take_page()
                self._copy("in", node.page, node.host_slot)
                from_host.add(block)
        pages = [node.page for node in path if node.page is not None]
        held = Held(offer.first, path, pages, promised=offer.pages, admitted=num_tokens)
        self.held[seq_id] = held
        if self.memory.window is None:
            self._extend(held, self._pages_for(num_tokens))
        if resumed is not None:
            self._extend(held, self._pages_for(resumed))
            swapped = self._swapped[seq_id]
            for block, slot in enumerate(swapped.slots, start=swapped.first):
                if block >= held.first + len(path):
                    self._copy("in", held.pages[block - held.first], slot)
        self.drop_swapped(seq_id)
        return from_host

    # Running sequences.

    def leave(self, seq_id: int, position: int) -> None:
        """Gives back the blocks that no query from `position` on sees; cached ones stay until they are evicted."""
        if self.memory.window is None:
            return
        held = self.held[seq_id]
        count = min(self._first_block(position) - held.first, len(held.pages))
        if count <= 0:
            return
        cached = held.path[:count]
        self.tree.unlock(cached)
        self._pool.free(held.pages[len(cached) : count])
        del held.path[:count]
        del held.pages[:count]
        held.first += count
        held.told = 0

    def missing(self, seq_id: int, num_tokens: int) -> int:
        """Pages that a running sequence lacks for its first `num_tokens` tokens."""
        held = self.held[seq_id]
        missing = -(-num_tokens // self._page_size) - held.first - len(held.pages)
        return missing if missing > 0 else 0

    def extend(self, seq_id: int, num_tokens: int) -> None:
        """Takes the pages that are missing, and must be available, for the first `num_tokens` tokens."""
        held = self.held[seq_id]
        self._extend(held, self._pages_for(num_tokens))
        if num_tokens >= held.admitted:
            held.promised = 0

    def publish(self, seq_id: int, keys: Sequence[BlockKey], stored: int) -> None:
        """Shares the blocks of `keys` that the sequence holds, see `KVManager.publish`.

        Args:
          stored: leading blocks of the sequence that came from a store.
        """
        held = self.held[seq_id]
        for block in range(held.first + len(held.path), len(keys)):
            key, index = keys[block], block - held.first
            node = self.tree.get(key)
            if node is None:
                parent = held.path[-1] if held.path and self.memory.window is None else None
                node = self.tree.insert(parent, key)
            if node.page is None:
                node.page = held.pages[index]
                if self._journal.published is not None and block >= stored:
                    parent_key = keys[block - 1] if block else None
                    self._journal.published.append(PublishedBlock(self._number, key, parent_key, node.page))
            else:
                self._pool.free([held.pages[index]])
                held.pages[index] = node.page
                held.told = min(held.told, index)
            self.tree.lock([node])
            held.path.append(node)

    def release(self, seq_id: int) -> None:
        """Takes back everything that a sequence has here; what it published stays cached."""
        held = self.held.pop(seq_id, None)
        if held is not None:
            self.tree.unlock(held.path)
            self._pool.free(held.own)
        self.drop_swapped(seq_id)

    # Preemption by swapping.

    def reserve_slots(self, seq_id: int, computed: int) -> list[int] | None:
        """Host slots for a sequence's own pages of `computed` tokens; None if the host tier has no room for them."""
        held = self.held[seq_id]
        slots: list[int] = []
        for _ in range(self._pages_for(computed) - held.first - len(held.path)):
            slot = self._take_host_slot()
            if slot is None:
                self.return_slots(slots)
                return None
            slots.append(slot)
        return slots

    def return_slots(self, slots: Sequence[int]) -> None:
        """Gives back what `reserve_slots` took."""
        self._host.free(slots)

    def swap_out(self, seq_id: int, slots: list[int]) -> None:
        """Moves a sequence's own pages to `slots`, and releases all its pages."""
        held = self.held[seq_id]
        for page, slot in zip(held.own, slots, strict=False):
            self._copy("out", page, slot)
        first = held.first + len(held.path)
        self.release(seq_id)
        self._swapped[seq_id] = HostBlocks(first, slots)

    def stage(self, seq_id: int, blocks: HostBlocks) -> None:
        """Takes note of what lies in staging pages for a waiting sequence."""
        self._swapped[seq_id] = blocks

    def drop_swapped(self, seq_id: int) -> None:
        """Forgets what a waiting sequence had in host memory; staging pages are not this account's to give back."""
        swapped = self._swapped.pop(seq_id, None)
        if swapped is not None and not swapped.staged:
            self._host.free(swapped.slots)

    def check(self, running: set[int], swapped: set[int]) -> None:
        """Raises `IntegrityError` unless every page and slot has exactly one owner and all links agree."""
        self.tree.check()
        if self.held.keys() != running or self._swapped.keys() != swapped:
            raise IntegrityError(f"group {self._number}: its sequences are not those of the other groups")
        on_device = [node.page for node in self.tree if node.page is not None]
        own = [page for held in self.held.values() for page in held.own]
        self._pool.check(on_device + own)
        on_host = [node.host_slot for node in self.tree if node.host_slot is not None]
        own_slots = [slot for own in self._swapped.values() if not own.staged for slot in own.slots]
        self._host.check(on_host + own_slots)
        locks: dict[BlockKey, int] = {}
        for seq_id, held in self.held.items():
            if held.pages[: len(held.path)] != [node.page for node in held.path]:
                raise IntegrityError(f"sequence {seq_id}: its first pages are not those of its cached blocks")
            for node in held.path:
                locks[node.key] = locks.get(node.key, 0) + 1
        for node in self.tree:
            if node.locks != locks.get(node.key, 0):
                raise IntegrityError(
                    f"block {node.key.hex()[:12]} has {node.locks} locks, not {locks.get(node.key, 0)}"
                )

    # How pages and slots are found.

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _first_block(self, position: int) -> int:
        return first_block(self.memory.window, position, self._page_size)

    def _path(self, first: int, keys: Sequence[BlockKey]) -> list[Node]:
        return self.tree.match(keys[first:])

    def _extend(self, held: Held, blocks: int) -> None:
        for _ in range(blocks - held.first - len(held.pages)):
            held.pages.append(self._take_page())

    def _take_page(self) -> int:
        page = self._pool.take()
        return self._evict() if page is None else page

    def _evict(self) -> int:
        node = self.tree.pop_device_victim()
        if node is None or node.page is None:
            raise IntegrityError("a page was promised, but none can be had")
        page, node.page = node.page, None
        self._journal.stats.evictions += 1
        if node.host_slot is None:
            slot = self._take_host_slot()
            if slot is None:
                self._drop(node)
                return page
            self._copy("out", page, slot)
            self.tree.set_host_slot(node, slot)
        return page

    def _take_host_slot(self) -> int | None:
        slot = self._host.take()
        if slot is not None:
            return slot
        victim = self.tree.host_victim()
        if victim is None:
            return None
        slot = victim.host_slot
        if victim.page is not None:
            self.tree.set_host_slot(victim, None)
        else:
            self._drop(victim, keep_slot=True)
        return slot

    def _drop(self, node: Node, *, keep_slot: bool = False) -> None:
        for removed in self.tree.remove(node):
            if removed.page is not None:
                self._pool.free([removed.page])
            if removed.host_slot is not None and not (keep_slot and removed is node):
                self._host.free([removed.host_slot])

    def _copy(self, direction: Literal["out", "in"], page: int, slot: int | None) -> None:
        if slot is None:
            raise IntegrityError("a block to be copied lies in no host slot")
        self._journal.copies.append(PageCopy(direction, page, slot, self._number))
        if direction == "out":
            self._journal.stats.copied_out += 1
        else:
            self._journal.stats.copied_in += 1
