"""KV accounting of one engine: which sequence owns which pages, what is cached, what moves between tiers.

It moves no bytes: it lists the copies that the runner must make before the next step, in order. Contents follow device
order: a page given back may be handed out at once, since whoever writes it next is dispatched later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxdual.kv.group import GroupAccount, GroupPages, HostBlocks, Journal, KVStats, PageCopy, PublishedBlock
from jaxdual.kv.keys import BlockKey
from jaxdual.kv.slots import IntegrityError

__all__ = [
    "Admission",
    "GroupPages",
    "HostBlocks",
    "KVManager",
    "KVStats",
    "PageCopy",
    "PublishedBlock",
    "TableChange",
]


@dataclass(frozen=True, slots=True)
class Admission:
    """What a sequence starts with.

    Attributes:
      computed: tokens whose keys and values are there (or listed to be copied in).
      cached: how many of them came from the prefix cache or were staged, in tokens.
    """

    computed: int
    cached: int


@dataclass(frozen=True, slots=True)
class TableChange:
    """New entries of a sequence's page table in one layer group.

    Attributes:
      group: number of the group.
      first: number of the block that entry 0 is of, from now on.
      start: the first entry that changes.
      pages: entries from `start` on; those after them are used no more.
    """

    group: int
    first: int
    start: int
    pages: tuple[int, ...]


class KVManager:
    """Pages, cached blocks and host tiers of one engine: one account for each layer group, kept in step.

    A sequence is admitted, grows, is swapped and released in all groups or in none. It goes on from a cached prefix if
    every group has the blocks that later queries see: under full attention all of them, behind a window the last ones.

    Args:
      groups: memory of each layer group, in the order of `KVLayout.groups`.
      page_size: tokens a page.
      prefix_caching: whether full blocks are shared between sequences.
      max_chunk: tokens that a step computes of one sequence at most; None for a whole prompt. Behind a window, a
        prompt is admitted with room for its window and one chunk.
      report_published: whether `take_published` tells which blocks have been shared.
    """

    def __init__(
        self,
        groups: Sequence[GroupPages],
        page_size: int,
        *,
        prefix_caching: bool = True,
        max_chunk: int | None = None,
        report_published: bool = False,
    ) -> None:
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._journal = Journal(published=[] if report_published else None)
        self.groups = tuple(
            GroupAccount(number, memory, page_size, max_chunk, self._journal) for number, memory in enumerate(groups)
        )
        self._published: dict[int, int] = {}  # of each running sequence, in blocks
        self._swapped: dict[int, int] = {}  # of each sequence that waits with blocks in host memory: computed tokens
        self._staging: dict[int, bool] = {}  # those of them whose blocks are in staging pages: handed over
        self._unstaged: list[int] = []
        self._stored: dict[int, int] = {}  # of each sequence that came through staging pages

    @property
    def stats(self) -> KVStats:
        return self._journal.stats

    # What the scheduler asks.

    @property
    def num_pages(self) -> int:
        """Device pages of all groups."""
        return sum(group.memory.num_pages for group in self.groups)

    @property
    def num_available(self) -> int:
        """Pages that could be handed out now, in all groups: free ones, and cached ones that nobody uses."""
        return sum(group.num_available for group in self.groups)

    @property
    def num_cached(self) -> int:
        """Device pages that hold cached blocks which nobody uses, in all groups."""
        return sum(group.tree.num_evictable for group in self.groups)

    def pages_of(self, seq_id: int, group: int = 0) -> list[int]:
        """Pages of a running sequence in a group, in token order; the account's own list, not to be changed."""
        return self.groups[group].held[seq_id].pages

    def first_of(self, seq_id: int, group: int = 0) -> int:
        """Number of the first block whose page a running sequence still holds in a group."""
        return self.groups[group].held[seq_id].first

    def num_cached_blocks(self, keys: Sequence[BlockKey]) -> int:
        """Blocks of the longest prefix of `keys` that a sequence could go on from, in any tier."""
        depth = len(keys) if self.prefix_caching else 0
        if len(self.groups) == 1:
            return self.groups[0].match(keys, depth)
        # What one group allows, another may not; only less can follow, so this ends.
        while True:
            allowed = min(group.match(keys, depth) for group in self.groups)
            if allowed == depth:
                return allowed
            depth = allowed

    def num_published(self, seq_id: int) -> int:
        """Blocks of a running sequence, from its first one, that it took from the cache or has shared."""
        return self._published[seq_id]

    def admit(
        self, seq_id: int, keys: Sequence[BlockKey], num_tokens: int, *, reserve: int = 0, use_cache: bool = True
    ) -> Admission | None:
        """Gives a sequence room for its first `num_tokens` tokens, with cached and swapped blocks where there are some.

        At least the last token is left to compute, since its logits are wanted. Under full attention the sequence gets
        all pages now; behind a window `grow` gives them, chunk by chunk.

        Args:
          seq_id: a sequence that holds nothing, or one that was swapped out or staged.
          keys: keys of the full blocks among its first `num_tokens - 1` tokens.
          num_tokens: tokens to make room for.
          reserve: pages that must stay available afterwards, in each group.
          use_cache: False computes all tokens anew, for results that only computing gives.

        Returns:
          None, and nothing has changed, if there is no room.

        Raises:
          IntegrityError: the sequence holds pages already.
        """
        if seq_id in self._published:
            raise IntegrityError(f"sequence {seq_id} is admitted already")
        usable = keys if self.prefix_caching and use_cache else []
        depth = self.num_cached_blocks(usable)
        cached = start = depth * self.page_size
        usable, resumed = usable[:depth], None
        swapped = self._swapped.get(seq_id)
        if swapped is not None and swapped > cached:
            before = keys[: swapped // self.page_size] if self.prefix_caching and use_cache else []
            if all(group.can_resume(seq_id, before, swapped) for group in self.groups):
                usable, start, resumed = before, swapped, swapped
        offers = [group.offer(usable, start, num_tokens) for group in self.groups]
        if not all(group.has_room(offer, reserve) for group, offer in zip(self.groups, offers, strict=True)):
            return None

        from_host: set[int] = set()
        for group, offer in zip(self.groups, offers, strict=True):
            from_host |= group.admit(seq_id, offer, num_tokens, resumed)
        self._published[seq_id] = min(offer.first + len(offer.path) for offer in offers)
        self._swapped.pop(seq_id, None)
        self.stats.host_hits += len(from_host) * self.page_size
        found = cached
        match self._unstage(seq_id):
            case True:  # counted where it comes from
                self.stats.handed_over += start - cached
            case False:
                self.stats.staged_hits += start - cached
                swapped, found = None, start
        if swapped is None and self.prefix_caching and use_cache:
            self.stats.prefix_queries += num_tokens
            self.stats.prefix_hits += found
        return Admission(computed=start, cached=found)

    def stage(
        self, seq_id: int, parts: Sequence[HostBlocks], computed: int, *, stored: int, handed_over: bool = False
    ) -> None:
        """Takes note of what a sequence that holds nothing finds in staging pages when it is admitted.

        The pages must stay as they are until `take_unstaged` names the sequence and the copies of that step are made.

        Args:
          seq_id: the sequence.
          parts: its blocks in each group: those that it needs behind what is cached now.
          computed: tokens that it can go on from then.
          stored: leading blocks of them that are in the store already.
          handed_over: whether they come from another engine, and not from the store.

        Raises:
          IntegrityError: the sequence holds something already.
        """
        if seq_id in self._published or seq_id in self._swapped:
            raise IntegrityError(f"sequence {seq_id} holds blocks already")
        for group, part in zip(self.groups, parts, strict=True):
            group.stage(seq_id, part)
        self._swapped[seq_id] = computed
        self._staging[seq_id] = handed_over
        self._stored[seq_id] = stored

    def grow(self, seq_id: int, start: int, end: int) -> bool:
        """Makes room for computing the positions `start` to `end - 1` of a running sequence.

        Behind a window, blocks that no query from `start` on sees are given back first, in any case.

        Returns:
          False, and nothing more has changed, if some group has no room.
        """
        missing = 0
        for group in self.groups:
            if group.memory.window is not None:
                group.leave(seq_id, start)
            missing += group.missing(seq_id, end)
        if missing == 0:
            return True  # most decode steps
        if not all(group.missing(seq_id, end) <= group.num_available for group in self.groups):
            return False
        for group in self.groups:
            group.extend(seq_id, end)
        return True

    def room_of(self, seq_id: int) -> int:
        """Tokens that a running sequence's pages hold, so that `grow` has nothing to do for them; 0 behind a window."""
        if any(group.memory.window is not None for group in self.groups):
            return 0
        return self.page_size * min(len(group.held[seq_id].pages) for group in self.groups)

    def publish(self, seq_id: int, keys: Sequence[BlockKey]) -> None:
        """Shares the first blocks of a running sequence: `keys` are those of its full blocks computed so far.

        Where another sequence was first with the same block, this one goes on with that one's page.
        """
        if not self.prefix_caching:
            return
        for group in self.groups:
            group.publish(seq_id, keys, self._stored.get(seq_id, 0))
        self._published[seq_id] = max(self._published[seq_id], len(keys))

    def take_changes(self, seq_id: int) -> list[TableChange]:
        """Entries of a running sequence's page tables that have changed since the last call, each handed out once."""
        changes = []
        for number, group in enumerate(self.groups):
            held = group.held[seq_id]
            if held.told < len(held.pages):
                changes.append(TableChange(number, held.first, held.told, tuple(held.pages[held.told :])))
                held.told = len(held.pages)
        return changes

    def release(self, seq_id: int) -> None:
        """Takes back everything that a sequence has, running or waiting; what it published stays cached."""
        self._published.pop(seq_id, None)
        self._swapped.pop(seq_id, None)
        self._unstage(seq_id)
        self._stored.pop(seq_id, None)
        for group in self.groups:
            group.release(seq_id)

    def swap_out(self, seq_id: int, computed: int) -> bool:
        """Moves a running sequence's own pages to the host tier, and releases its cached ones.

        Args:
          seq_id: the sequence.
          computed: tokens whose keys and values it has.

        Returns:
          False, and only the host tier's cached blocks and blocks out of sight have changed, if that tier has no room.
        """
        slots: list[list[int]] = []
        for group in self.groups:
            group.leave(seq_id, computed)
            taken = group.reserve_slots(seq_id, computed)
            if taken is None:
                for other, others in zip(self.groups, slots, strict=False):
                    other.return_slots(others)
                return False
            slots.append(taken)
        for group, own in zip(self.groups, slots, strict=True):
            group.swap_out(seq_id, own)
        del self._published[seq_id]
        self._swapped[seq_id] = computed
        return True

    def take_copies(self) -> tuple[PageCopy, ...]:
        """Copies to make, in this order, before the next step; each is handed out once."""
        copies = tuple(self._journal.copies)
        self._journal.copies.clear()
        return copies

    @property
    def has_news(self) -> bool:
        """Whether `take_published` or `take_unstaged` has anything to tell."""
        return bool(self._journal.published or self._unstaged)

    def take_published(self) -> tuple[PublishedBlock, ...]:
        """Blocks shared since the last call; whoever wants their contents takes them before the copies of this step."""
        published = tuple(self._journal.published or ())
        if self._journal.published:
            self._journal.published.clear()
        return published

    def take_unstaged(self) -> tuple[int, ...]:
        """Sequences whose staging pages are needed no more once the copies of this step are made."""
        unstaged = tuple(self._unstaged)
        self._unstaged.clear()
        return unstaged

    def _unstage(self, seq_id: int) -> bool | None:
        """Whether the staging pages that the sequence has been waiting with, and needs no more, were handed over; None
        if there are none.
        """
        handed_over = self._staging.pop(seq_id, None)
        if handed_over is not None:
            self._unstaged.append(seq_id)
        return handed_over

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless every page and slot has exactly one owner and all links agree."""
        for group in self.groups:
            group.check(set(self._published), set(self._swapped))
        if not self._staging.keys() <= self._swapped.keys():
            raise IntegrityError(f"sequences {self._staging.keys() - self._swapped.keys()} are staged and do not wait")

    @property
    def num_held(self) -> int:
        """Sequences that hold pages or host slots."""
        return len(self._published) + len(self._swapped)
