"""What a cascade needs of its tiers, and the ones with an engine of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from jaxdual.async_api import AsyncLLM
from jaxdual.cascade.config import LocalTier
from jaxdual.cascade.decision import Failure, Spent
from jaxdual.cascade.gate import Gate
from jaxdual.cascade.letters import confidence_of
from jaxdual.cascade.options import ConfidenceSpec
from jaxdual.cascade.serving.prompt import CascadePrompt, ChatPrompt
from jaxdual.front import TokenizedPrompt
from jaxdual.outputs import RequestOutput
from jaxdual.request_stream import AnswerStream
from jaxdual.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Question:
    """A request as it came.

    Attributes:
      prompt: what each tier makes tokens of.
      params: how to sample.
      left_open: fields of `params` that the request does not set, and that each tier's model recommends values for.
      request_id: unique among unfinished requests.
      priority: smaller goes first.
      user: who asks.
    """

    prompt: CascadePrompt
    params: SamplingParams
    left_open: Collection[str]
    request_id: str
    priority: int = 0
    user: str | None = None


class Tier(Protocol):
    """A tier of a cascade."""

    @property
    def name(self) -> str:
        """Its name."""

    def check_door(self, outputs: int) -> None:
        """See `AsyncLLM.check_door`."""

    def gate(self, spec: ConfidenceSpec) -> Gate:
        """Its gate, where P(T) is read from this.

        Raises:
          ValueError: its tokenizer can't say it.
        """

    async def begin(self, question: Question, gate: Gate | None) -> AnswerStream:
        """Asks it.

        Raises:
          ValueError: the question can't be used; `PromptTooLongError` if it is too long for this tier.
          QueueFullError, NotServingError: it takes no requests.
        """

    def failure(self, stream: AnswerStream) -> Failure:
        """Why a stream of its that has ended with an error did."""

    def spent(self, output: RequestOutput, seconds: float, judged: int = 0) -> Spent:
        """What it has taken for an output so far.

        Args:
          output: of it.
          seconds: since its turn began.
          judged: tokens that its gate has looked at and that nobody was given; a model by the token bills them.
        """


class EngineTier:
    """A tier with an engine of its own.

    Args:
      config: of the tier.
      llm: its engine.
    """

    def __init__(self, config: LocalTier, llm: AsyncLLM) -> None:
        self.config, self.llm = config, llm

    @property
    def name(self) -> str:
        return self.config.name

    def check_door(self, outputs: int) -> None:
        self.llm.check_door(outputs)

    def gate(self, spec: ConfidenceSpec) -> Gate:
        return self.config.gate(confidence_of(spec, self.llm.get_tokenizer(), self.name, self.config.temperature))

    async def begin(self, question: Question, gate: Gate | None) -> AnswerStream:
        self.llm.check_door()  # a refusal costs no tokenizing
        prompt = await self._tokenized(question.prompt)
        recommended = self.llm.get_default_sampling_params()
        open_values = {name: getattr(recommended, name) for name in question.left_open}
        return await self.llm.submit(
            prompt,
            dataclasses.replace(question.params, **open_values),
            question.request_id,
            priority=question.priority,
            user=question.user,
            gate=gate,
        )

    def failure(self, stream: AnswerStream) -> Failure:
        return "failed"

    def spent(self, output: RequestOutput, seconds: float, judged: int = 0) -> Spent:
        prompt, generated, prices = output.num_prompt_tokens, output.num_output_tokens + judged, self.config.prices
        return Spent(
            output.work,
            self.llm.info.layer_sizes.flops(output.work),
            prompt,
            generated,
            seconds,
            None if prices is None else prices.of(prompt, generated),
        )

    async def _tokenized(self, prompt: CascadePrompt) -> TokenizedPrompt:
        if isinstance(prompt, ChatPrompt):
            return await self.llm.tokenize_chat(
                prompt.messages,
                add_generation_prompt=prompt.add_generation_prompt,
                add_special_tokens=prompt.add_special_tokens,
                template_vars=prompt.template_vars,
            )
        if isinstance(prompt.prompt, TokenizedPrompt):
            return prompt.prompt
        return await self.llm.tokenize(prompt.prompt, add_special_tokens=prompt.add_special_tokens)
