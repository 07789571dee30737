"""The engine: takes requests, runs steps, gives tokens. One thread owns it."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxdual.cascade.gate import Verdict
from jaxdual.cascade.work import Work
from jaxdual.engine.dysco_slots import SlotDysco, slot_dysco
from jaxdual.engine.expert_balancer import ExpertBalancer
from jaxdual.engine.judge import Judge
from jaxdual.engine.ranks import Ranks
from jaxdual.engine.request import Hits, Request, Selection, Target, TokenEvent, TokenLogprobs
from jaxdual.engine.router_log import RouterLog
from jaxdual.engine.runner import Launch, Runner, ScoreTargets, StepResult
from jaxdual.engine.sampler import SlotSampling, seed_of, slot_sampling, stop_tokens
from jaxdual.engine.slot_sampler import SlotBinding
from jaxdual.errors import EngineDeadError
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.outputs import RouterFigures
from jaxdual.scheduling.expert_policies import RouterWindow
from jaxdual.scheduling.plan import FinishReason, Phase, SequenceState, StepPlan

if TYPE_CHECKING:  # it speaks with processes, in messages that an engine by itself needs no package for
    from jaxdual.engine.transfers import Transfers
    from jaxdual.engine.wire import Expect, Forget, PeerDied, Settled
    from jaxdual.frames import Message

_TRANSFER_WAIT_SECONDS = 0.05  # at most, while every request waits for stored blocks


@dataclass(slots=True, eq=False)
class _Output:
    """One output of a request: its sequence, what sampling needs of it, and when it came, was read for, and ran."""

    request: Request
    index: int
    rank: int
    sequence: SequenceState
    sampling: SlotSampling
    wants_prompt_logprobs: bool
    added: float
    ran: float | None = None
    read_seconds: float = 0.0
    num_scored: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    dysco: SlotDysco | None = None
    selections: list[Selection] = field(default_factory=list)
    judge: Judge | None = None  # until there is a verdict
    verdict: Verdict | None = None  # until it is told

    @property
    def work(self) -> Work:
        """What is computed for it once all planned steps have run."""
        return Work(self.sequence.lower_tokens, self.sequence.upper_tokens)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way, and how many copies of blocks off the device came before it."""

    launch: Launch
    gathered: int


