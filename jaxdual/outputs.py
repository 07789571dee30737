"""What requests give back, and what an engine tells of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxdual.cascade.decision import Decision
from jaxdual.cascade.gate import Verdict
from jaxdual.cascade.work import LayerSizes, Work
from jaxdual.decoding.profiles import DyscoProfile
from jaxdual.scheduling.plan import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at a position of a text, before any sampling parameter.

    Attributes:
      logprob: natural logarithm.
      rank: 1 for the likeliest token there.
      decoded_token: its text; None for a model without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class SelectionStep:
    """What a step of DySCO has selected.

    Attributes:
      position: of the token that the step computes, in prompt and output together.
      selected: positions, ascending, before template tokens are left out and the token itself is added.
      relevance: `[position + 1]` float32, of all tokens so far.
    """

    position: int
    selected: list[int]
    relevance: np.ndarray


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request, so far.

    Attributes:
      index: its number among the request's `n`.
      text: final text; stop strings are cut off.
      token_ids: output tokens, a stop token included.
      logprobs: for each token, by token id: the chosen one and the likeliest ones; None if not asked for.
      cumulative_logprob: sum over the chosen tokens; None without `logprobs`.
      finish_reason: "stop", "length", "abort" or "error" once it has ended; "refused" by the request's gate.
      stop_reason: the stop string or stop token id that ended it; None for the model's own end of sequence.
      error: what went wrong, where `finish_reason` is "error".
      selection: of each step with raised attention, where `DyscoParams.return_selection` asks for it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    selection: list[SelectionStep] | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds of the monotonic clock; None while it has not come to that.

    Attributes:
      arrival_time, first_token_time, finished_time: as the front saw them.
      queue_seconds: how long its first output waited for its turn before it ran.
      allocation_seconds: likewise for memory of a decode engine, in a cluster.
      read_seconds: likewise for blocks of a store.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    queue_seconds: float | None = None
    allocation_seconds: float | None = None
    read_seconds: float | None = None

    @property
    def prefill_seconds(self) -> float | None:
        """From there to the first token."""
        if self.first_token_time is None or self.queue_seconds is None:
            return None
        waited = self.queue_seconds + (self.allocation_seconds or 0.0) + (self.read_seconds or 0.0)
        return self.first_token_time - self.arrival_time - waited


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of a request as somebody else has counted them.

    Attributes:
      prompt: of its prompt.
      output: of its outputs.
      cached: of the prompt, those that came from a cache.
    """

    prompt: int = 0
    output: int = 0
    cached: int = 0


@dataclass(slots=True)
class RequestOutput:
    """A request and its outputs so far.

    Attributes:
      request_id: as given, or made.
      prompt: the text, if the prompt was one.
      prompt_token_ids: the prompt.
      prompt_logprobs: for each prompt token by token id, None for the first; None if not asked for.
      outputs: `n` of them, by index.
      finished: whether all have ended.
      num_cached_tokens: tokens of the prompt that came from the prefix cache.
      metrics: times.
      verdict: of the request's gate, where it has one, once it is known.
      work: what was computed for its outputs that have ended.
      decision: which tier of a cascade answers, where one was asked; whole once the request has finished.
      reported: token counts, where the answer comes from elsewhere as text alone.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    verdict: Verdict | None = None
    work: Work = field(default_factory=Work)
    decision: Decision | None = None
    reported: TokenCounts | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids) if self.reported is None else self.reported.prompt

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all outputs."""
        if self.reported is not None:
            return self.reported.output
        return sum(len(completion.token_ids) for completion in self.outputs)

    def snapshot(self) -> RequestOutput:
        """A copy that later steps don't change, unlike the object that a stream yields again and again."""
        outputs = [
            dataclasses.replace(
                output,
                token_ids=list(output.token_ids),
                logprobs=None if output.logprobs is None else list(output.logprobs),
            )
            for output in self.outputs
        ]
        return dataclasses.replace(self, outputs=outputs, metrics=dataclasses.replace(self.metrics))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves; all of it is fixed at its start.

    Attributes:
      model_folder: where the model lies.
      served_model_name: its name in responses.
      family: its `model_type`.
      num_layers, vocab_size: of the model.
      dtype: of weights, activations and KV cache.
      device: kind of device that it runs on.
      max_model_len: tokens of prompt and output together.
      max_num_seqs: sequences that run at once, of all ranks.
      block_size: tokens of a KV page.
      fingerprint: identifies weights and number type, in hexadecimal digits.
      default_sampling: fields of `SamplingParams` for which the model recommends a value.
      kv_layout: identifies the form of its KV blocks, in hexadecimal digits.
      kv_block_bytes: of the KV memory of `block_size` tokens, in all layers.
      full_attention: whether every layer sees all tokens.
      num_heads: query heads of a layer.
      dysco_refusal: why requests can't be decoded by DySCO; "" where they can.
      dysco_profile: of requests that name none, that of `EngineConfig.dysco_profile`.
      dysco_only_compiled: whether they may ask for nothing else.
      layer_sizes: parameters of its layers, below and above the tap of its probe, if it has one.
      gate_refusal: why requests can't have a gate; "" where they can.
    """

    model_folder: str
    served_model_name: str
    family: str
    num_layers: int
    vocab_size: int
    dtype: str
    device: str
    max_model_len: int
    max_num_seqs: int
    block_size: int
    fingerprint: str
    default_sampling: Mapping[str, float]
    kv_layout: str = ""
    kv_block_bytes: int = 0
    full_attention: bool = True
    num_heads: int = 0
    dysco_refusal: str = ""
    dysco_profile: DyscoProfile | None = None
    dysco_only_compiled: bool = False
    layer_sizes: LayerSizes = field(default_factory=LayerSizes)
    gate_refusal: str = "the engine does not say that they can"

    @property
    def has_probe(self) -> bool:
        """Whether P(IK) can be asked."""
        return self.layer_sizes.tap > 0

    @property
    def system_fingerprint(self) -> str:
        """`fingerprint` in the form of OpenAI's field of this name."""
        return f"fp_{self.fingerprint[:16]}"


