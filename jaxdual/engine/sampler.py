"""Sampling on the device: from logits to tokens, row by row, whatever a row is batched with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from jaxdual.cascade.gate import MAX_WATCHED
from jaxdual.sampling_params import MAX_LOGPROBS, MAX_STOP_TOKENS, SamplingParams

# Stop tokens of a request and the model's own: what `min_tokens` must keep from being sampled.
MAX_SUPPRESSED = 2 * MAX_STOP_TOKENS
# Of `SamplerState`, a sequence: an output count, a prompt flag and a bias.
SAMPLER_BYTES_PER_TOKEN_ID = 4 + 1 + 4


class SamplerState(NamedTuple):
    """Per-sequence state on the device; row `max_num_seqs` of each rank belongs to padding.

    Attributes:
      last_token: newest sampled token.
      output_counts: how often each token is in the output.
      in_prompt: which tokens are in the prompt.
      bias: added to the logits.
    """

    last_token: Int32[Array, " slots"]
    output_counts: Int32[Array, "slots vocab"]
    in_prompt: Bool[Array, "slots vocab"]
    bias: Float32[Array, "slots vocab"]


class SampleInputs(NamedTuple):
    """What a batch of rows asks for; see `SamplingParams` for the parameters.

    Attributes:
      slot: state row.
      seed: two halves of the seed.
      output_index: number of the output token to sample.
      temperature, top_p, top_k, min_p, presence, frequency, repetition: the parameters; a `top_k` of the vocabulary
        size is none.
      penalised, biased, wants_logprobs: whether the row needs that part of the work.
      suppressed: token ids that may not be sampled, padded with the vocabulary size.
      watched: token ids whose log-probabilities are wanted, padded with any.
    """

    slot: Int32[np.ndarray, " rows"]
    seed: UInt32[np.ndarray, "rows 2"]
    output_index: Int32[np.ndarray, " rows"]
    temperature: Float32[np.ndarray, " rows"]
    top_p: Float32[np.ndarray, " rows"]
    top_k: Int32[np.ndarray, " rows"]
    min_p: Float32[np.ndarray, " rows"]
    presence: Float32[np.ndarray, " rows"]
    frequency: Float32[np.ndarray, " rows"]
    repetition: Float32[np.ndarray, " rows"]
    penalised: Bool[np.ndarray, " rows"]
    biased: Bool[np.ndarray, " rows"]
    wants_logprobs: Bool[np.ndarray, " rows"]
    suppressed: Int32[np.ndarray, "rows suppressed"]
    watched: Int32[np.ndarray, "rows watched"]


class Logprobs(NamedTuple):
    """Log-probabilities of the model's own distribution, before any sampling parameter.

    Attributes:
      chosen: of the chosen token.
      rank: of the chosen token, 1 for the likeliest.
      top_tokens, top: the likeliest tokens and theirs.
      watched: of the tokens that are watched.
    """

    chosen: jax.Array | np.ndarray  # [rows] float32
    rank: jax.Array | np.ndarray  # [rows] int32
    top_tokens: jax.Array | np.ndarray  # [rows, top] int32
    top: jax.Array | np.ndarray  # [rows, top] float32
    watched: jax.Array | np.ndarray  # [rows, watched] float32


@dataclass(frozen=True, slots=True)
class SlotSampling:
    """A sequence's sampling parameters as the device wants them.

    Attributes:
      watched: at each of its first positions, token ids whose log-probabilities are wanted.
    """

    params: SamplingParams
    seed: tuple[int, int]
    suppressed: tuple[int, ...]
    watched: tuple[tuple[int, ...], ...] = ()

    def watched_at(self, output_index: int) -> tuple[int, ...]:
        """Token ids whose log-probabilities are wanted at a position of the output."""
        return self.watched[output_index] if output_index < len(self.watched) else ()


def stop_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Tokens that end a request, the model's own included.

    Raises:
      ValueError: they are too many.
    """
    stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
    if len(stops) > MAX_SUPPRESSED:
        raise ValueError(
            f"{len(stops)} tokens end this request, the model's own included; at most {MAX_SUPPRESSED} can"
        )
    return stops


def seed_of(params: SamplingParams, draw: random.Random) -> int:
    """The seed of a request, of 64 bits: its own, or one that is drawn."""
    return draw.getrandbits(64) if params.seed is None else params.seed % 2**64