class Engine:
    """Continuous batching over one runner.

    `step` is the whole loop. With `overlap`, it dispatches the next step before it waits for the one before, so that
    planning and output handling run while the device computes; without, it is the specification of that loop.

    Args:
      runner: the device side.
      ranks: of its devices.
      eos_token_ids: the model's end-of-sequence tokens.
      model_fingerprint: identifies the weights in block keys.
      transfers: what moves blocks to and from a block store, if there is one; for an engine of one rank.
      router_log: of what its routers choose, where that is counted.
      balancer: what moves experts between devices, where they lie on several.
      overlap: see above.
      seed: of the seeds drawn for requests without one; None for a random one.
      clock: seconds, monotonic.

    Attributes:
      prompt_tokens, generation_tokens: of all requests since the start.
      steps: since the start.
    """

    def __init__(
        self,
        runner: Runner,
        ranks: Ranks,
        *,
        eos_token_ids: Sequence[int],
        model_fingerprint: bytes,
        transfers: Transfers | None = None,
        router_log: RouterLog | None = None,
        balancer: ExpertBalancer | None = None,
        overlap: bool = True,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.ranks = ranks
        self.transfers = transfers
        self.router_log, self.balancer = router_log, balancer
        self._eos = tuple(eos_token_ids)
        self._fingerprint = model_fingerprint
        self._overlap = overlap
        self._random = random.Random(seed)
        self._clock = clock
        self._ids = itertools.count()
        self._outputs: dict[int, _Output] = {}
        self._requests: dict[str, list[_Output]] = {}
        self._events: list[TokenEvent] = []
        self._flight: _Flight | None = None
        self._dead: str | None = None
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: requests, events to hand out, a step under way, or blocks to be stored."""
        unsent = self.transfers is not None and self.transfers.has_unsent
        return bool(self._requests or self._events or self._flight or self.ranks.have_news or unsent)

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """See `Runner.warm_ups`."""
        return self.runner.warm_ups(moves=self.balancer is not None and self.balancer.decides)

    @property
    def patience(self) -> float | None:
        """Seconds after which `step` or `poll` is to be called though nothing has come; None for never."""
        if self.has_work:
            return 0.0
        return None if self.transfers is None else self.transfers.patience

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add(self, request: Request, target: Target | None = None) -> None:
        """Queues a request.

        Args:
          target: memory of another engine, where the keys and values of the prompt go when they are computed.

        Raises:
          ValueError: its id is in use, its prompt is empty, it has no `max_tokens`, or nothing of it is left to do.
          EngineDeadError: a step has failed before.
        """
        outputs = self._make_outputs(request)
        if target is not None and self.transfers is not None:
            self.transfers.exports.want(outputs[0].sequence.seq_id, request.request_id, target)
        if self.transfers is not None:
            self.transfers.fetch([output.sequence for output in outputs])
            return
        for output in outputs:
            self.ranks[output.rank].scheduler.add(output.sequence)

    def prefill(self, request: Request, target: Target, hits: Hits, *, moves: bool) -> None:
        """Queues a request for another engine; see `wire.Prefill`. This one holds all layers, and so looks for hits as
        for any request.

        Raises:
          ValueError, EngineDeadError: as `add`.
        """
        self.add(request, target)

    def use_mode(self, mode: str) -> None:
        """See `wire.UseMode`.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"{mode=}: this engine holds all layers, and has no path modes")

    def adopt(self, request: Request, stored: int, *, moved: bool = True) -> None:
        """Queues a request whose prompt has been computed and written to memory that `arrivals` granted under its id.

        Its first output has its first token. If the prompt is lost, it is computed here.

        Args:
          stored: leading blocks of the prompt that are in the store already.
          moved: whether they pass the node's card on their way to the device.

        Raises:
          ValueError, EngineDeadError: as `add`.
        """
        if self.transfers is None:
            raise ValueError(f"request_id={request.request_id!r}: this engine expects nothing from others")
        sequences = [output.sequence for output in self._make_outputs(request)]
        if not self.transfers.adopt(request.request_id, sequences, stored=stored, moved=moved):
            self.transfers.fetch(sequences)

    def _make_outputs(self, request: Request) -> list[_Output]:
        """Takes note of a request; its outputs are still to be queued."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if request.request_id in self._requests:
            raise ValueError(f"request_id={request.request_id!r} is in use")
        params, max_output = request.params, request.params.max_tokens
        if not request.prompt_token_ids or max_output is None:
            raise ValueError("a request needs at least one prompt token and a limit of output tokens")
        root = root_key(self._fingerprint, self.runner.device.layout.fingerprint(), request.salt)
        base_seed = seed_of(params, self._random)
        stops = stop_tokens(params, self._eos)
        given = [tokens if tokens is None else list(tokens) for tokens in request.resumed or [()] * params.n]
        if len(given) != params.n or all(tokens is None or len(tokens) >= max_output for tokens in given):
            raise ValueError(f"{len(given)} outputs are resumed of {params.n}, or all of them are complete")
        prompt_keys = KeyChain(root, self.runner.device.layout.page_size)
        rank, outputs = self.ranks.choose(request, prompt_keys, self._clock()), list[_Output]()
        for index, before in enumerate(given):
            if before is None:
                continue
            wants_prompt = params.prompt_logprobs is not None and index == 0 and not before
            judge = None if request.gate is None else Judge(request.gate)
            dysco = None if request.dysco is None else slot_dysco(request.dysco, request.prompt_token_ids)
            sequence = SequenceState(
                seq_id=next(self._ids),
                tokens=[*request.prompt_token_ids, *before],
                prompt_length=len(request.prompt_token_ids),
                max_output=max_output,
                stop_token_ids=stops,
                min_output=params.min_tokens,
                keys=prompt_keys.copy(),
                priority=request.priority,
                arrival=request.arrival,
                use_cache=not wants_prompt,
                private_from=sys.maxsize if dysco is None else dysco.observed_from,
                whole_from=sys.maxsize if dysco is None else dysco.raised_from,
                single_from=sys.maxsize if dysco is None else dysco.single_from,
                part="lower" if request.gate is not None and request.gate.uses_probe else "whole",
                undecided=judge is not None,
            )
            sampling = slot_sampling(params, base_seed, index, stops, () if judge is None else judge.watched)
            output = _Output(request, index, rank, sequence, sampling, wants_prompt, self._clock(), dysco=dysco)
            output.judge = judge
            outputs.append(output)
        self._requests[request.request_id] = outputs
        self.prompt_tokens += len(request.prompt_token_ids)
        for output in outputs:
            self._outputs[output.sequence.seq_id] = output
        return outputs

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its outputs, now; unknown ids are ignored, since it may just have ended.

        The next `step` hands out an event with `finish_reason` "abort" for each output that was still going.
        """
        if self.transfers is not None:
            self.transfers.exports.cancel(request_id)
        for output in list(self._requests.get(request_id, ())):
            if index is None or output.index == index:
                self._finish(output, "abort")
                self._emit_end(output, None)

    def handle(self, message: Expect | Forget | Settled | PeerDied) -> None:
        """The cluster says something of a prompt that comes from another engine."""
        if self.transfers is not None:
            self.transfers.handle(message)

    def take_messages(self) -> list[Message]:
        """What the cluster is to know, in order."""
        return [] if self.transfers is None else self.transfers.take_messages()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What is readable when `poll` has something to do though there is no work for `step`."""
        return (*self.runner.descriptors, *(() if self.transfers is None else self.transfers.descriptors))

    def poll(self) -> None:
        """Handles what comes from beside the engine; `step` does, too.

        Raises:
          EngineDeadError: a process that it needs has ended.
        """
        if self._dead is not None:
            return
        self.runner.check_processes()
        if self.transfers is not None:
            self._poll_transfers(self.transfers)

    def step(self) -> list[TokenEvent]:
        """Runs one step of the loop, and returns what has happened since the last call.

        Raises:
          EngineDeadError: this step failed, or one before. Every request has ended, its error event comes with the call
            after the failure. What the cache holds is not known any more, so the engine stays dead.
        """
        if self._dead is not None and not self._events:
            raise EngineDeadError(self._dead)
        try:
            self.poll()
            if self._dead is not None:
                pass
            elif self._overlap:
                self._step_overlapped()
            else:
                self._step_plain()
        except Exception as error:
            self._fail(error)
            raise EngineDeadError(self._dead) from error
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, Any]:
        """Counters and figures, named as in `EngineStats`."""
        transfers, figures = self.transfers, self.ranks.stats()
        if transfers is not None:
            figures["num_waiting"] += transfers.num_waiting
        return {
            **figures,
            "dispatch_decisions": dict(self.ranks.dispatch.branches),
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "steps": self.steps,
            "work": self.runner.work,
            **({} if transfers is None else transfers.stats()),
            **({} if self.balancer is None else self.balancer.stats()),
            "routers": self._router_figures(),
        }

    def _router_figures(self) -> RouterFigures | None:
        if self.router_log is None or self.router_log.window is None:
            return None
        return self.router_log.figures(None if self.balancer is None else self.balancer.now)

    def router_statistics(self, *, so_far: bool = False) -> RouterWindow | None:
        """What routers chose in the last full window; None if that is not counted, or not known yet.

        Args:
          so_far: in the window under way instead, which ends; see `RouterLog.end_early`.
        """
        if self.router_log is None:
            return None
        return self.router_log.end_early() if so_far else self.router_log.window

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if KV accounting, queues or requests contradict each other."""
        for rank in self.ranks:
            rank.scheduler.check_integrity()
        self.runner.check_arena()
        if self.transfers is not None:
            self.transfers.check_integrity()

    def close(self) -> None:
        """Lets blocks that are full reach the store, and ends what runs beside the engine; no step follows."""
        while self._dead is None and self.has_work and not self._requests:
            self.step()
        self._dead = self._dead or "the engine is closed"
        if self.transfers is not None:
            self.transfers.close()
        self.runner.close()

    # Transfers.

    def _poll_transfers(self, transfers: Transfers) -> None:
        """Queues the sequences that have waited for stored blocks; waits for some if there is nothing else to do."""
        (rank,) = self.ranks
        idle = not (self._flight or self._events or rank.scheduler.num_waiting or rank.scheduler.num_running)
        wait = idle and (transfers.num_waiting or transfers.has_unsent)
        for sequence, waited in transfers.poll(_TRANSFER_WAIT_SECONDS if wait else 0.0):
            self._outputs[sequence.seq_id].read_seconds = waited
            rank.scheduler.add(sequence)

    def _export(self, transfers: Transfers, plan: StepPlan) -> None:
        """Has prompts leave that the dispatched step completes; one whose last token was all that was left is a row."""
        if not transfers.exports.any_wanted:
            return
        completed = [chunk.seq_id for chunk in plan.chunks if chunk.samples]
        (rank,) = self.ranks
        for seq_id in (*completed, *(row.seq_id for row in plan.rows)):
            groups = range(len(rank.kv.groups))
            held = [(rank.kv.first_of(seq_id, group), tuple(rank.kv.pages_of(seq_id, group))) for group in groups]
            transfers.exports.computed(seq_id, held)

    # The two loops.

    def _step_plain(self) -> None:
        flight = self._launch()
        if flight is not None:
            self._retire(flight)

    def _step_overlapped(self) -> None:
        before, self._flight = self._flight, self._launch()
        if before is not None:
            self._retire(before)

    def _launch(self) -> _Flight | None:
        """Starts the next step; None if there is nothing to do."""
        now = self._clock()
        plans = [rank.scheduler.plan(now) for rank in self.ranks]
        if all(plan.is_empty for plan in plans):
            return None
        self.steps += 1
        window = None if self.router_log is None else self.router_log.before_step()
        if self.balancer is not None:
            self.balancer.before_step(window)
        return self._dispatch(plans)

    def _dispatch(self, plans: Sequence[StepPlan]) -> _Flight:
        bindings = []
        for seq_id in (seq_id for plan in plans for seq_id in plan.admitted):
            output = self._outputs[seq_id]
            sequence = output.sequence
            output.ran = self._clock() if output.ran is None else output.ran
            bindings.append(
                SlotBinding(
                    seq_id=seq_id,
                    rank=output.rank,
                    slot=sequence.slot,
                    sampling=output.sampling,
                    prompt=sequence.tokens[: sequence.prompt_length],
                    output=sequence.tokens[sequence.prompt_length :],
                    dysco=output.dysco,
                )
            )
        targets: dict[int, ScoreTargets] = {}
        for chunk in (chunk for plan in plans for chunk in plan.chunks):
            output = self._outputs[chunk.seq_id]
            if output.wants_prompt_logprobs:
                prompt = output.request.prompt_token_ids
                end = min(chunk.start + len(chunk.tokens), len(prompt) - 1)
                # A preempted sequence computes positions again that were scored before.
                if chunk.start <= output.num_scored < end:
                    targets[chunk.seq_id] = ScoreTargets(
                        skip=output.num_scored - chunk.start, tokens=tuple(prompt[output.num_scored + 1 : end + 1])
                    )
                    output.num_scored = end
        if self.transfers is None:
            return _Flight(self.runner.dispatch(plans, bindings, targets), 0)
        (plan,) = plans
        self.transfers.save(plan.published)
        launch = self.runner.dispatch(plans, bindings, targets)
        self.transfers.unstaged(plan.unstaged)
        self._export(self.transfers, plan)
        return _Flight(launch, self.transfers.num_gathered)

    def _retire(self, flight: _Flight) -> None:
        result = self.runner.fetch(flight.launch)
        if self.transfers is not None:
            self.transfers.settle(flight.gathered)
        for seq_id, selection in result.selections:
            if seq_id in self._outputs:
                self._outputs[seq_id].selections.append(selection)
        for seq_id, scores in result.prompt_logprobs.items():
            if seq_id in self._outputs:
                self._outputs[seq_id].prompt_logprobs.extend(scores)
        for seq_id, p_ik in result.p_ik:
            if seq_id in self._outputs:
                self._take_p_ik(self._outputs[seq_id], p_ik)
        self._take_tokens(result)

    def _take_p_ik(self, output: _Output, p_ik: float) -> None:
        """A prompt has gone through the lower layers; one that had to give way meanwhile is asked again."""
        judge = output.judge
        if judge is None or judge.p_ik is not None:
            return
        verdict = judge.after_prompt(p_ik)
        output.sequence.open()
        if verdict is not None:
            self._take_verdict(output, judge, verdict)

    def _take_verdict(self, output: _Output, judge: Judge, verdict: Verdict) -> None:
        """Ends an output that is refused; one that is not goes on as any other."""
        output.judge, output.verdict = None, verdict
        output.sequence.undecided = False
        if verdict.passed:
            for event in judge.withheld:
                self._tell(output, event)
            return
        self._finish(output, "refused")
        output.sequence.finish_reason = "refused"  # also of one whose first token was all that it was to give
        self._emit_end(output, None)

    def _take_tokens(self, result: StepResult) -> None:
        live = [
            (output, sampled) for sampled in result.sampled if (output := self._outputs.get(sampled.seq_id)) is not None
        ]
        self.generation_tokens += len(live)
        now = self._clock()
        for number, rank in enumerate(self.ranks):
            own = ((output.sequence, sampled.token) for output, sampled in live if output.rank == number)
            rank.scheduler.complete(own, now)
        for output, sampled in live:
            sequence = output.sequence
            event = TokenEvent(
                output.request.request_id,
                output.index,
                sampled.token,
                sampled.logprobs,
                sequence.finish_reason,
                sampled.token if sequence.finish_reason == "stop" else None,
                sequence.cached or 0,
            )
            if output.selections:
                event.selections, output.selections = tuple(output.selections), []
            if sequence.num_output == 1:
                if output.wants_prompt_logprobs:
                    event.prompt_logprobs = tuple(output.prompt_logprobs)
                if output.ran is not None:
                    event.read_seconds = output.read_seconds
                    event.queue_seconds = output.ran - output.added - output.read_seconds
            if output.judge is None:
                self._tell(output, event)
                continue
            judge, ended = output.judge, sequence.phase is Phase.FINISHED
            judge.withheld.append(event)
            verdict = judge.after_token(sampled.token, sampled.watched, last=ended)
            if verdict is not None:
                self._take_verdict(output, judge, verdict)

    def _tell(self, output: _Output, event: TokenEvent) -> None:
        event.verdict, output.verdict = output.verdict, None
        if event.finish_reason is not None:
            event.work = output.work
        self._events.append(event)
        if event.finish_reason is not None:
            self._forget(output)

    # Ends.

    def _finish(self, output: _Output, reason: FinishReason) -> None:
        """Ends a sequence wherever it is."""
        sequence = output.sequence
        if self.transfers is not None:
            self.transfers.exports.drop(sequence.seq_id)
        if self.transfers is not None and self.transfers.drop(sequence):
            sequence.phase, sequence.finish_reason = Phase.FINISHED, reason
        else:
            self.ranks[output.rank].scheduler.finish(sequence, reason)

    def _emit_end(self, output: _Output, error: str | None) -> None:
        sequence = output.sequence
        self._events.append(
            TokenEvent(
                request_id=output.request.request_id,
                index=output.index,
                token=None,
                finish_reason=sequence.finish_reason,
                cached_tokens=sequence.cached or 0,
                error=error,
                verdict=output.verdict,
                work=output.work,
            )
        )
        self._forget(output)

    def _forget(self, output: _Output) -> None:
        del self._outputs[output.sequence.seq_id]
        outputs = self._requests[output.request.request_id]
        outputs.remove(output)
        if not outputs:
            del self._requests[output.request.request_id]
            self.ranks.ended(output.rank, output.request.request_id)

    def _fail(self, error: Exception) -> None:
        self._flight = None
        known = isinstance(error, EngineDeadError)
        self._dead = f"the engine has failed: {error if known else f'{type(error).__name__}: {error}'}"
        for output in list(self._outputs.values()):
            self._finish(output, "error")
            self._emit_end(output, self._dead)
