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
class Compared:
    """What it compares: calibrated, and only what it asks.

    Attributes:
      count: questions.
      p_ik, p_t: `[N]` each.
      fused: `[N]`, in place of both.
    """

    count: int
    p_ik: Float[np.ndarray, " N"] | None
    p_t: Float[np.ndarray, " N"] | None
    fused: Float[np.ndarray, " N"] | None


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


def compared(gate: Gate, scores: Scores) -> Compared:
    """What a gate compares with its thresholds, to the last bit as `Gate` computes it.

    Raises:
      ValueError: the gate asks P(T), and there is none, or no score at all.
    """
    if gate.confidence is not None and scores.p_t is None:
        raise ValueError("the gate asks P(T), which these scores lack")
    known = [len(one) for one in (scores.p_ik, scores.p_t) if one is not None]
    if not known:
        raise ValueError("neither P(IK) nor P(T) is known of these questions")
    p_ik = _calibrated(gate.platt_ik, scores.p_ik) if gate.uses_probe else None
    p_t = None if gate.confidence is None else _calibrated(gate.platt_t, scores.p_t)
    if gate.fusion is None or p_t is None:
        return Compared(known[0], p_ik, p_t, None)
    if p_ik is None:
        return Compared(known[0], p_ik, p_t, np.zeros(known[0]))
    pairs = zip(p_ik.tolist(), p_t.tolist(), strict=True)
    return Compared(known[0], p_ik, p_t, np.array([gate.fusion(one, other) for one, other in pairs]))


def refusals(gate: Gate, scores: Scores) -> Int[np.ndarray, " N"]:
    """What the gate says of each question, as index into `REFUSALS`; raises as `compared`."""
    return by_thresholds(gate, compared(gate, scores))


def by_thresholds(gate: Gate, scores: Compared) -> Int[np.ndarray, " N"]:
    """`refusals` of scores that were calibrated before, by this gate or one that differs in thresholds alone."""
    if scores.fused is not None and gate.fusion is not None:
        return np.where(scores.fused >= gate.fusion.tau, 0, 3).astype(np.int8)
    codes = np.zeros(scores.count, np.int8)
    if scores.p_t is not None:
        codes[~(scores.p_t >= gate.tau_t)] = 2
    if scores.p_ik is not None:  # asked first, so it is what has refused
        codes[~(scores.p_ik >= gate.tau_ik)] = 1
    return codes


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


def _calibrated(platt: Platt | None, scores: Float[np.ndarray, " N"] | None) -> Float[np.ndarray, " N"] | None:
    return scores if platt is None or scores is None else np.array([platt(score) for score in scores.tolist()])
