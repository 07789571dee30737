"""How far cheaper modes of DySCO are from the exact one: tokens, distributions of the next token, and selections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdual import LLM, DyscoParams, SamplingParams
from jaxdual.engine.device import Device
from jaxdual.outputs import CompletionOutput

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "tail_chunk": {"mode": "tail_chunk"},
    "lag": {"mode": "lag"},
    "split": {"mode": "split"},
    "lag_fresh": {"mode": "lag_fresh"},
    "refresh": {"mode": "refresh"},
    "static": {"static": True},
    "vanilla": {"strength": 1.0},  # the tokens of plain decoding, with a selection that changes nothing
}


@dataclass(frozen=True, slots=True)
class Likeness:
    """Of each mode with the exact one.

    Attributes:
      same_tokens: of each prompt, greedy tokens before the first that differs.
      divergence: of each prompt, the mean over positions of a given continuation of the Kullback-Leibler divergence of
        the next token's distribution from that of the exact mode, in nats.
      same_top: likewise, the part of positions with the same likeliest token.
      jaccard: likewise, the mean of the Jaccard index of the two selections.
    """

    same_tokens: Mapping[str, np.ndarray]
    divergence: Mapping[str, np.ndarray]
    same_top: Mapping[str, np.ndarray]
    jaccard: Mapping[str, np.ndarray]


def measure_agreement(llm: LLM, texts: Sequence[Sequence[int]], length: int, dysco: Mapping[str, Any]) -> Likeness:
    """Decodes each text's beginning in all modes, side by side.

    Args:
      llm: on one device, for as many sequences as there are modes.
      texts: token ids; the first `length` of each are a prompt, the others its given continuation.
      dysco: parameters of all modes.
    """
    params = [DyscoParams(**dict(dysco) | of_mode, return_selection=True) for of_mode in MODES.values()]
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in Likeness.__slots__}
    for text in texts:
        prompt, further = list(text[:length]), list(text[length:])
        free = _decoded(llm, prompt, params, len(further))
        with _Forced(llm, length, further) as forced:
            given = _decoded(llm, prompt, params, len(further))
        logprobs = forced.logprobs()
        for number, mode in enumerate(MODES):
            found["same_tokens"][mode].append(same_until(free[0].token_ids, free[number].token_ids))
            found["divergence"][mode].append(float(divergence(logprobs[0], logprobs[number]).mean()))
            same = logprobs[0].argmax(axis=1) == logprobs[number].argmax(axis=1)
            found["same_top"][mode].append(float(same.mean()))
            found["jaccard"][mode].append(_mean_jaccard(given[0], given[number]))
    return Likeness(*({mode: np.array(of_mode) for mode, of_mode in found[name].items()} for name in found))


def same_until(these: Sequence[int], those: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(these, those, strict=True)
    return next((number for number, (this, that) in enumerate(pairs) if this != that), len(these))


def divergence(of: np.ndarray, by: np.ndarray) -> np.ndarray:
    """`[positions]`: sum over tokens of `exp(of) * (of - by)`, both log-probabilities `[positions, tokens]`."""
    summed: np.ndarray = (np.exp(of) * (of - by)).sum(axis=1)
    return summed


def jaccard(these: Sequence[int], those: Sequence[int]) -> float:
    """Part of what either has that both have; 1 if neither has any."""
    either = set(these) | set(those)
    return len(set(these) & set(those)) / len(either) if either else 1.0


def _mean_jaccard(these: CompletionOutput, those: CompletionOutput) -> float:
    """Over the steps of generated tokens."""
    count = len(these.token_ids) - 1
    pairs = zip((these.selection or [])[-count:], (those.selection or [])[-count:], strict=True)
    return float(np.mean([jaccard(this.selected, that.selected) for this, that in pairs]))


def _decoded(llm: LLM, prompt: list[int], params: Sequence[DyscoParams], tokens: int) -> list[CompletionOutput]:
    sampling = [SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, dysco=one) for one in params]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * len(params), sampling)
    return [output.outputs[0] for output in outputs]


@dataclass(slots=True)
class _Forced:
    """While it is open, sequences decode given tokens instead of their own, and what comes out is kept.

    Args:
      llm: which has no other sequences.
      length: tokens of all prompts.
      further: tokens from there on.
    """

    llm: LLM
    length: int
    further: Sequence[int]
    _seen: dict[tuple[int, int], jax.Array] = field(default_factory=dict)
    _seq_of: dict[int, int] = field(default_factory=dict)
    _run: Callable[..., Any] | None = None

    @property
    def _engine(self) -> Any:
        return cast(Any, self.llm)._engine

    @property
    def _device(self) -> Device:
        return cast(Device, self._engine.runner.device)

    def __enter__(self) -> _Forced:
        self._run = self._device.decode_dysco
        self._device.decode_dysco = self._forced  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._device.decode_dysco

    def _forced(self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray, *rest: Any, **kinds: Any) -> Any:
        is_given = positions >= self.length
        given = np.asarray(self.further, np.int32)[np.maximum(positions - self.length, 0)]
        assert self._run is not None
        x, chosen = self._run(slots, np.where(is_given, given, tokens), positions, *rest, **kinds)
        # A sequence whose last token is planned has no slot any more, but had the same one before.
        self._seq_of |= {one.sequence.slot: seq_id for seq_id, one in self._engine._outputs.items()}
        for row in np.flatnonzero(is_given[0]):
            self._seen[self._seq_of[int(slots[0, row])], int(positions[0, row])] = x[row]
        return x, chosen

    def logprobs(self) -> list[np.ndarray]:
        """`[positions, tokens]` of each sequence, in order, at the given tokens but the last, whose next is unknown."""
        programs = self._device.programs
        head = jax.jit(lambda leaves, x: jax.nn.log_softmax(programs.model(leaves).head(x).astype(jnp.float32)))
        sequences, positions = (sorted(set(part)) for part in zip(*self._seen, strict=True))
        return [
            np.asarray(head(programs.leaves, jnp.stack([self._seen[seq_id, position] for position in positions])))
            for seq_id in sequences
        ]
