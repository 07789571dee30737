"""The public Python API: `LLM`, in vLLM's offline names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdual.cascade.gate import Gate
from jaxdual.config import EngineConfig
from jaxdual.engine.build import Built, build_engine
from jaxdual.engine.engine import Engine
from jaxdual.front import Front, Prompt, TokenizedPrompt
from jaxdual.outputs import EngineInfo, EngineStats, RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.scheduling.expert_policies import RouterWindow
from jaxdual.served_model import ServedModel, front_of


class LLM(ServedModel):
    """A model, its engine and its tokenizer, in this process.

    All of it belongs to one thread; for concurrent callers there is `jaxdual.AsyncLLM`.

    Args:
      model: folder in Hugging Face layout, or a hub name; None for the model that ships with jaxdual.
      settings: further fields of `EngineConfig`, such as `dtype`, `max_model_len`, `block_size`, `max_num_seqs`.

    Raises:
      ConfigError: a setting that is unknown, out of range or doesn't fit the model.
      ModelError, TokenizerError: files of the model that can't be used.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        self._init(EngineConfig.from_mapping({"model": None if model is None else str(model), **settings}))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """An `LLM` with this configuration."""
        llm = cls.__new__(cls)
        llm._init(config)
        return llm

    def _init(self, config: EngineConfig) -> None:
        self.config = config
        self._built: Built[Engine] = build_engine(config)
        self._engine = self._built.engine
        self._text = front_of(self._engine, self.info)

    @property
    def info(self) -> EngineInfo:
        """What is served: model, sizes, number type."""
        return self._built.info

    @property
    def _front(self) -> Front:
        return self._text

    def generate(
        self,
        prompts: Prompt | TokenizedPrompt | Sequence[Prompt | TokenizedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        user: str | Sequence[str | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts.

        Args:
          prompts: one or several, each text or `{"prompt_token_ids": [...]}`.
          sampling_params: for all, or one for each; the model's defaults if left out.
          user: who asks, for all or one for each; some `dispatch_policy`s send a user to the same rank again.
          use_tqdm: shows a progress bar.

        Returns:
          Outputs in the order of the prompts.

        Raises:
          ValueError: a prompt, parameter or user that can't be used; no prompt is run then.
        """
        several = _as_list(prompts)
        params = self._params_for(sampling_params, len(several))
        users = _one_each(user, len(several))
        outputs: list[RequestOutput] = []
        try:
            for prompt, one, whose in zip(several, params, users, strict=True):
                outputs.append(self._front.submit(prompt, one, user=whose))
            self._drain(outputs, show=use_tqdm)
        except BaseException:  # an interrupt too must not leave requests behind
            for output in outputs:
                self._front.abort(output.request_id)
            self._settle()
            raise
        return outputs

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        user: str | Sequence[str | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several; see `generate`.

        Args:
          messages: the messages of a conversation, or a list of conversations.
          sampling_params: as for `generate`.
          add_generation_prompt: opens the assistant's turn.
          chat_template_kwargs: further variables of the model's template.
          user: as for `generate`.
          use_tqdm: shows a progress bar.

        Raises:
          ValueError: as for `generate`, or messages that the template refuses.
        """
        if isinstance(messages, (str, Mapping)) or not messages:
            raise ValueError(f"messages={messages!r} must be a list of messages, or a list of such lists")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            self.tokenize_chat(
                conversation,  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                template_vars=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, user=user, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, user: str | None = None
    ) -> Iterator[RequestOutput]:
        """Completes one prompt, and yields its output each time that it has grown.

        It is the same object each time. Leaving the loop early ends the request.

        Raises:
          ValueError: a prompt, parameter or user that can't be used.
        """
        output = self._front.submit(prompt, self._params_for(sampling_params, 1)[0], user=user)
        try:
            while not output.finished:
                if any(changed is output for changed in self.step()):
                    yield output
        finally:
            if not output.finished:
                self._front.abort(output.request_id)
                self._settle()

    # One step at a time, for callers with a loop of their own.

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """What `submit` makes of a prompt; see `Front.tokenize`."""
        return self._front.tokenize(prompt, add_special_tokens=add_special_tokens)

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        template_vars: Mapping[str, Any] | None = None,
    ) -> TokenizedPrompt:
        """The prompt that a conversation becomes; see `Front.tokenize_chat`."""
        return self._front.tokenize_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            add_special_tokens=add_special_tokens,
            template_vars=template_vars,
        )

    def submit(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
        gate: Gate | None = None,
    ) -> RequestOutput:
        """Queues a prompt; `step` works on it.

        Args:
          prompt: text or `{"prompt_token_ids": [...]}`.
          sampling_params: the model's defaults if left out.
          request_id: unique among unfinished requests; made if left out.
          priority: smaller goes first.
          user: who asks; see `generate`.
          gate: refuses the prompt where the model is not sure enough; see `Request.gate`.

        Raises:
          ValueError: a prompt, parameter, id or user that can't be used.
        """
        params = self._params_for(sampling_params, 1)[0]
        return self._front.submit(prompt, params, request_id, priority=priority, user=user, gate=gate)

    def step(self) -> list[RequestOutput]:
        """Runs one engine step; returns the outputs that changed."""
        return self._front.take(self._engine.step())

    def abort(self, request_id: str) -> None:
        """Ends a request; its output finishes with "abort" at the next `step`. Unknown ids are ignored."""
        self._front.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self._engine.has_work

    @property
    def num_unfinished(self) -> int:
        """Requests that have not finished."""
        return self._front.num_unfinished

    def warmup(self, report: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """Compiles every program in every padded shape; afterwards no request compiles anything, but those that DySCO
        decodes with heads in other layers than those of `dysco_profile`, or in another mode than "exact".

        Without it, programs compile when a request first needs them.

        Args:
          report: called with the name of each shape and the seconds that it took.
        """
        for name, run in self._engine.warm_ups():
            report(name, run())

    def router_statistics(self, *, so_far: bool = False) -> RouterWindow | None:
        """What the routers of a model with experts have chosen in the last `expert_window` of steps that is full.

        None where nothing is counted (`router_statistics`), and before the first window.

        Args:
          so_far: in the window that is under way instead, which ends with it: the next one begins with the next step,
            and so does the interval to the next relocation, where experts move. None where none is under way.
        """
        return self._engine.router_statistics(so_far=so_far)

    def stats(self) -> EngineStats:
        """Counters since the start."""
        return self._built.stats()

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if pages, queues or requests contradict each other."""
        self._engine.check_integrity()

    def close(self) -> None:
        """Waits until full blocks have reached the block store, where one is configured, and ends what serves it.

        To be called at the end, if at all: no request can be served after it. Without it, a process that ends lets what
        is on its way to the store arrive there.
        """
        self._engine.close()

    def _settle(self) -> None:
        """Lets the engine put away what has ended, if nothing else will make it run."""
        while self.has_unfinished and not self.num_unfinished:
            self.step()

    def _drain(self, outputs: Iterable[RequestOutput], *, show: bool = False) -> None:
        from tqdm import tqdm

        waiting = [output for output in outputs if not output.finished]
        with tqdm(total=len(waiting), unit="request", disable=not show) as bar:
            while waiting:
                self.step()
                still = [output for output in waiting if not output.finished]
                bar.update(len(waiting) - len(still))
                waiting = still
        self._settle()

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one, or one for each")
        return params


def _one_each(user: str | Sequence[str | None] | None, count: int) -> Sequence[str | None]:
    if isinstance(user, str) or not isinstance(user, Sequence):
        return [user] * count
    if len(user) != count:
        raise ValueError(f"{len(user)} users for {count} prompts: give one, or one for each")
    return user


def _as_list(prompts: Prompt | TokenizedPrompt | Sequence[Prompt | TokenizedPrompt]) -> list[Prompt | TokenizedPrompt]:
    if isinstance(prompts, (str, Mapping, TokenizedPrompt)):
        return [prompts]
    listed = list(prompts)
    if listed and all(hasattr(item, "__index__") for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]
