"""The sequences of an engine that are decoded by DySCO, a slot each, whose state lies on the device.

Such a sequence's prompt is computed as any up to `SlotDysco.observed_from`. The tokens from there on are watched, and
those from `raised_from` on are computed one at a time, with the attention to what retrieval heads look at raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxdual.decoding.dysco import DEFAULT_OBSERVE, Dysco, first_observed, first_raised, template_mask
from jaxdual.engine.buckets import PrefillBatch, PrefillShape
from jaxdual.engine.dysco import Chosen, DyscoRows, DyscoState, ObservedChunks
from jaxdual.engine.dysco_programs import DyscoPrograms
from jaxdual.engine.request import Selection
from jaxdual.engine.steps import Programs
from jaxdual.scheduling.batch import Chunk, ParkedSlot, Row


@dataclass(frozen=True, slots=True)
class SlotDysco:
    """How a sequence is decoded.

    Attributes:
      params: of the request.
      observed_from: position of the first token whose attention counts.
      raised_from: position of the first token with raised attention.
      template: positions in the prompt that are never raised.
    """

    params: Dysco
    observed_from: int
    raised_from: int
    template: Sequence[int]


def slot_dysco(params: Dysco, prompt: Sequence[int]) -> SlotDysco:
    """How a prompt is decoded."""
    sizes = len(prompt), params.tail, params.observe
    template = np.flatnonzero(template_mask(prompt, params.template_sequences)).tolist()
    return SlotDysco(params, first_observed(*sizes), first_raised(*sizes), template)


class DyscoSlots:
    """The sequences that are decoded so, by rank and slot.

    Args:
      programs: of the engine.
      slots: of a rank, with one of padding, which is the last.
      keys: that a table has room for.
      heads: query heads of a layer.
      ranks: that have slots.

    Attributes:
      programs: that work on the state.
      state: on the device.
    """

    def __init__(self, programs: Programs, *, slots: int, keys: int, heads: int, ranks: int) -> None:
        self.programs = DyscoPrograms(programs)
        self._slots, self._keys, self._heads, self._ranks = slots, keys, heads, ranks
        self._bound: dict[tuple[int, int], SlotDysco] = {}
        self._parked: dict[int, jax.Array | np.ndarray] = {}
        place, shape = programs.slot_sharding, (ranks * slots, keys)
        self.state = DyscoState(jnp.zeros(shape, jnp.float32, device=place), jnp.zeros(shape, bool, device=place))

    def bind(self, rank: int, slot: int, seq_id: int, dysco: SlotDysco | None) -> None:
        """A slot gets a sequence, which goes on from what was kept of it."""
        if dysco is None:
            self._bound.pop((rank, slot), None)
            return
        self._bound[rank, slot] = dysco
        template = np.zeros(self._keys, bool)
        template[list(dysco.template)] = True
        kept = self._parked.pop(seq_id, None)
        relevance = np.zeros(self._keys, np.float32) if kept is None else np.asarray(kept)
        self.state = self.programs.set_slot(self.state, self._number(rank, slot), relevance, template)

    def park(self, rank: int, parked: ParkedSlot) -> None:
        """Keeps the state of a sequence, which is about to lose its slot; `settle` brings it to the host."""
        if (rank, parked.slot) in self._bound:
            self._parked[parked.seq_id] = self.programs.relevance_of(self.state, self._number(rank, parked.slot))

    def settle(self, parked: Iterable[int]) -> None:
        """What is kept of some sequences waits on the host from now on, and no more on the device."""
        for seq_id in parked:
            if seq_id in self._parked:
                self._parked[seq_id] = np.asarray(self._parked[seq_id])

    def unpark(self, seq_ids: Iterable[int]) -> None:
        """Nobody needs what was kept of some sequences."""
        for seq_id in seq_ids:
            self._parked.pop(seq_id, None)

    def _number(self, rank: int, slot: int) -> np.int32:
        """Of the state's row."""
        return np.int32(rank * self._slots + slot)

    def split[T: (Row, Chunk)](self, parts_of: Sequence[Sequence[T]]) -> tuple[list[list[T]], list[list[T]]]:
        """Rows, or chunks, of each rank that are computed as always, and those that are watched."""
        usual, watched = list[list[T]](), list[list[T]]()
        for rank, parts in enumerate(parts_of):
            is_watched = [self._watches(rank, part) for part in parts]
            usual.append([part for part, one in zip(parts, is_watched, strict=True) if not one])
            watched.append([part for part, one in zip(parts, is_watched, strict=True) if one])
        return usual, watched

    def _watches(self, rank: int, part: Row | Chunk) -> bool:
        dysco = self._bound.get((rank, part.slot))
        return dysco is not None and (isinstance(part, Row) or part.start >= dysco.observed_from)

    def told(self, rows_of: Sequence[Sequence[Row]], padded: int) -> dict[int, Row]:
        """Rows, by number, whose requests want to know what they select.

        Args:
          rows_of: of each rank, all bound.
          padded: rows that each rank's are padded to.
        """
        return {
            rank * padded + number: row
            for rank, rows in enumerate(rows_of)
            for number, row in enumerate(rows)
            if self._bound[rank, row.slot].params.return_selection
        }

    def rows(self, rows_of: Sequence[Sequence[Row]], padded: int) -> tuple[DyscoRows, tuple[int, ...]]:
        """What the device is told of rows, and the layers that are watched; arguments as of `told`."""
        layers = self._layers((rank, row.slot) for rank, rows in enumerate(rows_of) for row in rows)
        out = self.no_rows(padded, layers)
        for rank, rows in enumerate(rows_of):
            for number, row in enumerate(rows, rank * padded):
                dysco = self._bound[rank, row.slot]
                params = dysco.params
                out.slot[number] = row.slot
                out.weights[number] = self._weights(layers, params)
                out.is_first[number] = row.position == dysco.observed_from
                out.history[number] = 1.0 if params.static else params.history
                out.top_p[number] = 1.0 if params.top_p is None else params.top_p
                out.top_k[number] = self._keys if params.top_k is None else min(params.top_k, self._keys)
                out.candidates[number] = dysco.raised_from if params.static else row.position + 1
                out.bias[number] = math.log(params.strength)
        return out, layers

    def chunks(self, batch: PrefillBatch) -> tuple[ObservedChunks, tuple[int, ...]]:
        """What the device is told of watched chunks, and the layers that are watched."""
        layers = self._layers((rank, chunk.slot) for rank, chunks in enumerate(batch.chunks) for chunk in chunks)
        # As many as might be in one chunk: how prompts are cut then makes no other program.
        most = max(
            self._bound[rank, chunk.slot].params.observe - 1
            for rank, chunks in enumerate(batch.chunks)
            for chunk in chunks
        )
        out = self.no_chunks(batch.shape, layers, most)
        for rank, chunks in enumerate(batch.chunks):
            for number, chunk in enumerate(chunks, rank * batch.shape.rows):
                dysco, length = self._bound[rank, chunk.slot], len(chunk.tokens)
                kept, is_first = dysco.params.history, chunk.start == dysco.observed_from
                out.slot[number] = chunk.slot
                out.weights[number] = self._weights(layers, dysco.params)
                out.offsets[number, :length] = (1 - kept) * kept ** np.arange(length - 1, -1, -1.0)
                if is_first:
                    out.offsets[number, 0] = kept ** (length - 1)
                out.history[number] = 0.0 if is_first else kept**length
        return out, layers

    def no_rows(self, padded: int, layers: Sequence[int]) -> DyscoRows:
        """Rows that are all padding; arguments as of `rows`."""
        count = self._ranks * padded
        return DyscoRows(
            slot=np.full(count, self._slots - 1, np.int32),
            weights=np.zeros((count, len(layers), self._heads), np.float32),
            is_first=np.ones(count, bool),
            history=np.zeros(count, np.float32),
            top_p=np.ones(count, np.float32),
            top_k=np.ones(count, np.int32),
            candidates=np.zeros(count, np.int32),
            bias=np.zeros(count, np.float32),
        )

    def no_chunks(self, shape: PrefillShape, layers: Sequence[int], most: int = DEFAULT_OBSERVE - 1) -> ObservedChunks:
        """Chunks that are all padding.

        Args:
          most: tokens of one, at most.
        """
        count = self._ranks * shape.rows
        return ObservedChunks(
            slot=np.full(count, self._slots - 1, np.int32),
            weights=np.zeros((count, len(layers), self._heads), np.float32),
            offsets=np.zeros((count, min(_power_of_two(most), shape.chunk)), np.float32),
            history=np.zeros(count, np.float32),
        )

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program that sets or keeps the state of a sequence."""
        row, nobody = np.zeros(self._keys, np.float32), self._number(0, self._slots - 1)

        def set_slot() -> object:
            self.state = self.programs.set_slot(self.state, nobody, row, np.zeros(self._keys, bool))
            return self.state

        yield "set dysco slot", set_slot
        yield "park dysco slot", lambda: self.programs.relevance_of(self.state, nobody)

    def _layers(self, slots: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """Layers with a head of one of some sequences."""
        return tuple(sorted({layer for slot in slots for layer, _ in self._bound[slot].params.heads}))

    def _weights(self, layers: Sequence[int], params: Dysco) -> np.ndarray:
        """`[layers, heads]`: of the heads that a sequence is decoded by."""
        weights = np.zeros((len(layers), self._heads), np.float32)
        for layer, head in params.heads:
            weights[layers.index(layer), head] = 1 / len(params.heads)
        return weights


@dataclass(frozen=True, slots=True)
class Selections:
    """Selections under way, of those rows, by number, whose requests want to know them."""

    wanted: Mapping[int, Row]
    chosen: Chosen

    def fetch(self) -> dict[int, Selection]:
        """Waits for the device; by sequence."""
        selected, relevance = map(np.asarray, self.chosen)
        return {
            row.seq_id: Selection(
                row.position,
                np.flatnonzero(selected[number]).tolist(),
                relevance[number, : row.position + 1].tobytes(),
            )
            for number, row in self.wanted.items()
        }


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
