"""The prefix tree: which blocks of token prefixes are cached, and in which tier each lies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.slots import IntegrityError


class Node:
    """One cached full block.

    Attributes:
      key: hash chain up to this block.
      parent: the block before, None for a first block.
      children: blocks that follow, by key.
      page: its device page, or None.
      host_slot: its slot in the host tier, or None. A node has at least one of the two.
      locks: sequences that use its device page: all on the path under full attention, behind a window those in sight.
    """

    __slots__ = ("children", "host_slot", "key", "locks", "page", "parent")

    def __init__(self, key: BlockKey, parent: Node | None) -> None:
        self.key = key
        self.parent = parent
        self.children: dict[BlockKey, Node] = {}
        self.page: int | None = None
        self.host_slot: int | None = None
        self.locks = 0


class PrefixTree:
    """Nodes by key, and the order in which unused ones give up their places.

    The tree moves no bytes and owns no free list: `kv.group` decides what a dropped node's places are used for.
    Two least-recently-used orders are kept, one for each tier. A path is locked and unlocked leaf first, so the front
    of an order is never the ancestor of a node further back.
    """

    def __init__(self) -> None:
        self._nodes: dict[BlockKey, Node] = {}
        self._device_lru: OrderedDict[BlockKey, Node] = OrderedDict()
        self._host_lru: OrderedDict[BlockKey, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    @property
    def num_evictable(self) -> int:
        """Nodes on the device that no sequence uses."""
        return len(self._device_lru)

    def get(self, key: BlockKey) -> Node | None:
        return self._nodes.get(key)

    def match(self, keys: Sequence[BlockKey]) -> list[Node]:
        """Nodes of the longest cached prefix of `keys`. Changes nothing."""
        path: list[Node] = []
        for key in keys:
            node = self._nodes.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def insert(self, parent: Node | None, key: BlockKey) -> Node:
        """Adds a node without a place in any tier; the caller sets `page` or `host_slot` before anything else happens.

        Raises:
          IntegrityError: the key is there already.
        """
        if key in self._nodes:
            raise IntegrityError(f"block {key.hex()} is in the tree already")
        node = Node(key, parent)
        self._nodes[key] = node
        if parent is not None:
            parent.children[key] = node
        return node

    def lock(self, path: Sequence[Node]) -> None:
        """Keeps each node of `path`, given from the first block on, from being evicted until `unlock`."""
        for node in reversed(path):
            node.locks += 1
            self._device_lru.pop(node.key, None)
            if node.host_slot is not None:
                self._host_lru.move_to_end(node.key)

    def unlock(self, path: Sequence[Node]) -> None:
        """Ends one lock of each node of `path`, given from the first block on."""
        for node in reversed(path):
            node.locks -= 1
            if node.locks < 0:
                raise IntegrityError(f"block {node.key.hex()} was unlocked more often than locked")
            if node.locks == 0:
                self._device_lru[node.key] = node

    def set_host_slot(self, node: Node, slot: int | None) -> None:
        node.host_slot = slot
        if slot is None:
            self._host_lru.pop(node.key, None)
        else:
            self._host_lru[node.key] = node

    def pop_device_victim(self) -> Node | None:
        """Takes the least recently used unlocked device node out of the order; the caller clears its `page`."""
        if not self._device_lru:
            return None
        return self._device_lru.popitem(last=False)[1]

    def host_victim(self) -> Node | None:
        """The least recently used node of the host tier that no sequence waits for."""
        for node in self._host_lru.values():
            if node.locks == 0 or node.page is not None:
                return node
        return None

    def remove(self, node: Node) -> list[Node]:
        """Takes a node and all below it out of the tree, and returns them; the caller frees their places.

        Raises:
          IntegrityError: one of them is locked.
        """
        removed = []
        stack = [node]
        while stack:
            current = stack.pop()
            if current.locks:
                raise IntegrityError(f"block {current.key.hex()} is in use and can't be removed")
            stack.extend(current.children.values())
            del self._nodes[current.key]
            self._device_lru.pop(current.key, None)
            self._host_lru.pop(current.key, None)
            removed.append(current)
        if node.parent is not None:
            del node.parent.children[node.key]
        return removed

    def check(self) -> None:
        """Raises `IntegrityError` if links, locks, places and orders contradict each other."""
        for node in self._nodes.values():
            name = node.key.hex()[:12]
            if node.parent is not None:
                if (
                    self._nodes.get(node.parent.key) is not node.parent
                    or node.parent.children.get(node.key) is not node
                ):
                    raise IntegrityError(f"block {name} hangs on a parent that doesn't know it")
                if node.locks > node.parent.locks:
                    raise IntegrityError(f"block {name} is locked more often than its parent")
            if node.page is None and node.host_slot is None:
                raise IntegrityError(f"block {name} lies nowhere")
            if node.locks and node.page is None:
                raise IntegrityError(f"block {name} is in use but not on the device")
            if (node.key in self._device_lru) != (node.locks == 0 and node.page is not None):
                raise IntegrityError(f"block {name} is wrongly listed as evictable or not")
            if (node.key in self._host_lru) != (node.host_slot is not None):
                raise IntegrityError(f"block {name} is wrongly listed in the host tier or not")
        for order in (self._device_lru, self._host_lru):
            for key, node in order.items():
                if self._nodes.get(key) is not node:
                    raise IntegrityError(f"block {key.hex()[:12]} is in an order but not in the tree")