def slot_sampling(
    params: SamplingParams,
    seed: int,
    index: int,
    stops: frozenset[int],
    watched: tuple[tuple[int, ...], ...] = (),
) -> SlotSampling:
    """How output number `index` of a request is sampled whose seed, given or drawn, has 64 bits."""
    # The first output keeps the seed itself: n=1 and the first of n=2 agree.
    seed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    return SlotSampling(params, (seed & 0xFFFFFFFF, seed >> 32), tuple(sorted(stops)), watched)


def new_state(slots: int, vocab_size: int, sharding: Sharding | None = None) -> SamplerState:
    """State of so many rows, with this sharding of the rows; None for the default device."""
    return SamplerState(
        last_token=jnp.zeros((slots,), jnp.int32, device=sharding),
        output_counts=jnp.zeros((slots, vocab_size), jnp.int32, device=sharding),
        in_prompt=jnp.zeros((slots, vocab_size), bool, device=sharding),
        bias=jnp.zeros((slots, vocab_size), jnp.float32, device=sharding),
    )


def set_slot(
    state: SamplerState,
    slot: Int32[Array, ""],
    output_counts: Int32[Array, " vocab"],
    in_prompt: Bool[Array, " vocab"],
    bias: Float32[Array, " vocab"],
) -> SamplerState:
    """Writes the state of one sequence; needed only for one with penalties or biases."""
    return state._replace(
        output_counts=state.output_counts.at[slot].set(output_counts),
        in_prompt=state.in_prompt.at[slot].set(in_prompt),
        bias=state.bias.at[slot].set(bias),
    )


def pack(rows: Sequence[tuple[int, int, SlotSampling] | None], padding_slot: int, vocab_size: int) -> SampleInputs:
    """Inputs of a batch.

    Args:
      rows: slot, output index and parameters of each row; None for padding.
      padding_slot: state row of padding.
      vocab_size: of the model.
    """
    size = len(rows)
    inputs = SampleInputs(
        slot=np.full(size, padding_slot, np.int32),
        seed=np.zeros((size, 2), np.uint32),
        output_index=np.zeros(size, np.int32),
        temperature=np.zeros(size, np.float32),
        top_p=np.ones(size, np.float32),
        top_k=np.full(size, vocab_size, np.int32),
        min_p=np.zeros(size, np.float32),
        presence=np.zeros(size, np.float32),
        frequency=np.zeros(size, np.float32),
        repetition=np.ones(size, np.float32),
        penalised=np.zeros(size, bool),
        biased=np.zeros(size, bool),
        wants_logprobs=np.zeros(size, bool),
        suppressed=np.full((size, MAX_SUPPRESSED), vocab_size, np.int32),
        watched=np.zeros((size, MAX_WATCHED), np.int32),
    )
    for row, entry in enumerate(rows):
        if entry is None:
            continue
        slot, output_index, sampling = entry
        params = sampling.params
        inputs.slot[row] = slot
        inputs.output_index[row] = output_index
        inputs.wants_logprobs[row] = params.logprobs is not None
        if params.temperature > 0:
            inputs.seed[row] = sampling.seed
            inputs.temperature[row] = params.temperature
            inputs.top_p[row] = params.top_p
            inputs.min_p[row] = params.min_p
            if 0 < params.top_k < vocab_size:
                inputs.top_k[row] = params.top_k
        if params.has_penalties:
            inputs.penalised[row] = True
            inputs.presence[row] = params.presence_penalty
            inputs.frequency[row] = params.frequency_penalty
            inputs.repetition[row] = params.repetition_penalty
        inputs.biased[row] = bool(params.logit_bias)
        if output_index < params.min_tokens:
            inputs.suppressed[row, : len(sampling.suppressed)] = sampling.suppressed
        if watched := sampling.watched_at(output_index):
            inputs.watched[row, : len(watched)] = watched
            inputs.wants_logprobs[row] = True
    return inputs


