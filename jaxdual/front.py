"""The text side of an engine: prompts to tokens, token events to outputs."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxdual.cascade.gate import Gate
from jaxdual.decoding.dysco import DyscoModel
from jaxdual.detokenizer import IncrementalDetokenizer
from jaxdual.engine.request import Request, Selection, TokenEvent, TokenLogprobs
from jaxdual.errors import PromptTooLongError
from jaxdual.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, SelectionStep
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer, TokenizerError
from jaxdual.users import checked_user

# How many characters of a text may become one when a tokenizer normalizes it, at most.
_LARGEST_SHRINK = 4

_NO_DYSCO = DyscoModel("", 0, 0, "the engine does not say that it can")

type Prompt = str | Mapping[str, Any] | Sequence[int]


class TokenEngine(Protocol):
    """What a front needs of an engine, wherever it runs."""

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A checked prompt.

    Attributes:
      text: if it was one.
      tokens: of it.
      opening: tokens at its end that a chat template has put there for the answer to begin; None for no chat.
    """

    text: str | None
    tokens: list[int]
    opening: int | None = None


@dataclass(slots=True)
class _Tracked:
    """A request under way, and the text of each of its outputs.

    The engine knows it under an id that is never used again, so that events of a request that was aborted can't be
    taken for those of a later one to which the caller gave the same id.
    """

    request: Request
    output: RequestOutput
    detokenizers: list[IncrementalDetokenizer]
    engines_lost: int = 0

    @property
    def engine_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params


