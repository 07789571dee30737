"""The layerwise prefill engine: computes prompts for decode engines, and keeps nothing of them. One thread owns it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxdual.agent.wire import GroupSlots
from jaxdual.engine.agent_link import AgentLink
from jaxdual.engine.layerwise.cost import measure_cost
from jaxdual.engine.layerwise.forward import Forward, Pace, Part
from jaxdual.engine.layerwise.job import Job, Place
from jaxdual.engine.layerwise.reads import JobReads
from jaxdual.engine.layerwise.ring import Ring
from jaxdual.engine.layerwise.runner import LayerRunner
from jaxdual.engine.layerwise.stages import Stages
from jaxdual.engine.request import Hits, Request, Target, TokenEvent
from jaxdual.engine.sampler import seed_of, slot_sampling, stop_tokens
from jaxdual.engine.slot_sampler import Sampled, SlotBinding
from jaxdual.engine.wire import AgentAt, HandedOff, HitsRead
from jaxdual.errors import EngineDeadError
from jaxdual.frames import Message
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.slots import IntegrityError, SlotPool
from jaxdual.kv.staging import Staging
from jaxdual.scheduling.path_modes import MODES, PathMode
from jaxdual.scheduling.plan import Chunk
from jaxdual.scheduling.quota import AttentionCost, AttentionShape, ChunkRules, PrefillWork, pack

_WAIT_SECONDS = 0.05  # for news of the agent, between two looks at deadlines


class PrefillEngine:
    """Takes prompts with a place where their blocks go.

    A job first has its hits read: the first ones by this engine's agent, into staging pages, those behind by the decode
    engine's, to where they belong. Then passes over the model compute what is left, as much at a time as the compute
    quota and the device's pages allow. Each pass brings all earlier blocks of its jobs to the device, stage by stage,
    and writes those that are new to the decode engine. What this engine read itself goes there in the job's first
    pass. Nothing is kept on the device: a prompt that takes several passes has its earlier blocks come again in each.

    Args:
      runner: the device side.
      link: to the KV agent.
      staging: pages that this engine's reads go to.
      places: where these lie in the slab.
      landing, leaving: memory that blocks pass through to and from the device.
      shape: of the model's attention, for the compute quota.
      quota_seconds: attention time of a pass, of all layers, in modes that have a quota.
      mode: the first path mode.
      stages_of: in which a mode's passes run.
      max_model_len: tokens of the longest sequence.
      max_num_seqs: prompts that end in one pass.
      max_num_batched_tokens: tokens of a pass.
      eos_token_ids: the model's end-of-sequence tokens.
      model_fingerprint: identifies the weights in block keys.
      load_timeout: seconds after which a prompt goes on without stored blocks.
      pace: of the device.
      seed: of the seeds drawn for requests without one; None for a random one.
    """

    def __init__(
        self,
        runner: LayerRunner,
        link: AgentLink,
        staging: Staging,
        places: GroupSlots,
        *,
        landing: Ring,
        leaving: Ring,
        shape: AttentionShape,
        quota_seconds: float,
        mode: PathMode,
        stages_of: Callable[[PathMode], Stages],
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Sequence[int],
        model_fingerprint: bytes,
        load_timeout: float,
        pace: Pace,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self._cost = AttentionCost(shape, 0.0, 0.0, 0.0)  # until it is measured
        self._quota_seconds, self._mode, self._stages_of = quota_seconds, mode, stages_of
        self._max_model_len = max_model_len
        self._unmeasured = False
        self._link = link
        self._reads = JobReads(link, staging, places, timeout=load_timeout, clock=clock, on_over=self._read_over)
        self._landing, self._leaving, self._pace = landing, leaving, pace
        # A piece costs all that comes before it again: it is not worth while for a page.
        self._rules = ChunkRules(
            min_chunk=max(1, max_num_batched_tokens // 4),
            align=runner.layout.page_size,
            max_tokens=max_num_batched_tokens,
        )
        self._eos, self._fingerprint = tuple(eos_token_ids), model_fingerprint
        self._clock = clock
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._jobs: dict[int, Job] = {}  # in the order in which they came
        self._names: dict[str, Job] = {}
        self._passes: deque[Forward] = deque()
        self._told: set[Forward] = set()  # those whose tokens were taken
        self._pages = SlotPool(runner.num_pages)
        self._slots = SlotPool(max_num_seqs)
        self._events: list[TokenEvent] = []
        self._messages: list[Message] = []
        self._dead: str | None = None
        self._counts: Counter[str] = Counter()
        self._store_wait_seconds = 0.0
        link.on_death(self._agent_died)

    # What the engine's process asks.

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Name of every program in every shape, and a call that compiles it and returns the seconds it took; then the
        same for the measurement of what attention costs.
        """
        yield from self.runner.warm_ups()
        yield "cost of attention", self._measure

    def use_mode(self, mode: str) -> None:
        """Goes on in another path mode, with everything compiled.

        Raises:
          ValueError: no such mode, or something is under way.
        """
        if mode not in MODES:
            raise ValueError(f"{mode=} must be one of {', '.join(MODES)}")
        if self.has_work:
            raise ValueError(f"{len(self._jobs)} prompts are under way")
        self.runner.use(self._stages_of(MODES[mode]))
        self._pages = SlotPool(self.runner.num_pages)
        self._mode = MODES[mode]
        for _, run in self.runner.warm_ups():
            run()

    def _measure(self) -> float:
        """Measures what attention costs now, or as soon as nothing runs."""
        start = time.perf_counter()
        self._unmeasured = bool(self._jobs or self._passes)
        if not self._unmeasured:
            self._cost = measure_cost(self.runner, self._cost.shape, self._max_model_len)
        return time.perf_counter() - start

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._passes or self._events or self._messages)

    @property
    def patience(self) -> float | None:
        """See `Engine.patience`."""
        if self._events or self._messages or self._dead is not None:
            return 0.0
        waits = [forward.patience for forward in self._passes]
        return (
            min([_WAIT_SECONDS, *(wait for wait in waits if wait is not None)]) if self._jobs else self._link.patience
        )

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._link.descriptors

    def prefill(self, request: Request, target: Target, hits: Hits, *, moves: bool) -> None:
        """Queues a prompt; see `wire.Prefill`.

        Raises:
          ValueError: its id is in use, or it is no prompt with one output token to come.
          EngineDeadError: a step has failed before.
        """
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if request.request_id in self._names:
            raise ValueError(f"request_id={request.request_id!r} is in use")
        params = request.params
        before = request.resumed[0] if request.resumed else ()
        if not request.prompt_token_ids or params.n != 1 or before is None or params.max_tokens != len(before) + 1:
            raise ValueError("a prompt and one token more are what this engine computes")
        tokens = [*request.prompt_token_ids, *before]
        stops = stop_tokens(params, self._eos)
        root = root_key(self._fingerprint, self.runner.layout.fingerprint(), request.salt)
        here = min(hits.here, self._reads.most_blocks)
        job = Job(
            number=next(self._numbers),
            request=request,
            target=target,
            hits=hits,
            moves=moves,
            tokens=tokens,
            keys=KeyChain(root, self.runner.layout.page_size).upto(tokens, here) if moves else [],
            sampling=slot_sampling(params, seed_of(params, self._random), 0, stops),
            stop_token_ids=stops,
            added=self._clock(),
            read_here=None if hits.here and moves else hits.here,
            read_there=None if hits.there and moves else hits.there,
        )
        self._jobs[job.number] = self._names[request.request_id] = job
        self._counts["prompt_tokens"] += len(request.prompt_token_ids)
        attached = self._link.attached
        if moves and (attached is None or attached.address != target.peer):
            job.failed = True  # granted to an agent that has died
        elif job.read_here is None:
            self._reads.add(job)
        self._note_ready(job)

    def handle(self, message: object) -> None:
        """The cluster says how many of a job's blocks the decode engine has read."""
        if isinstance(message, HitsRead):
            job = self._names.get(message.request_id)
            if job is not None and job.read_there is None:
                job.read_there = message.blocks
                self._note_ready(job)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a job; `HandedOff` says when nothing of it is under way. Unknown ids are ignored."""
        job = self._names.get(request_id)
        if job is not None:
            job.failed = True

    def poll(self) -> None:
        """Goes on as far as it can without waiting."""
        if self._dead is None:
            self._link.poll()
            if not self._link.alive:
                raise EngineDeadError("there is no KV agent any more")
            self._reads.go_on()
            self._advance()
            self._settle()
            if self._unmeasured:
                self._measure()

    def step(self) -> list[TokenEvent]:
        """Goes on, and returns the tokens that have come since the last call.

        Raises:
          EngineDeadError: this step failed, or one before.
        """
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        try:
            self.poll()
        except Exception as error:
            self._dead = f"the engine has failed: {type(error).__name__}: {error}"
            raise EngineDeadError(self._dead) from error
        events, self._events = self._events, []
        return events

    def take_messages(self) -> list[Message]:
        """What the cluster is to know, in order."""
        address = self._link.new_address()
        messages, self._messages = self._messages, []
        return [*([] if address is None else [AgentAt(address)]), *messages]

    def stats(self) -> dict[str, Any]:
        """Counters and figures, named as in `EngineStats`."""
        passing = sum(job.passing for job in self._jobs.values())
        return {
            **self._counts,
            "store_blocks_read": self._reads.read,
            "store_blocks_failed": self._reads.failed,
            "store_timeouts": self._reads.timeouts,
            "store_wait_seconds": self._store_wait_seconds,
            "num_running": passing,
            "num_waiting": len(self._jobs) - passing,
            "kv_blocks": self.runner.num_pages,
            "kv_blocks_available": self._pages.num_free,
            "kv_agent_restarts": self._link.restarts,
            "kv_staging_blocks_used": self._reads.num_used,
        }

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if memory and jobs contradict each other."""
        self.runner.check_arena()
        self._reads.check_integrity(self._jobs.values())
        held = [
            page for forward in self._passes if not forward.computed for part in forward.parts for page in part.pages
        ]
        self._pages.check(held)
        self._slots.check(job.slot for job in self._jobs.values() if job.slot >= 0)
        if not self._jobs and (self._landing.num_lent or self._leaving.num_lent):
            raise IntegrityError(
                f"{self._landing.num_lent}, {self._leaving.num_lent} pieces are lent, and nothing runs"
            )

    def close(self) -> None:
        """Ends what runs beside the engine; no step follows."""
        self._dead = self._dead or "the engine is closed"
        self._link.close(1.0)

    def _read_over(self, job: Job, blocks: int) -> None:
        """This engine has read so many leading blocks of a job, and reads no more."""
        self._note_ready(job)
        self._messages.append(HitsRead(job.request.request_id, blocks))

    # Passes.

    def _advance(self) -> None:
        while True:
            free = True
            for forward in list(self._passes):
                was_computed = forward.computed
                forward.advance(compute=free)
                free = forward.computed
                if free and not was_computed:
                    for part in forward.parts:
                        self._pages.free(part.pages)
            for forward in self._passes:
                if forward.sampled and forward not in self._told:
                    self._told.add(forward)
                    self._take_tokens(forward)
            # Not before its tokens were taken: they may have come between the two looks.
            while self._passes and self._passes[0] in self._told and self._passes[0].over:
                self._retire(self._passes.popleft())
            if not self._begin_pass():
                return

    def _begin_pass(self) -> bool:
        """Begins another pass, if there is work and room; the next one comes while the last one is still computed."""
        most = 1 if self.runner.stages.count == 1 else 2
        if len(self._passes) >= most or (self._passes and not self._passes[-1].landed):
            return False
        work = self._waiting_work()
        if not work:
            return False
        quota = self._quota_seconds if self._mode.quota else float("inf")
        packed = pack(work, quota, self._cost, self._rules)
        parts = [self._part(self._jobs[one.request_id], count) for one, count in packed]
        batches = self.runner.buckets.prefill([[part.chunk for part in parts]])
        self._passes.append(
            Forward(
                parts,
                batches,
                runner=self.runner,
                link=self._link,
                landing=self._landing,
                leaving=self._leaving,
                pace=self._pace,
            )
        )
        self._counts["steps"] += 1
        self._counts["computed_prompt_tokens"] += sum(len(part.chunk.tokens) for part in parts)
        return True

    def _waiting_work(self) -> list[PrefillWork]:
        """What jobs have left to compute, first come first, as far as there are pages for it and slots."""
        layout, work = self.runner.layout, list[PrefillWork]()
        pages = self._pages.num_free
        for job in sorted(self._jobs.values(), key=lambda job: (job.request.priority, job.request.arrival, job.number)):
            if job.failed or job.sampled or job.passing or job.pushes or job.ready is None:
                continue
            need = layout.pages_for(len(job.tokens))
            remaining = min(len(job.tokens), pages * layout.page_size) - job.computed
            if len(work) == self._slots.num_free or remaining < 1 or (need > pages and work):
                break
            work.append(PrefillWork(job.number, job.computed, remaining))
            pages -= min(need, pages)
        return work

    def _note_ready(self, job: Job) -> None:
        """Nothing of a job is read any more, if that is so."""
        if not job.reads_over or job.ready is not None or job.failed:
            return
        now = job.ready = self._clock()
        job.cached = job.computed = job.hit_blocks * self.runner.layout.page_size
        self._counts["prefix_cache_queries"] += len(job.tokens)
        self._counts["prefix_cache_hits"] += job.cached
        self._counts["store_cache_hits"] += job.cached
        self._store_wait_seconds += now - job.added if job.hits.here or job.hits.there else 0.0

    def _part(self, job: Job, count: int) -> Part:
        page_size = self.runner.layout.page_size
        start, end = job.computed, job.computed + count
        samples = end == len(job.tokens)
        if samples:
            job.slot = self._take(self._slots)
            prompt, output = job.tokens[: job.prompt_length], job.tokens[job.prompt_length :]
            self.runner.sampler.bind(SlotBinding(job.number, 0, job.slot, job.sampling, prompt, output))
        chunk = Chunk(job.number, job.slot, start, job.tokens[start:end], samples, job.num_output)
        pages = [self._take(self._pages) for _ in range(self.runner.layout.pages_for(end))]
        comes: list[tuple[int, Place]] = []
        goes: list[int] = []
        if job.moves:
            own = self._reads.blocks_of(job)
            comes = [(block, job.place(block, own)) for block in range(self.runner.layout.pages_for(start))]
            first = start // page_size
            # What this engine has read itself goes with the first pass.
            goes = [*(range(min(len(own), first)) if job.ran is None else ()), *range(first, len(pages))]
        if job.ran is None:
            job.ran = self._clock()
        job.passing, job.computed = True, end
        return Part(job, chunk, pages, comes, goes)

    @staticmethod
    def _take(pool: SlotPool) -> int:
        slot = pool.take()
        if slot is None:
            raise IntegrityError("a pass was planned without room for it")
        return slot

    def _take_tokens(self, forward: Forward) -> None:
        """Takes the tokens of a pass, of which something may still be on its way out."""
        sampled = {one.seq_id: one for one in forward.fetch()}
        for stream in forward.streams:
            for row, chunk in enumerate(stream.batch.chunks[0]):
                job = self._jobs[chunk.seq_id]
                if job.wants_scores:
                    wanted = job.tokens[chunk.start + 1 : chunk.start + len(chunk.tokens) + 1]
                    job.scores += self.runner.sampler.score(stream.x, row * stream.batch.shape.chunk, wanted)
        for part in forward.parts:
            job = part.job
            if part.chunk.samples:
                self._slots.free([job.slot])
                job.slot, job.sampled = -1, True
                if not job.failed:
                    self._give(job, sampled[job.number])

    def _retire(self, forward: Forward) -> None:
        """Nothing of a pass is on the device any more."""
        self._told.discard(forward)
        for part in forward.parts:
            part.job.passing = False

    def _give(self, job: Job, sampled: Sampled) -> None:
        self._counts["generation_tokens"] += 1
        stops = sampled.token in job.stop_token_ids and job.num_output + 1 > job.request.params.min_tokens
        event = TokenEvent(
            job.request.request_id,
            0,
            sampled.token,
            sampled.logprobs,
            "stop" if stops else "length",
            sampled.token if stops else None,
            job.cached,
        )
        if not job.num_output and job.ready is not None and job.ran is not None:
            event.read_seconds = job.ready - job.added
            event.queue_seconds = job.ran - job.ready
            if job.wants_scores:
                event.prompt_logprobs = tuple(job.scores)
        self._events.append(event)

    # Ends.

    def _settle(self) -> None:
        """Says of jobs that nothing of them is under way any more, and forgets them."""
        for job in [job for job in self._jobs.values() if job.over]:
            del self._jobs[job.number]
            del self._names[job.request.request_id]
            self._reads.end(job)
            self._messages.append(HandedOff(job.request.request_id, not job.failed, job.broken))

    def _agent_died(self) -> None:
        """All that was under way is lost, and all that was read."""
        for forward in self._passes:
            forward.abandon()
            if not forward.computed:
                for part in forward.parts:
                    self._pages.free(part.pages)
        self._passes.clear()
        self._told.clear()
        self._landing.reset()
        self._leaving.reset()
        for job in self._jobs.values():
            job.broken |= job.pushes > 0
            job.failed, job.passing, job.pushes = True, False, 0
            if job.slot >= 0:
                self._slots.free([job.slot])
                job.slot = -1
