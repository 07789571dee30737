"""The sequences of an engine that are decoded by DySCO, a slot each, whose state lies on the device.

Such a sequence's prompt is computed as any up to `SlotDysco.observed_from`. The tokens from there on are watched, and
those from `raised_from` on are computed one at a time, with the attention to what retrieval heads look at raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxdual.decoding.dysco import DEFAULT_OBSERVE, MAX_OBSERVE, Dysco, first_observed, first_raised, template_mask
from jaxdual.engine.buckets import Buckets, PrefillBatch, PrefillShape
from jaxdual.engine.dysco import Chosen, DyscoRows, DyscoState, ObservedChunks, PassedRows
from jaxdual.engine.dysco_programs import DyscoPrograms
from jaxdual.engine.request import Selection
from jaxdual.engine.steps import Programs
from jaxdual.scheduling.plan import Chunk, ParkedSlot, Row

_NO_ROW = 2**30  # what is written to such a row is dropped

_Numbered = tuple[int, Row]  # a row, and its number among all of its rank


@dataclass(frozen=True, slots=True)
class SlotDysco:
    """How a sequence is decoded.

    Attributes:
      params: of the request.
      prompt_length: tokens of the prompt.
      observed_from: position of the first token whose attention counts.
      raised_from: position of the first token with raised attention.
      template: positions in the prompt that are never raised.
    """

    params: Dysco
    prompt_length: int
    observed_from: int
    raised_from: int
    template: Sequence[int]

    @property
    def single_from(self) -> int:
        """Position of the first token that is computed by itself."""
        if self.params.mode == "tail_chunk":
            return self.prompt_length
        return self.raised_from

    def peeks(self, position: int) -> bool:
        """Whether a token goes through the model twice: nothing is known of what it should look at, or is to be new."""
        params = self.params
        if position == self.observed_from:
            return True
        if params.static:
            return False
        if params.mode == "refresh":
            return (position - self.raised_from) % params.refresh_every == 0
        return params.mode in ("exact", "tail_chunk")


def slot_dysco(params: Dysco, prompt: Sequence[int]) -> SlotDysco:
    """How a prompt is decoded."""
    sizes = len(prompt), params.tail, params.observe
    template = np.flatnonzero(template_mask(prompt, params.template_sequences)).tolist()
    return SlotDysco(params, len(prompt), first_observed(*sizes), first_raised(*sizes), template)


class DyscoSlots:
    """The sequences that are decoded so, by rank and slot.

    Args:
      programs: of the engine.
      buckets: padded shapes.
      slots: of a rank, with one of padding, which is the last.
      keys: that a table has room for.
      heads: query heads of a layer.
      ranks: that have slots.
      layers: that sequences are watched in which have heads in some of them.

    Attributes:
      programs: that work on the state.
      state: on the device.
    """

    def __init__(
        self,
        programs: Programs,
        buckets: Buckets,
        *,
        slots: int,
        keys: int,
        heads: int,
        ranks: int,
        layers: Sequence[int] = (),
    ) -> None:
        self.programs, self._buckets, self._usual = DyscoPrograms(programs), buckets, tuple(layers)
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

    def split(
        self, chunks_of: Sequence[Sequence[Chunk]]
    ) -> tuple[list[list[Chunk]], list[list[Chunk]], list[list[Chunk]]]:
        """Chunks of each rank that are computed as always, those that are observed, and those that are raised."""
        usual, observed, raised = ([list[Chunk]() for _ in chunks_of] for _ in range(3))
        for rank, chunks in enumerate(chunks_of):
            for chunk in chunks:
                dysco = self._bound.get((rank, chunk.slot))
                if dysco is None or chunk.start < dysco.observed_from:
                    usual[rank].append(chunk)
                elif chunk.start < dysco.raised_from:
                    observed[rank].append(chunk)
                else:
                    raised[rank].append(chunk)
        return usual, observed, raised

    def rows(self, rows_of: Sequence[Sequence[Row]], padded: int) -> DyscoStep | None:
        """What the device is told of those rows that are decoded so; None if there are none.

        Args:
          rows_of: of each rank.
          padded: rows that each rank's are padded to.
        """
        peeked, passed = ([list[_Numbered]() for _ in rows_of] for _ in range(2))
        for rank, rows in enumerate(rows_of):
            for number, row in enumerate(rows):
                dysco = self._bound.get((rank, row.slot))
                if dysco is not None and row.position >= dysco.raised_from:
                    (peeked if dysco.peeks(row.position) else passed)[rank].append((number, row))
        if not any(peeked) and not any(passed):
            return None
        step = DyscoStep()
        if any(peeked):
            count, layers = self._watched_size(peeked, padded), self._layers(peeked)
            step.peeked = self._filled(self.no_rows(count, layers), peeked, layers)
            step.layers, step.wanted[0] = (layers, ()), self._wanted(peeked, count)
        if any(passed):
            count, layers = self._watched_size(passed, padded), self._layers(passed, static=False)
            step.passed = self._passed(self._filled(self.no_rows(count, layers), passed, layers), passed)
            step.layers, step.wanted[1] = (step.layers[0], layers), self._wanted(passed, count)
        return step

    def tails(self, chunks_of: Sequence[Sequence[Chunk]], seqs: int) -> tuple[DyscoStep, TailRows]:
        """What the device is told of chunks whose tokens are raised all at once, as rows of a decode step.

        Args:
          chunks_of: of each rank, at least one.
          seqs: chunks that each rank's are padded to.
        """
        each = _bucket(max(len(chunk.tokens) for chunks in chunks_of for chunk in chunks))
        numbered = [list[_Numbered]() for _ in chunks_of]
        tails = TailRows.empty(self._ranks, seqs, each, self._slots - 1)
        for rank, chunks in enumerate(chunks_of):
            for index, chunk in enumerate(chunks):
                # The last token of each is the last of its rows, where the one that follows is sampled from.
                first = (index + 1) * each - len(chunk.tokens)
                for offset, token in enumerate(chunk.tokens):
                    number, position = first + offset, chunk.start + offset
                    tails.slots[rank, number], tails.tokens[rank, number] = chunk.slot, token
                    tails.positions[rank, number] = position
                    numbered[rank].append((number, Row(chunk.seq_id, chunk.slot, position, token, 0)))
        layers = self._layers(numbered)
        rows = self._filled(self.no_rows(seqs * each, layers), numbered, layers, in_place=True)
        wanted = self._wanted(numbered, seqs * each, in_place=True)
        return DyscoStep(rows, None, (layers, ()), [wanted, {}]), tails

    def chunks(self, batch: PrefillBatch) -> tuple[ObservedChunks, tuple[int, ...]]:
        """What the device is told of observed chunks, and the layers that are watched."""
        layers = self._layers([[(0, chunk) for chunk in chunks] for chunks in batch.chunks])
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
            row=np.full(count, _NO_ROW, np.int32),
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
            offsets=np.zeros((count, min(_bucket(most), shape.chunk)), np.float32),
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

    def _watched_size(self, numbered: Sequence[Sequence[_Numbered]], padded: int) -> int:
        return self._buckets.watched(max(map(len, numbered)), padded)

    def _filled(
        self,
        out: DyscoRows,
        numbered: Sequence[Sequence[_Numbered]],
        layers: Sequence[int],
        *,
        in_place: bool = False,
    ) -> DyscoRows:
        """Writes rows into padding.

        Args:
          in_place: each where its number says, as all are; else they are one after the other.
        """
        padded = len(out.slot) // self._ranks
        for rank, rows in enumerate(numbered):
            for index, (number, row) in enumerate(rows):
                dysco, at = self._bound[rank, row.slot], rank * padded + (number if in_place else index)
                params = dysco.params
                out.row[at], out.slot[at] = number, row.slot
                out.is_first[at] = row.position == dysco.observed_from
                if out.is_first[at] or not params.static:
                    out.weights[at] = self._weights(layers, params)
                out.history[at] = 1.0 if params.static else params.history
                out.top_p[at] = 1.0 if params.top_p is None else params.top_p
                out.top_k[at] = self._keys if params.top_k is None else min(params.top_k, self._keys)
                out.candidates[at] = dysco.raised_from if params.static else row.position + 1
                out.bias[at] = math.log(params.strength)
        return out

    def _passed(self, rows: DyscoRows, numbered: Sequence[Sequence[_Numbered]]) -> PassedRows:
        count = len(rows.slot)
        known, below, is_fresh = np.zeros(count, np.int32), np.zeros(count, np.float32), np.zeros(count, bool)
        for rank, own in enumerate(numbered):
            for at, (_, row) in enumerate(own, rank * (count // self._ranks)):
                dysco = self._bound[rank, row.slot]
                params = dysco.params
                known[at] = dysco.raised_from if params.static else row.position
                below[at] = 0.0 if params.mode == "split" else rows.bias[at]
                is_fresh[at] = not params.static and params.mode in ("split", "lag_fresh")
        return PassedRows(rows, known, below, is_fresh)

    def _wanted(
        self, numbered: Sequence[Sequence[_Numbered]], padded: int, *, in_place: bool = False
    ) -> dict[int, Row]:
        """Rows whose requests want to know what they select, by their number among those that are told."""
        return {
            rank * padded + (number if in_place else index): row
            for rank, rows in enumerate(numbered)
            for index, (number, row) in enumerate(rows)
            if self._bound[rank, row.slot].params.return_selection
        }

    def _layers(self, numbered: Sequence[Sequence[tuple[int, Row | Chunk]]], *, static: bool = True) -> tuple[int, ...]:
        """Layers with a head of one of some sequences.

        Args:
          static: whether those that select once are watched, too.
        """
        params = [self._bound[rank, part.slot].params for rank, parts in enumerate(numbered) for _, part in parts]
        layers = {layer for one in params if static or not one.static for layer, _ in one.heads}
        # Layers of which no head has a weight cost little, and programs for those configured are there.
        return self._usual if layers and layers.issubset(self._usual) else tuple(sorted(layers))

    def _weights(self, layers: Sequence[int], params: Dysco) -> np.ndarray:
        """`[layers, heads]`: of the heads that a sequence is decoded by."""
        weights = np.zeros((len(layers), self._heads), np.float32)
        for layer, head in params.heads:
            weights[layers.index(layer), head] = 1 / len(params.heads)
        return weights


@dataclass(slots=True)
class DyscoStep:
    """What a decode step is told of the sequences that are decoded so.

    Attributes:
      peeked, passed, layers: see `DyscoPrograms.decode`.
      wanted: peeked and passed rows, by number, whose requests want to know what they select.
    """

    peeked: DyscoRows | None = None
    passed: PassedRows | None = None
    layers: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    wanted: list[dict[int, Row]] = field(default_factory=lambda: [{}, {}])


class TailRows(NamedTuple):
    """Rows of a decode step, `each` of them tokens of one sequence."""

    slots: Int32[np.ndarray, "ranks rows"]
    tokens: Int32[np.ndarray, "ranks rows"]
    positions: Int32[np.ndarray, "ranks rows"]
    each: int

    @classmethod
    def empty(cls, ranks: int, seqs: int, each: int, padding_slot: int) -> TailRows:
        """Rows that are all padding."""
        shape = ranks, seqs * each
        return cls(
            np.full(shape, padding_slot, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32), each
        )


@dataclass(frozen=True, slots=True)
class Selections:
    """Selections under way, of those rows, by number, whose requests want to know them."""

    wanted: Mapping[int, Row]
    chosen: Chosen

    def fetch(self) -> Iterator[tuple[int, Selection]]:
        """Waits for the device; each with its sequence, in order."""
        selected, relevance = map(np.asarray, self.chosen)
        for number, row in self.wanted.items():
            tokens = relevance[number, : row.position + 1].tobytes()
            yield row.seq_id, Selection(row.position, np.flatnonzero(selected[number]).tolist(), tokens)


def _bucket(least: int) -> int:
    """Tokens that so few are padded to: the usual numbers of observed and of tail tokens make one program."""
    return DEFAULT_OBSERVE if least <= DEFAULT_OBSERVE else MAX_OBSERVE