@dataclass(frozen=True, slots=True)
class RouterFigures:
    """What routers chose in the last full window of steps.

    Attributes:
      layers: numbers of the layers with experts.
      tokens: that were routed.
      loads: of each layer's experts, by the mean of the layer.
      strongest_pairs: of each two neighbouring ones of these layers, part of the tokens that chose the pair of experts
        that most chose; empty where transitions are not counted.
      traffic: part of the choices of each device's sequences that fall on each device's experts, as these lie now;
        empty on one device.
    """

    layers: tuple[int, ...]
    tokens: int
    loads: tuple[tuple[float, ...], ...]
    strongest_pairs: tuple[float, ...] = ()
    traffic: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of an engine since its start; times in seconds, cache figures in tokens.

    Attributes:
      num_running, num_waiting: sequences that run now, and that wait for their turn.
      prompt_tokens, generation_tokens: of finished and running requests: prompt tokens computed or found, tokens given.
      computed_prompt_tokens: prompt tokens that were computed, those of preempted sequences each time.
      work: of an engine by itself: tokens computed, prompt and output alike, by the part of the layers that they went
        through.
      prefix_cache_queries, prefix_cache_hits: prompt tokens looked up, and found.
      host_cache_hits: of the found ones, those that had to be copied from host memory.
      store_cache_hits: of the found ones, those that were read from the block store.
      handed_over_tokens: prompt tokens that have come from other engines, which have counted them as looked up.
      blocks_copied_out, blocks_copied_in: pages moved to host memory, and back.
      preemptions: sequences that had to give way.
      steps: steps run.
      kv_blocks, kv_blocks_cached, kv_blocks_available: pages in all; holding unused cached blocks; available in all.
      store_blocks_read, store_blocks_failed: pages read from the store; gone or broken when they were to be read.
      store_blocks_written, store_blocks_lost: pages stored; not stored although they were full.
      store_wait_seconds: of all requests that waited for the store, from their arrival on.
      store_timeouts: requests that went on without what they had waited for.
      kv_staging_blocks_used: pages of host memory that blocks pass through on their way, lent out now.
      card_bytes: of a cluster: bytes that have passed each network card, by engine, card and direction as its host's
        memory sees it, such as "prefill 0 storage write".
      kv_agent_restarts: times that the process that reads and writes the store had died.
      restarts: of a cluster: times that an engine of it was started again.
      engines: of a cluster: figures of each engine, such as "prefill 0"; their counters go on when one starts again.
      expert_relocations, experts_moved: of experts between devices: how often, and weights of one expert in one layer.
      expert_imbalance, expert_imbalance_worst: load of the busiest device by the mean, of experts as they lie now and
        were chosen lately; mean and worst of all layers, None where that is not counted, or not known yet.
      routers: what routers chose lately; None likewise.
      dispatch_decisions: requests by the rule that chose their rank, such as "affinity"; empty with one rank.
      load_seconds, compile_seconds: loading the model; compiling programs, or reading them from the compilation cache.
      compilations: programs compiled or read from the compilation cache.
    """

    num_running: int = 0
    num_waiting: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    computed_prompt_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    host_cache_hits: int = 0
    blocks_copied_out: int = 0
    blocks_copied_in: int = 0
    preemptions: int = 0
    steps: int = 0
    kv_blocks: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_available: int = 0
    load_seconds: float = 0.0
    compile_seconds: float = 0.0
    compilations: int = 0
    store_cache_hits: int = 0
    store_blocks_read: int = 0
    store_blocks_failed: int = 0
    store_blocks_written: int = 0
    store_blocks_lost: int = 0
    store_wait_seconds: float = 0.0
    store_timeouts: int = 0
    kv_agent_restarts: int = 0
    kv_staging_blocks_used: int = 0
    handed_over_tokens: int = 0
    restarts: int = 0
    expert_relocations: int = 0
    experts_moved: int = 0
    expert_imbalance: float | None = None
    expert_imbalance_worst: float | None = None
    routers: RouterFigures | None = None
    dispatch_decisions: Mapping[str, int] = field(default_factory=dict)
    card_bytes: Mapping[str, int] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    engines: Mapping[str, EngineStats] = field(default_factory=dict)