class Front:
    """Validates prompts, makes requests of them, and turns the engine's token events into `RequestOutput`s.

    Args:
      engine: where requests go.
      tokenizer: None for a model folder without one, which takes token ids only.
      vocab_size: of the model.
      max_model_len: tokens of prompt and output together.
      dysco: what requests that are decoded so can ask.
      gate_refusal: why requests can't have a gate; "" where they can.
      has_probe: whether gates may ask for P(IK).
    """

    def __init__(
        self,
        engine: TokenEngine,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        dysco: DyscoModel = _NO_DYSCO,
        gate_refusal: str = "the engine does not say that it can",
        has_probe: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._engine = engine
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._dysco = dysco
        self._gate_refusal, self._has_probe = gate_refusal, has_probe
        self._tracked: dict[str, _Tracked] = {}  # by the caller's id
        self._by_engine_id: dict[str, _Tracked] = {}
        self._aborted: list[RequestOutput] = []  # not yet returned by `take`
        self._numbers = itertools.count()

    @property
    def num_unfinished(self) -> int:
        return len(self._tracked)

    def submit(
        self,
        prompt: Prompt | TokenizedPrompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
        gate: Gate | None = None,
    ) -> RequestOutput:
        """Sends a prompt to the engine.

        Args:
          prompt: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`, or what `tokenize` made of one.
          params: how to sample.
          request_id: unique among unfinished requests; made if left out.
          priority: smaller goes first.
          user: who asks, at most `MAX_USER_CHARS` characters.
          gate: refuses the prompt where the model is not sure enough: see `Request.gate`.

        Returns:
          The request's output, which `take` goes on filling.

        Raises:
          ValueError: a prompt or user that can't be used, or parameters that don't fit the model.
        """
        prompt = prompt if isinstance(prompt, TokenizedPrompt) else self.tokenize(prompt)
        text, tokens = prompt.text, prompt.tokens
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling parameters must be SamplingParams, not {type(params).__name__}")
        params.check_vocabulary(self._vocab_size)
        user = checked_user(user)
        room = self._max_model_len - len(tokens)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens; with at least one output token it must be at most "
                f"{self._max_model_len - 1}, since max_model_len is {self._max_model_len}"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model folder has none; use stop_token_ids")
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        params = dataclasses.replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))
        if gate is not None:
            self._check_gate(gate, params)
        dysco = None
        if params.dysco is not None:
            dysco = self._dysco.resolved(params.dysco, len(tokens), prompt.opening)
        number = next(self._numbers)
        if request_id is None:
            request_id = f"request-{number}"
            while request_id in self._tracked:  # a caller chose such a name
                request_id += "+"
        elif request_id in self._tracked:
            raise ValueError(f"request_id={request_id!r} is in use")
        arrival = time.monotonic()
        output = RequestOutput(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=tokens,
            outputs=[
                CompletionOutput(
                    index,
                    logprobs=None if params.logprobs is None else [],
                    cumulative_logprob=None if params.logprobs is None else 0.0,
                )
                for index in range(params.n)
            ],
            metrics=RequestMetrics(arrival),
        )
        engine_id = f"{number}"
        request = Request(engine_id, tokens, params, arrival, priority, user, dysco=dysco, gate=gate)
        self._engine.add(request)
        detokenizers = [
            IncrementalDetokenizer(
                self.tokenizer,
                params.stop_strings,
                include_stop_str=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )
            for _ in range(params.n)
        ]
        tracked = _Tracked(request, output, detokenizers)
        self._tracked[request_id] = self._by_engine_id[engine_id] = tracked
        return output

    def abort(self, request_id: str) -> None:
        """Ends a request; its output finishes with "abort", and the next `take` returns it. Unknown ids are ignored."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        self._engine.abort(tracked.engine_id)
        for output, detokenizer in zip(tracked.output.outputs, tracked.detokenizers, strict=True):
            if output.finish_reason is None:
                output.text += detokenizer.finish()
                output.finish_reason = "abort"
        self._finish(tracked)
        self._aborted.append(tracked.output)

    def fail(self, error: str, keep: Container[str] = ()) -> list[RequestOutput]:
        """Ends all requests with an error, but those that the engine knows under the ids in `keep`.

        Returns:
          Their outputs.
        """
        lost = [tracked for tracked in self._tracked.values() if tracked.engine_id not in keep]
        events = [
            TokenEvent(tracked.engine_id, output.index, None, finish_reason="error", error=error)
            for tracked in lost
            for output in tracked.output.outputs
            if output.finish_reason is None
        ]
        return self.take(events)

    def resume(self, most_lost: int, keep: Container[str] = ()) -> None:
        """Hands the engine again what an engine that is gone had under way: each output goes on from its last token.

        Args:
          most_lost: engines that a request may have been lost with. What was there more often may be the cause, and is
            left as it is.
          keep: ids of requests that the engine has.
        """
        for tracked in self._tracked.values():
            if tracked.engine_id in keep:
                continue
            tracked.engines_lost += 1
            if tracked.engines_lost <= most_lost:
                resumed = tuple(
                    tuple(output.token_ids) if output.finish_reason is None else None
                    for output in tracked.output.outputs
                )
                # Its gate has let it pass, or no token of it was told.
                gate = tracked.request.gate if tracked.output.verdict is None else None
                self._engine.add(dataclasses.replace(tracked.request, resumed=resumed, gate=gate))

    def take(self, events: Iterable[TokenEvent]) -> list[RequestOutput]:
        """Brings outputs up to date, and returns those that changed, each once."""
        # By identity: an id may be in use again already.
        changed = {id(output): output for output in self._aborted}
        self._aborted.clear()
        for event in events:
            tracked = self._by_engine_id.get(event.request_id)
            if tracked is None or tracked.output.outputs[event.index].finish_reason is not None:
                continue
            self._apply(tracked, event)
            changed[id(tracked.output)] = tracked.output
        return list(changed.values())

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          TokenizerError: there is none.
        """
        if self.tokenizer is None:
            raise TokenizerError("this model folder has no tokenizer.json: it takes and gives token ids only")
        return self.tokenizer

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """Checks a prompt and makes tokens of it. Changes nothing here, so any thread may call it.

        Args:
          prompt: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
          add_special_tokens: puts around a text what the tokenizer puts around texts.

        Raises:
          ValueError: a prompt that can't be used.
        """
        if isinstance(prompt, Mapping):
            if len(prompt) != 1 or not set(prompt) <= {"prompt", "prompt_token_ids"}:
                raise ValueError(f"a prompt mapping has the key 'prompt' or 'prompt_token_ids', not {list(prompt)}")
            ((key, prompt),) = prompt.items()
            if isinstance(prompt, str) != (key == "prompt"):
                raise ValueError(f"{key!r} holds a {type(prompt).__name__}")
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens)
        return _not_empty(TokenizedPrompt(None, self._token_ids(prompt)))

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        template_vars: Mapping[str, Any] | None = None,
    ) -> TokenizedPrompt:
        """The prompt that a conversation becomes. Changes nothing here, so any thread may call it.

        Args:
          messages: mappings with `role`, `content` and what else the model's template reads.
          add_generation_prompt: opens the assistant's turn.
          add_special_tokens: as for `tokenize`; templates usually write them themselves.
          template_vars: further variables of the template.

        Raises:
          ValueError: messages that the template refuses, or no template.
        """
        rendered = self.text_tokenizer().apply_chat_template(messages, add_generation_prompt, **(template_vars or {}))
        prompt = self._encode(str(rendered), add_special_tokens)
        opening = self._opening(template_vars or {}) if add_generation_prompt else None
        return dataclasses.replace(prompt, opening=opening)

    def _opening(self, template_vars: Mapping[str, Any]) -> int | None:
        """Tokens that the template puts behind the last message; None if it can't be told."""
        tokenizer, messages = self.text_tokenizer(), [{"role": "user", "content": "x"}]
        try:
            closed, opened = (
                str(tokenizer.apply_chat_template(messages, opens, **template_vars)) for opens in (False, True)
            )
        except TokenizerError:  # it wants other conversations than this one
            return None
        if not opened.startswith(closed):
            return None
        return len(tokenizer.encode(opened[len(closed) :], add_special_tokens=False))

    def _encode(self, text: str, add_special_tokens: bool) -> TokenizedPrompt:
        tokenizer = self.text_tokenizer()
        # What can't fit by any reckoning is refused unread: tokenizing megabytes takes seconds.
        limit = self._max_model_len * tokenizer.longest_token * _LARGEST_SHRINK
        if len(text) > limit:
            raise PromptTooLongError(
                f"the prompt has {len(text)} characters; max_model_len is {self._max_model_len} tokens, which are at "
                f"most {limit} characters"
            )
        return _not_empty(TokenizedPrompt(text, tokenizer.encode(text, add_special_tokens)))

    def _check_gate(self, gate: Gate, params: SamplingParams) -> None:
        if self._gate_refusal:
            raise ValueError(f"no gates here: {self._gate_refusal}")
        if gate.uses_probe and not self._has_probe:
            raise ValueError("the gate asks for P(IK), and the engine has no probe")
        if params.n != 1 or params.dysco is not None or params.prompt_logprobs is not None:
            raise ValueError("a request with a gate has one output, no dysco and no prompt_logprobs")
        tokens = () if gate.confidence is None else (token for each in gate.confidence.tokens for token in each)
        if any(not 0 <= token < self._vocab_size for token in tokens):
            raise ValueError(f"tokens of the gate must be token ids in [0, {self._vocab_size - 1}]")

    def _token_ids(self, prompt: object) -> list[int]:
        try:
            items = list(prompt) if not isinstance(prompt, bytes) else None  # type: ignore[call-overload]
        except TypeError:
            items = None
        if items is None:
            raise ValueError(f"a prompt is text or token ids, not {type(prompt).__name__}")
        tokens = []
        for item in items:
            try:
                token = -1 if isinstance(item, bool) else operator.index(item)
            except TypeError:
                token = -1
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"prompt token {item!r} must be a token id in [0, {self._vocab_size - 1}]")
            tokens.append(token)
        return tokens

    def _apply(self, tracked: _Tracked, event: TokenEvent) -> None:
        request, params = tracked.output, tracked.params
        output, detokenizer = request.outputs[event.index], tracked.detokenizers[event.index]
        now = time.monotonic()
        if event.index == 0:
            request.num_cached_tokens = event.cached_tokens
        if event.queue_seconds is not None and request.metrics.queue_seconds is None:
            request.metrics.queue_seconds = event.queue_seconds
            request.metrics.allocation_seconds = event.allocation_seconds
            request.metrics.read_seconds = event.read_seconds
        if event.selections:
            output.selection = _with_steps(output.selection or [], event.selections)
        if event.verdict is not None:
            request.verdict = event.verdict
        if event.work is not None:
            request.work += event.work
        if event.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
            request.prompt_logprobs += [
                self._logprobs(token, scores, params.prompt_logprobs or 0)
                for token, scores in zip(request.prompt_token_ids[1:], event.prompt_logprobs, strict=True)
            ]
        if event.token is not None:
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            output.token_ids.append(event.token)
            if event.logprobs is not None and output.logprobs is not None and params.logprobs is not None:
                output.logprobs.append(self._logprobs(event.token, event.logprobs, params.logprobs))
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + event.logprobs.chosen
            # A stop token ends the text without being part of it, as end-of-sequence tokens do.
            if event.stop_token is None:
                output.text += detokenizer.push(event.token)
        reason = event.finish_reason
        if detokenizer.stopped is not None:
            output.stop_reason = detokenizer.stopped
            if reason is None:
                self._engine.abort(event.request_id, event.index)
            reason = "stop"
        elif reason is not None:
            output.text += detokenizer.finish()
            if detokenizer.stopped is not None:
                output.stop_reason, reason = detokenizer.stopped, "stop"
            elif event.stop_token in (params.stop_token_ids or ()):
                output.stop_reason = event.stop_token
        output.finish_reason = reason
        output.error = event.error
        if all(one.finish_reason is not None for one in request.outputs):
            self._finish(tracked)

    def _finish(self, tracked: _Tracked) -> None:
        tracked.output.finished = True
        tracked.output.metrics.finished_time = time.monotonic()
        del self._tracked[tracked.output.request_id]
        del self._by_engine_id[tracked.engine_id]

    def _logprobs(self, token: int, scores: TokenLogprobs, count: int) -> dict[int, Logprob]:
        entries = {token: Logprob(scores.chosen, scores.rank, self._piece(token))}
        for rank, (other, logprob) in enumerate(scores.top[:count], start=1):
            entries.setdefault(other, Logprob(logprob, rank, self._piece(other)))
        return entries

    def _piece(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token])


def _with_steps(known: Sequence[SelectionStep], more: Sequence[Selection]) -> list[SelectionStep]:
    """Steps in a new list. A sequence that gave way computes raised tokens again, and tells of them once more."""
    steps = list(known)
    for one in more:
        if not steps or one.position > steps[-1].position:
            steps.append(SelectionStep(one.position, one.selected, np.frombuffer(one.relevance, np.float32)))
    return steps


def _not_empty(prompt: TokenizedPrompt) -> TokenizedPrompt:
    if not prompt.tokens:
        raise ValueError("the prompt is empty: it must have at least one token")
    return prompt
