"""When a model answers a question itself, and when it hands it on: plain data and arithmetic, no JAX.

A question stays where P(IK) ("I know", from a probe on the prompt's last hidden state) and P(T) ("true", from the
first token's distribution) both reach their thresholds (arXiv 2602.22090, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TAU_IK = 0.5
TAU_T = 0.9
MAX_WATCHED = 64  # token ids whose probabilities one request may ask for
_LEAST = 1e-12  # of a probability whose logit is taken

PtMode = Literal["full", "choices"]
Refusal = Literal["p_ik", "p_t", "fusion"]


@dataclass(frozen=True, slots=True)
class Confidence:
    """What P(T) is read from.

    Attributes:
      kind: "choices" takes the likeliest letter at the first position of the answer; "opening" the probability that the
        answer opens as the prompt demands ("Answer"), over all tokens of that opening.
      tokens: of each letter, the ids that stand for it ("A" and " A"), whose probabilities are summed; of an opening,
        the ids that may stand at each of its positions.
      mode: of choices: "full" by the whole vocabulary's distribution, "choices" by that of the letters alone.
      temperature: that the logits are divided by before the letters' own distribution is taken (`mode="choices"`).
    """

    kind: Literal["choices", "opening"]
    tokens: tuple[tuple[int, ...], ...]
    mode: PtMode = "full"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        watched = [token for each in self.tokens for token in each]
        least = 2 if self.kind == "choices" else 1
        if len(self.tokens) < least or not all(self.tokens):
            raise ValueError(f"tokens={self.tokens!r}: {self.kind} need at least {least}, each with a token id")
        if len(watched) > MAX_WATCHED:
            raise ValueError(f"{len(watched)} token ids are to be watched; at most {MAX_WATCHED} can be")
        if self.kind == "choices" and len(set(watched)) < len(watched):
            raise ValueError(f"tokens={self.tokens!r}: two letters share a token")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.temperature != 1 and (self.kind, self.mode) != ("choices", "choices"):
            raise ValueError(
                f"temperature={self.temperature} is that of the letters' own distribution (mode 'choices')"
            )

    @property
    def positions(self) -> int:
        """Output tokens that P(T) is read from."""
        return 1 if self.kind == "choices" else len(self.tokens)

    def watched(self, position: int) -> tuple[int, ...]:
        """Token ids whose log-probabilities are needed at a position of the output."""
        if self.kind == "choices":
            return tuple(token for letter in self.tokens for token in letter)
        return self.tokens[position]

    def letter_probabilities(self, logprobs: Sequence[float]) -> list[float]:
        """Probability of each letter, of natural log-probabilities of `watched(0)`, by `mode`."""
        rest = iter(logprobs)
        # The order matters: each letter's variants are summed before the temperature is applied to the sum.
        full = [math.fsum(math.exp(next(rest)) for _ in letter) for letter in self.tokens]
        if self.mode == "full":
            return full
        scaled = [math.log(max(p, 1e-300)) / self.temperature for p in full]
        highest = max(scaled)
        parts = [math.exp(value - highest) for value in scaled]
        whole = math.fsum(parts)
        return [part / whole for part in parts]

    def p_t(self, logprobs: Sequence[Sequence[float]]) -> float:
        """P(T) of the log-probabilities of `watched` at each position so far; of an opening, their product."""
        if self.kind == "choices":
            return max(self.letter_probabilities(logprobs[0]))
        return math.prod(math.fsum(math.exp(value) for value in at) for at in logprobs)


@dataclass(frozen=True, slots=True)
class Platt:
    """Maps a probability to a calibrated one: sigmoid(slope * logit(p) + intercept)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, p: float) -> float:
        return _sigmoid(self.slope * _logit(p) + self.intercept)


@dataclass(frozen=True, slots=True)
class Fusion:
    """One gate in place of two: sigmoid(p_t * logit P(T) + p_ik * logit P(IK) + intercept) >= tau."""

    p_t: float
    p_ik: float
    intercept: float
    tau: float

    def __call__(self, p_ik: float, p_t: float) -> float:
        return _sigmoid(self.p_t * _logit(p_t) + self.p_ik * _logit(p_ik) + self.intercept)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says of a prompt.

    Attributes:
      refused_by: which half of the gate has refused it; None where the model answers.
      p_ik, p_t: as the gate compares them, calibrated where it is; None where it did not come to that.
      judged: output tokens that P(T) was read from.
    """

    refused_by: Refusal | None
    p_ik: float | None
    p_t: float | None
    judged: int = 0

    @property
    def passed(self) -> bool:
        return self.refused_by is None


@dataclass(frozen=True, slots=True)
class Gate:
    """The rule of one tier: both scores must reach their thresholds, P(IK) is asked first.

    Attributes:
      confidence: what P(T) is read from; None for a gate of P(IK) alone.
      tau_ik, tau_t: thresholds; 0 lets everything pass, above 1 nothing.
      platt_ik, platt_t: calibrations of the scores before they are compared.
      fusion: compares both scores together in place of the two thresholds.
      uses_probe: whether P(IK) is asked at all: without a probe it passes.
    """

    confidence: Confidence | None
    tau_ik: float = TAU_IK
    tau_t: float = TAU_T
    platt_ik: Platt | None = None
    platt_t: Platt | None = None
    fusion: Fusion | None = None
    uses_probe: bool = True

    def __post_init__(self) -> None:
        if self.confidence is None and not self.uses_probe:
            raise ValueError("a gate asks for a score: P(IK) of a probe, P(T) of a confidence, or both")
        if self.fusion is not None and (self.confidence is None or not self.uses_probe):
            raise ValueError("a fusion needs both scores: a probe, and what P(T) is read from")

    def after_prompt(self, p_ik: float | None) -> Verdict | None:
        """The verdict once P(IK) is known (None without a probe); None where P(T) is to be asked, too."""
        if p_ik is not None:
            p_ik = p_ik if self.platt_ik is None else self.platt_ik(p_ik)
        if self.fusion is None and p_ik is not None and not p_ik >= self.tau_ik:
            return Verdict("p_ik", p_ik, None)
        return None if self.confidence is not None else Verdict(None, p_ik, None)

    def after_answer(self, p_ik: float | None, p_t: float, judged: int = 1) -> Verdict:
        """The verdict once P(T) is known, of a prompt that P(IK) has not refused.

        Args:
          p_ik: as the probe gives it, None without one.
          p_t: as `Confidence.p_t` gives it.
          judged: output tokens that it was read from.
        """
        p_ik = p_ik if p_ik is None or self.platt_ik is None else self.platt_ik(p_ik)
        p_t = p_t if self.platt_t is None else self.platt_t(p_t)
        if self.fusion is not None:
            fused = 0.0 if p_ik is None else self.fusion(p_ik, p_t)
            return Verdict(None if fused >= self.fusion.tau else "fusion", p_ik, p_t, judged)
        return Verdict(None if p_t >= self.tau_t else "p_t", p_ik, p_t, judged)


def _logit(p: float) -> float:
    p = min(max(p, _LEAST), 1 - _LEAST)
    return math.log(p) - math.log1p(-p)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
