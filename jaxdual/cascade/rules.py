"""The rule of `Gate` over many questions at once, and the chain of tiers that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxdual.cascade.gate import Confidence, Gate, Platt, PtMode, Refusal

REFUSALS: tuple[Refusal | None, ...] = (None, "p_ik", "p_t", "fusion")  # by the codes of `refusals`
NOT_ASKED = -1
_LEAST = 1e-300


@dataclass(frozen=True, slots=True)
class Scores:
    """What the gate of a tier compares, as it comes: not calibrated.

    Attributes:
      p_ik: `[N]`; None without a probe.
      p_t: `[N]`; None where only P(IK) is asked.
    """

    p_ik: Float[np.ndarray, " N"] | None
    p_t: Float[np.ndarray, " N"] | None


@dataclass(frozen=True, slots=True)
class Routes:
    """Where questions went.

    Attributes:
      answered_by: `[N]`, index of the tier.
      refused: `[N, tiers]`, index into `REFUSALS`; `NOT_ASKED` of tiers that a question did not come to.
    """

    answered_by: Int[np.ndarray, " N"]
    refused: Int[np.ndarray, "N tiers"]


def letter_probabilities(
    logprobs: Float[np.ndarray, "N letters variants"], mode: PtMode = "full", temperature: float = 1.0
) -> Float[np.ndarray, "N letters"]:
    """`Confidence.letter_probabilities` of many questions.

    Args:
      logprobs: natural ones, of the tokens of each letter; -inf where there is none.
      mode, temperature: of `Confidence`.
    """
    full: np.ndarray = np.exp(logprobs.astype(np.float64)).sum(axis=-1)
    if mode == "full":
        return full
    return softmax(np.log(np.maximum(full, _LEAST)), temperature, full > 0)


def softmax(
    logits: Float[np.ndarray, "N letters"], temperature: float, there: Bool[np.ndarray, "N letters"] | None = None
) -> Float[np.ndarray, "N letters"]:
    """Softmax of rows at a temperature; columns that are not `there` get 0."""
    scaled = logits / temperature if there is None else np.where(there, logits / temperature, -np.inf)
    parts = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: np.ndarray = parts / parts.sum(axis=1, keepdims=True)
    return shares


def p_t_of(confidence: Confidence, logprobs: Float[np.ndarray, "N places variants"]) -> Float[np.ndarray, " N"]:
    """`Confidence.p_t` of many questions.

    Args:
      confidence: of which kind, mode and temperature count.
      logprobs: of the tokens of each letter, or of each position of an opening; -inf where there is none.
    """
    if confidence.kind == "choices":
        best: np.ndarray = letter_probabilities(logprobs, confidence.mode, confidence.temperature).max(axis=1)
        return best
    opening: np.ndarray = np.exp(logprobs.astype(np.float64)).sum(axis=-1).prod(axis=-1)
    return opening


def calibrated(platt: Platt | None, scores: Float[np.ndarray, " N"] | None) -> Float[np.ndarray, " N"] | None:
    """Scores as a gate compares them, to the last bit."""
    if platt is None or scores is None:
        return scores
    return np.array([platt(float(score)) for score in scores])


def refusals(gate: Gate, scores: Scores) -> Int[np.ndarray, " N"]:
    """What the gate says of each question, as index into `REFUSALS`.

    Raises:
      ValueError: the gate asks P(T), and there is none.
    """
    p_ik = calibrated(gate.platt_ik, scores.p_ik) if gate.uses_probe else None
    if gate.confidence is None:
        if p_ik is None:
            count = 0 if scores.p_t is None else len(scores.p_t)
            return np.zeros(len(scores.p_ik) if scores.p_ik is not None else count, np.int8)
        return np.where(p_ik >= gate.tau_ik, 0, 1).astype(np.int8)
    p_t = calibrated(gate.platt_t, scores.p_t)
    if p_t is None:
        raise ValueError("the gate asks P(T), which these scores lack")
    if gate.fusion is not None:
        fused = np.zeros(len(p_t)) if p_ik is None else fused_scores(gate, scores)
        return np.where(fused >= gate.fusion.tau, 0, 3).astype(np.int8)
    by_answer = np.where(p_t >= gate.tau_t, 0, 2)
    return (by_answer if p_ik is None else np.where(p_ik >= gate.tau_ik, by_answer, 1)).astype(np.int8)


def fused_scores(gate: Gate, scores: Scores) -> Float[np.ndarray, " N"]:
    """What a gate with a fusion compares.

    Raises:
      ValueError: a gate without one, or scores that lack one of both.
    """
    p_ik, p_t = calibrated(gate.platt_ik, scores.p_ik), calibrated(gate.platt_t, scores.p_t)
    if gate.fusion is None or p_ik is None or p_t is None:
        raise ValueError("a fusion needs a gate that has one, P(IK) and P(T)")
    return np.array([gate.fusion(float(one), float(other)) for one, other in zip(p_ik, p_t, strict=True)])


def route(refused: Sequence[Int[np.ndarray, " N"]], count: int) -> Routes:
    """Sends each question to the first tier that does not refuse it, at last to the one behind all gates.

    Args:
      refused: `refusals` of the tiers before the last.
      count: questions.
    """
    asked = np.full((count, len(refused) + 1), NOT_ASKED, np.int8)
    answered_by = np.full(count, len(refused))
    waiting = np.ones(count, bool)
    for tier, codes in enumerate(refused):
        asked[waiting, tier] = codes[waiting]
        stays = waiting & (codes == 0)
        answered_by[stays] = tier
        waiting &= ~stays
    asked[waiting, -1] = 0
    return Routes(answered_by, asked)
