"""Keys of KV blocks: a hash chain over everything that a block's contents depend on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BlockKey = bytes
_KEY_BYTES = 32


def root_key(model_fingerprint: bytes, layout_fingerprint: bytes, salt: bytes = b"") -> BlockKey:
    """Key that the first block of a sequence hangs on.

    Args:
      model_fingerprint: identifies the weights.
      layout_fingerprint: `KVLayout.fingerprint()`.
      salt: keeps caches apart that must not be shared: tenant, decoding method and its parameters.
    """
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in (model_fingerprint, layout_fingerprint, salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def child_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Key of the block of `token_ids` that follows the block `parent`."""
    return hashlib.blake2b(array("i", token_ids).tobytes(), digest_size=_KEY_BYTES, key=parent).digest()


class KeyChain:
    """Keys of the full blocks of one growing sequence, each computed once."""

    __slots__ = ("_keys", "_page_size", "_root")

    def __init__(self, root: BlockKey, page_size: int) -> None:
        self._root = root
        self._page_size = page_size
        self._keys: list[BlockKey] = []

    def copy(self) -> KeyChain:
        """A chain for another sequence that begins with the same tokens."""
        chain = KeyChain(self._root, self._page_size)
        chain._keys = list(self._keys)
        return chain

    @property
    def known(self) -> list[BlockKey]:
        """Keys computed so far; the chain's own list, not to be changed."""
        return self._keys

    def upto(self, token_ids: Sequence[int], blocks: int) -> list[BlockKey]:
        """Keys of the first `blocks` blocks of `token_ids`, which starts with what earlier calls were given.

        Raises:
          ValueError: fewer tokens than `blocks` full blocks.
        """
        if blocks * self._page_size > len(token_ids):
            raise ValueError(f"{blocks=} of {self._page_size} tokens need more than {len(token_ids)} tokens")
        while len(self._keys) < blocks:
            start = len(self._keys) * self._page_size
            parent = self._keys[-1] if self._keys else self._root
            self._keys.append(child_key(parent, token_ids[start : start + self._page_size]))
        return self._keys[:blocks]
