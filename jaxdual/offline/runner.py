"""Runs the lines of a batch through an engine and writes a row for each."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxdual.api import LLM
from jaxdual.cascade.serving.blocking import BlockingCascade
from jaxdual.cascade.serving.prompt import CascadePrompt
from jaxdual.front import TokenizedPrompt
from jaxdual.offline.batch_file import BatchLine, RejectedLine
from jaxdual.offline.rows import engine_params, error_row, parse_body, response_row
from jaxdual.openai_protocol import ChatRequest, CompletionRequest, ProtocolError
from jaxdual.outputs import RequestOutput
from jaxdual.sampling_params import RECOMMENDED_SAMPLING, SamplingParams
from jaxdual.tokenizer import Tokenizer, TokenizerError

# Requests handed to the engine, as a multiple of those that it runs at once: enough to keep it full while the next
# lines are read, and few enough that a batch of any length fits in memory.
_WINDOW = 4

type BatchModel = LLM | BlockingCascade


@dataclass(slots=True)
class Totals:
    """What a run has done so far; times are in seconds, one entry for each engine request."""

    ok: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)


class Rows(Protocol):
    """Where rows go, such as an `OutputFile`."""

    @property
    def done(self) -> Collection[str | int]:
        """Keys of the lines that have a row."""

    def append(self, row: dict[str, Any]) -> None:
        """Takes one row."""


@dataclass(slots=True)
class _Job:
    """A line in flight: its outputs by prompt, None while a prompt is not finished."""

    line: BatchLine
    request: ChatRequest | CompletionRequest
    outputs: list[RequestOutput | None]


class BatchRunner:
    """Keeps a window of requests in the engine, and writes each row when its last choice is finished.

    Args:
        llm: the engine, or a cascade of several.
        output: takes the rows; lines that have a row there are skipped.
        created: the time that responses carry, seconds since the epoch.
        on_progress: called after each step and each row with the totals.
    """

    def __init__(
        self, llm: BatchModel, output: Rows, created: int, on_progress: Callable[[Totals], None] = lambda _: None
    ) -> None:
        self.totals = Totals()
        self._llm = llm
        self._output = output
        self._created = created
        self._on_progress = on_progress
        defaults = llm.get_default_sampling_params()
        self._default_sampling = {name: getattr(defaults, name) for name in RECOMMENDED_SAMPLING}
        self._window = _WINDOW * llm.config.max_num_seqs * llm.config.num_ranks
        self._jobs: dict[str, tuple[_Job, int]] = {}

    def run(self, lines: Iterable[BatchLine | RejectedLine]) -> Totals:
        """Serves all lines."""
        source = iter(lines)
        while self._fill(source):
            for output in self._llm.step():
                if output.finished:
                    self._finish_prompt(output)
            self._on_progress(self.totals)
        return self.totals

    def _fill(self, source: Iterator[BatchLine | RejectedLine]) -> bool:
        """Submits lines until the window is full; returns whether the engine has work."""
        while len(self._jobs) < self._window:
            line = next(source, None)
            if line is None:
                break
            if line.key in self._output.done:
                self.totals.skipped += 1
            elif isinstance(line, RejectedLine):
                self._fail(line, line.code, line.message, line.param)
            else:
                self._submit(line)
        return bool(self._jobs)

    def _submit(self, line: BatchLine) -> None:
        submitted: list[str] = []
        try:
            request = parse_body(line, self._llm.served_model_name, self._default_sampling)
            prompts = self._tokenize(request)
            job = _Job(line, request, [None] * len(prompts))
            for i, prompt in enumerate(prompts):
                request_id = f"{line.number}-{i}"
                self._ask(prompt, engine_params(line, request, i), request_id, request)
                self._jobs[request_id] = (job, i)
                submitted.append(request_id)
        except ValueError as error:
            # One prompt of the request was refused: the others are not wanted any more.
            for request_id in submitted:
                del self._jobs[request_id]
                self._llm.abort(request_id)
            self._refuse(line, error)

    def _ask(
        self,
        prompt: TokenizedPrompt | CascadePrompt,
        params: SamplingParams,
        request_id: str,
        request: ChatRequest | CompletionRequest,
    ) -> None:
        if isinstance(self._llm, BlockingCascade):
            self._llm.submit(
                prompt,  # type: ignore[arg-type]
                params,
                request_id,
                user=request.user,
                options=request.cascade,
                left_open=request.left_open,
            )
            return
        if request.cascade is not None:
            raise ProtocolError(f"cascade: {self._llm.served_model_name!r} is one model, and no cascade", "cascade")
        self._llm.submit(prompt, params, request_id=request_id, user=request.user)  # type: ignore[arg-type]

    def _tokenize(self, request: ChatRequest | CompletionRequest) -> Sequence[TokenizedPrompt | CascadePrompt]:
        if isinstance(request, ChatRequest):
            return [
                self._llm.tokenize_chat(
                    request.messages,
                    add_generation_prompt=request.add_generation_prompt,
                    add_special_tokens=request.add_special_tokens,
                    template_vars=request.template_vars,
                )
            ]
        return [self._llm.tokenize(prompt, add_special_tokens=request.add_special_tokens) for prompt in request.prompts]

    def _finish_prompt(self, output: RequestOutput) -> None:
        job, index = self._jobs.pop(output.request_id, (None, 0))
        if job is None:  # the rest of a request that failed already
            return
        refusal = self._llm.refusal(output) if isinstance(self._llm, BlockingCascade) else None
        if refusal is not None:
            self._abandon(job)
            self._refuse(job.line, refusal)
            return
        broken = [c.error or c.finish_reason for c in output.outputs if c.finish_reason not in ("stop", "length")]
        if broken:
            self._abandon(job)
            self._fail(job.line, "engine_error", f"line {job.line.number}: generation broke off: {broken[0]}", None)
            return
        self._measure(output)
        job.outputs[index] = output
        outputs = [o for o in job.outputs if o is not None]
        if len(outputs) == len(job.outputs):
            row = response_row(
                job.line,
                job.request,
                outputs,
                model=self._llm.served_model_name,
                system_fingerprint=self._llm.system_fingerprint,
                created=self._created,
                tokenizer=_tokenizer_of(self._llm, outputs[0]),
            )
            self._output.append(row)
            self.totals.ok += 1

    def _abandon(self, job: _Job) -> None:
        for request_id in [request_id for request_id, (other, _) in self._jobs.items() if other is job]:
            del self._jobs[request_id]
            self._llm.abort(request_id)

    def _refuse(self, line: BatchLine, error: ValueError) -> None:
        code, param = (error.code, error.param) if isinstance(error, ProtocolError) else ("invalid_value", None)
        self._fail(line, code, f"line {line.number}: {error}", param)

    def _fail(self, line: BatchLine | RejectedLine, code: str | None, message: str, param: str | None) -> None:
        self._output.append(error_row(line, code, message, param))
        self.totals.failed += 1
        self._on_progress(self.totals)

    def _measure(self, output: RequestOutput) -> None:
        totals = self.totals
        totals.prompt_tokens += output.num_prompt_tokens
        totals.completion_tokens += output.num_output_tokens
        metrics = output.metrics
        if metrics.first_token_time is not None:
            totals.ttft.append(metrics.first_token_time - metrics.arrival_time)
        if metrics.finished_time is not None:
            totals.latency.append(metrics.finished_time - metrics.arrival_time)


def _tokenizer_of(llm: BatchModel, output: RequestOutput) -> Tokenizer | None:
    if isinstance(llm, BlockingCascade):
        return llm.tokenizer_of(output)
    try:
        return llm.get_tokenizer()
    except TokenizerError:
        return None
