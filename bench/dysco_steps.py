"""Seconds of an engine's decode steps, of which some sequences are decoded by DySCO: each kind beside all others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from jaxdual import LLM, DyscoParams, SamplingParams
from jaxdual.decoding.dysco import Mode
from jaxdual.engine.dysco_programs import DyscoPrograms
from jaxdual.engine.dysco_slots import DyscoSlots, SlotDysco
from jaxdual.engine.runner import Runner
from jaxdual.scheduling.plan import Row, StepPlan

MODES = ("exact", "lag", "split", "lag_fresh", "refresh", "static")
TURN = 4  # steps, one after the other; "refresh" looks anew at one of as many
_ROOM = 16  # tokens behind the prompt


@dataclass(frozen=True, slots=True)
class Arm:
    """What is measured beside others.

    Attributes:
      name: that tables show.
      mode: of the sequences decoded by DySCO; None where there are none.
      watched: these sequences, the first of the step.
      peek_only: their first pass alone, by itself.
    """

    name: str
    mode: str | None
    watched: int
    peek_only: bool = False


def arms_of(sequences: int) -> list[Arm]:
    """All kinds of steps of so many sequences; the first is vanilla, and the second is, too."""
    arms = [Arm("vanilla", None, 0), Arm("vanilla again", None, 0)]
    arms += [Arm(mode, mode, sequences) for mode in MODES]
    parts = sorted({sequences, *mixed_sizes(sequences)}, reverse=True)
    for part in parts:
        if part < sequences:
            arms.append(Arm(f"exact, {part} of {sequences}", "exact", part))
            arms.append(Arm(f"static, {part} of {sequences}", "static", part))
    return [*arms, *(Arm(f"first pass of {part}", "exact", part, peek_only=True) for part in parts)]


def mixed_sizes(sequences: int) -> list[int]:
    """How many sequences of a mixed step are decoded by DySCO."""
    return [part for part in (sequences // 2, sequences // 4) if part]


class Steps:
    """An engine with sequences of one length, whose steps can be run again and again.

    All are prefilled by the engine as a request is. A step is then made by its runner, dispatched and fetched, with
    the engine's own programs and packing; what is left out is the scheduler and the front, which do the same for all.
    Which sequences are decoded by DySCO changes between steps; weights, pages and slots are the same.

    Args:
      llm: whose sequences don't overlap steps.
      prompts: one for each sequence, of the same length.
      dysco: of all of them.
    """

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]], dysco: DyscoParams) -> None:
        params = SamplingParams(max_tokens=4 * _ROOM, temperature=0, ignore_eos=True, dysco=dysco)
        requests = [llm.submit({"prompt_token_ids": list(prompt)}, params) for prompt in prompts]
        while any(len(request.outputs[0].token_ids) < _ROOM for request in requests):
            llm.step()
        engine = cast(Any, llm)._engine
        self._runner: Runner = engine.runner
        self._dysco = cast(DyscoSlots, self._runner._dysco)
        outputs = sorted(engine._outputs.values(), key=lambda output: output.sequence.slot)
        self._slots = [(output.sequence.seq_id, output.sequence.slot) for output in outputs]
        self._bound: list[SlotDysco] = [output.dysco for output in outputs]
        self._tokens = [output.sequence.tokens for output in outputs]
        self._start = len(prompts[0])
        # A turn begins where "refresh" looks anew.
        while (self._start - self._bound[0].raised_from) % TURN:
            self._start += 1
        self._first_pass = jax.jit(
            _first_pass(self._dysco.programs), donate_argnames=("arenas", "state"), static_argnames="layers"
        )

    def turn(self, arm: Arm, sequences: int) -> float:
        """Seconds of a step, on average over a turn."""
        self._bind(arm)
        run: Callable[[list[Row]], None] = self._peek if arm.peek_only else self._step
        plans = [self._rows(self._start + offset, sequences) for offset in range(TURN)]
        start = time.perf_counter()
        for rows in plans:
            run(rows)
        return (time.perf_counter() - start) / TURN

    def _bind(self, arm: Arm) -> None:
        self._dysco._bound.clear()
        for (_, slot), bound in zip(self._slots[: arm.watched], self._bound, strict=False):
            is_static = arm.mode == "static"
            mode = cast(Mode, "exact" if is_static else arm.mode)
            params = dataclasses.replace(bound.params, static=is_static, mode=mode, refresh_every=TURN)
            self._dysco._bound[0, slot] = dataclasses.replace(bound, params=params)

    def _rows(self, position: int, sequences: int) -> list[Row]:
        return [
            Row(seq_id, slot, position, tokens[position], position - self._bound[0].prompt_length + 1)
            for (seq_id, slot), tokens in zip(self._slots[:sequences], self._tokens, strict=False)
        ]

    def _step(self, rows: list[Row]) -> None:
        plan = StepPlan(copies=(), tables=(), admitted=(), chunks=(), rows=tuple(rows), preempted=())
        self._runner.fetch(self._runner.dispatch([plan], [], {}))

    def _peek(self, rows: list[Row]) -> None:
        """The first pass of those rows that have one, and the selection by it."""
        device, dysco = self._runner.device, self._dysco
        padded = self._runner.buckets.decode(len(rows))
        slots = np.full((1, padded), device.padding_slot, np.int32)
        tokens, positions = np.zeros((1, padded), np.int32), np.full((1, padded), -1, np.int32)
        slots[0, : len(rows)] = [row.slot for row in rows]
        tokens[0, : len(rows)] = [row.token for row in rows]
        positions[0, : len(rows)] = [row.position for row in rows]
        step = dysco.rows([rows], padded)
        if step is None:
            raise ValueError("none of the rows is decoded by DySCO")
        programs, tables = device.programs, device.group_tables(slots, 1)
        device.arenas, dysco.state, key_bias = self._first_pass(
            programs.leaves,
            device.arenas,
            tokens.reshape(-1),
            positions.reshape(-1),
            tables,
            dysco.state,
            step.peeked,
            layers=step.layers[0],
        )
        jax.block_until_ready(key_bias)


def measure_steps(steps: Steps, sequences: int, turns: int, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Seconds of a step in each turn, of each arm by its name; arms take turns in an order that changes."""
    arms, order = arms_of(sequences), np.random.default_rng(seed)
    for arm in arms:  # compiles
        steps.turn(arm, sequences)
    seconds = np.empty((len(arms), turns))
    for number in range(turns):
        for at in order.permutation(len(arms)):
            seconds[at, number] = steps.turn(arms[at], sequences)
    return {arm.name: of_arm for arm, of_arm in zip(arms, seconds, strict=True)}