def sample(
    logits: Float32[Array, "rows vocab"], state: SamplerState, inputs: SampleInputs
) -> tuple[SamplerState, Int32[Array, " rows"], Logprobs]:
    """Chooses one token a row.

    Order as in vLLM: penalties, bias, suppressed tokens; the likeliest token where the temperature is 0; else
    temperature, min-p, top-k, top-p, and a draw by the Gumbel-max trick from bits that depend only on the row's seed
    and output index. Parts that no row needs are skipped at run time.

    Returns:
      The new state, the tokens and, where a row wants them, log-probabilities.
    """
    adjusted = jax.lax.cond(jnp.any(inputs.penalised), _penalise, lambda logits, *_: logits, logits, state, inputs)
    adjusted = jax.lax.cond(
        jnp.any(inputs.biased),
        lambda logits: logits + jnp.where(inputs.biased[:, None], state.bias[inputs.slot], 0),
        lambda logits: logits,
        adjusted,
    )
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    adjusted = adjusted.at[rows[:, None], inputs.suppressed].set(-jnp.inf, mode="drop")
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    tokens = jax.lax.cond(jnp.any(inputs.temperature > 0), _draw, lambda logits, _: greedy, adjusted, inputs)
    tokens = jnp.where(inputs.temperature > 0, tokens, greedy)
    wanted = jnp.any(inputs.wants_logprobs)
    logprobs = jax.lax.cond(wanted, token_logprobs, _no_logprobs, logits, tokens, inputs.watched)
    state = state._replace(
        last_token=state.last_token.at[inputs.slot].set(tokens),
        output_counts=state.output_counts.at[inputs.slot, tokens].add(1),
    )
    return state, tokens, logprobs


def token_logprobs(
    logits: Float32[Array, "rows vocab"],
    tokens: Int32[Array, " rows"],
    watched: Int32[Array, "rows watched"] | Int32[np.ndarray, "rows watched"] | None = None,
) -> Logprobs:
    """Log-probabilities of given tokens, of the likeliest ones, and of those that are watched."""
    every = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(every, tokens[:, None], axis=-1)
    top, top_tokens = jax.lax.top_k(every, min(MAX_LOGPROBS, logits.shape[-1]))
    rank = 1 + jnp.sum(every > chosen, axis=-1, dtype=jnp.int32)
    return Logprobs(
        chosen=chosen[:, 0],
        rank=rank,
        top_tokens=top_tokens.astype(jnp.int32),
        top=top,
        watched=every[:, :0] if watched is None else jnp.take_along_axis(every, jnp.asarray(watched), axis=-1),
    )


def _no_logprobs(logits: Array, tokens: Array, watched: Array) -> Logprobs:
    shapes = jax.eval_shape(token_logprobs, logits, tokens, watched)
    return Logprobs(*(jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes))


def _penalise(
    logits: Float32[Array, "rows vocab"], state: SamplerState, inputs: SampleInputs
) -> Float32[Array, "rows vocab"]:
    counts = state.output_counts[inputs.slot]
    seen = (counts > 0) | state.in_prompt[inputs.slot]
    factor = inputs.repetition[:, None]
    changed = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    changed = changed - inputs.frequency[:, None] * counts - inputs.presence[:, None] * (counts > 0)
    return jnp.where(inputs.penalised[:, None], changed, logits)


def _draw(logits: Float32[Array, "rows vocab"], inputs: SampleInputs) -> Int32[Array, " rows"]:
    vocab_size = logits.shape[-1]
    # The maximum goes first: divided by a tiny temperature, logits themselves would overflow.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(inputs.temperature > 0, inputs.temperature, 1)[:, None]
    scaled = jnp.where(jnp.exp(scaled) >= inputs.min_p[:, None], scaled, -jnp.inf)
    narrowed = (inputs.top_k < vocab_size) | (inputs.top_p < 1)
    scaled = jax.lax.cond(jnp.any(narrowed), _top_k_top_p, lambda scaled, _: scaled, scaled, inputs)

    def noise(seed: UInt32[Array, 2], index: Int32[Array, ""]) -> Float[Array, " vocab"]:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), index)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    drawn = jax.vmap(noise)(jnp.asarray(inputs.seed), jnp.asarray(inputs.output_index))
    return jnp.argmax(scaled + drawn, axis=-1).astype(jnp.int32)


def _top_k_top_p(scaled: Float32[Array, "rows vocab"], inputs: SampleInputs) -> Float32[Array, "rows vocab"]:
    descending = -jnp.sort(-scaled, axis=-1)
    places = jnp.arange(scaled.shape[-1], dtype=jnp.int32)
    kept = jnp.where(places < inputs.top_k[:, None], descending, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding must not drop anything where the whole distribution is wanted.
    inside = ((before < inputs.top_p[:, None]) | (inputs.top_p[:, None] >= 1)) & jnp.isfinite(kept)
    least = jnp.min(jnp.where(inside, kept, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)
