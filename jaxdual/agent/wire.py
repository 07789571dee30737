"""Messages between an engine and its KV agent. Slots are places in the slab that both have mapped."""

from __future__ import annotations

import msgspec

from jaxdual.frames import Message

ALIVE_SECONDS = 1.0  # between two `Alive`


class GroupSlots(msgspec.Struct, frozen=True):
    """Where the staging slots of a layer group lie in the slab.

    Attributes:
      offset: of slot 0, in bytes.
      slot_bytes: from one slot to the next.
      block_bytes: of a Full Block, at the beginning of a slot.
    """

    offset: int
    slot_bytes: int
    block_bytes: int


class CardPlaces(msgspec.Struct, frozen=True):
    """The network cards of a node, of which bytes are counted and, with a rate, held back.

    Attributes:
      directory: of their files, see `transport.shaping`.
      storage: name of the card that stored blocks go through.
      compute: name of the card that the device and other nodes are reached through.
    """

    directory: str
    storage: str
    compute: str


# From the engine.


class Attach(Message, frozen=True, tag=True):
    """The first message. Answered by `Attached` or `AttachFailed`.

    Attributes:
      store: which one to open; "" for none.
      capacity_bytes: of the store.
      carrier: of bytes to and from agents of other engines, "shm", "tcp" or "verbs"; "" for none.
      host, secret: of the latter two: where they listen, and what their peers must know.
      groups: of each layer group, where its slots are.
      cards: of the node; None if nothing is counted.
    """

    store: str
    capacity_bytes: int
    groups: list[GroupSlots]
    carrier: str = ""
    host: str = ""
    secret: bytes = b""
    cards: CardPlaces | None = None


class Lookup(Message, frozen=True, tag=True):
    """How many of the leading `keys` are stored? Answered by `Found`."""

    number: int
    keys: list[bytes]


class Load(Message, frozen=True, tag=True):
    """Reads blocks into slots. Answered by `Done`; until then the slots are the agent's to write."""

    number: int
    group: int
    keys: list[bytes]
    slots: list[int]


class Save(Message, frozen=True, tag=True):
    """Stores blocks that lie in slots. Answered by `Done`; until then the slots must not change."""

    number: int
    group: int
    keys: list[bytes]
    parents: list[bytes | None]
    slots: list[int]


class Push(Message, frozen=True, tag=True):
    """Copies runs of bytes of the slab to another agent's. Answered by `Done`, with one entry; until then the bytes
    here must not change, and those there may.

    Attributes:
      address: of the other agent.
      descriptor: of its slab.
      runs: offset here, offset there, bytes.
    """

    number: int
    address: str
    descriptor: bytes
    runs: list[tuple[int, int, int]]


class Pull(Message, frozen=True, tag=True):
    """Copies runs of bytes of another agent's slab, or of the own one, to here. Answered by `Done`, with one entry;
    until then the bytes here are the agent's to write, and those there must not change.

    Attributes:
      address: of the agent whose slab it is.
      descriptor: of that slab.
      runs: offset here, offset there, bytes.
    """

    number: int
    address: str
    descriptor: bytes
    runs: list[tuple[int, int, int]]


class ToDevice(Message, frozen=True, tag=True):
    """So many bytes are to leave the slab for the device. Answered by `Done`, with one entry, when the node's card has
    let them pass.
    """

    number: int
    nbytes: int


class Disconnect(Message, frozen=True, tag=True):
    """Ends the connections that another agent has to this one, which may connect again. Answered by `Done`, with one
    entry, when nothing that came by them can be written here any more.
    """

    number: int
    address: str


class AwaitGone(Message, frozen=True, tag=True):
    """Answered by `Done`, with one entry, when an agent whose engine has died can write here no more."""

    number: int
    address: str


# From the agent.


class Attached(Message, frozen=True, tag=True):
    """The store is open; `address` and `descriptor` are what another agent needs to write to the slab."""

    address: str
    descriptor: bytes


class AttachFailed(Message, frozen=True, tag=True):
    """The store can't be opened."""

    message: str


class Found(Message, frozen=True, tag=True):
    number: int
    hits: int


class Done(Message, frozen=True, tag=True):
    """Whether each block of a `Load` or `Save` has arrived whole, or all of a `Push` or `Pull`; and the seconds that it
    took.
    """

    number: int
    whole: list[bool]
    seconds: float

    @property
    def leading(self) -> int:
        """Blocks before the first one that has not arrived whole."""
        return [*self.whole, False].index(False)


class PeerGone(Message, frozen=True, tag=True):
    """Another agent's connections to this one have ended; if it lives, it may connect again. Comes unasked."""

    address: str


class Alive(Message, frozen=True, tag=True):
    """Comes unasked, every `ALIVE_SECONDS`: an agent that does not say it any more is stopped, or hangs."""


ToAgent = Attach | Lookup | Load | Save | Push | Pull | ToDevice | Disconnect | AwaitGone
FromAgent = Attached | AttachFailed | Alive | Found | Done | PeerGone