def measure_first_tokens(
    llm: LLM, prompts: Sequence[Sequence[int]], params: Mapping[str, DyscoParams | None]
) -> dict[str, np.ndarray]:
    """Seconds from a request to its first token, of each kind of parameters, alone on an engine.

    The prefix cache has the prompt up to the last block with a token of its own: what all kinds compute alike would
    hide what differs.

    Args:
      prompts: one for each turn, in which all kinds compute its end; the first is not counted.
    """
    kinds, order = list(params), np.random.default_rng(0)
    seconds = np.empty((len(kinds), len(prompts)))
    for turn, prompt in enumerate(prompts):
        llm.generate([{"prompt_token_ids": list(prompt)}], SamplingParams(max_tokens=1))
        for at in order.permutation(len(kinds)):
            sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, dysco=params[kinds[at]])
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": list(prompt)}], sampling)
            seconds[at, turn] = time.perf_counter() - start
    return {kind: of_kind[1:] for kind, of_kind in zip(kinds, seconds, strict=True)}


def _first_pass(programs: DyscoPrograms) -> Callable[..., Any]:
    def run(
        leaves: Any, arenas: Any, tokens: Any, positions: Any, tables: Any, state: Any, peeked: Any, layers: Any
    ) -> Any:
        model = programs._programs.model(leaves)
        arenas, state, _, key_bias = programs._chosen(
            model, arenas, tokens, positions, tables, state, peeked, layers, 1, None
        )
        return arenas, state, key_bias

    return run
