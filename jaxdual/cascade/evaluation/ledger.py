"""What a chain of tiers computes for each question, and what that costs: both ways to count, from the same entries.

The paper counts the pass of the model that answered and no other: `2 N_i k_i` with the k_i questions that model i
answered (arXiv 2602.22090, section 3.3). All passes are what is really computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxdual.cascade.evaluation.rules import NOT_ASKED, REFUSALS, Routes
from jaxdual.cascade.work import LayerSizes, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCosts:
    """What a pass of one tier takes, for each question.

    Attributes:
      name: of the tier.
      sizes: parameters of its layers.
      prompt_tokens: `[N]`.
      output_tokens: `[N]`, of a whole answer.
      judged_tokens: `[N]`, output tokens that P(T) is read from.
      seconds: `[N]`, of a whole pass; 0 where it was not measured.
      price_in, price_out: of a million tokens of prompt and of output.
    """

    name: str
    sizes: LayerSizes
    prompt_tokens: Int[np.ndarray, " N"]
    output_tokens: Int[np.ndarray, " N"]
    judged_tokens: Int[np.ndarray, " N"]
    seconds: Float[np.ndarray, " N"] | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def scaled(self, parameters: int) -> TierCosts:
        """The same tier with another size, its tap at the same part of it."""
        lower = parameters if not self.sizes.tap else round(parameters * self.sizes.lower / self.sizes.parameters)
        sizes = LayerSizes(lower, parameters - lower, self.sizes.layers, self.sizes.tap)
        return dataclasses.replace(self, sizes=sizes)


@dataclass(frozen=True, slots=True)
class Entry:
    """One question's pass through one tier.

    Attributes:
      tier: its index.
      refused_by: None where it answered.
      work: tokens that went through its layers.
      prompt_tokens, output_tokens: as a server would bill them.
    """

    tier: int
    refused_by: str | None
    work: Work
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """All passes of all questions, through tiers with the smallest first.

    Attributes:
      tiers: what their passes take.
      routes: where the questions went.
    """

    tiers: tuple[TierCosts, ...]
    routes: Routes

    def __post_init__(self) -> None:
        count, width = self.routes.refused.shape
        if width != len(self.tiers) or any(len(tier.prompt_tokens) != count for tier in self.tiers):
            raise ValueError(
                f"{count} questions of {width} tiers; the tiers have "
                f"{[len(tier.prompt_tokens) for tier in self.tiers]} questions"
            )

    def tokens(self, tier: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each question at one tier, `[N]` each: tokens through its lower and its upper layers, and prompt and
        output tokens."""
        one, codes = self.tiers[tier], self.routes.refused[:, tier]
        asked, answered = codes != NOT_ASKED, codes == 0
        early = codes == REFUSALS.index("p_ik")
        output = np.where(answered, one.output_tokens, np.where(asked & ~early, one.judged_tokens, 0))
        # The last token of an output is not computed on.
        passed = np.where(asked, one.prompt_tokens + np.maximum(output - 1, 0), 0)
        return passed, np.where(early, 0, passed), np.where(asked, one.prompt_tokens, 0), output

    def entries(self, question: int) -> list[Entry]:
        """The passes of one question, in order."""
        found = []
        for tier in range(len(self.tiers)):
            code = int(self.routes.refused[question, tier])
            if code != NOT_ASKED:
                lower, upper, prompt, output = (int(one[question]) for one in self.tokens(tier))
                found.append(Entry(tier, REFUSALS[code], Work(lower, upper), prompt, output))
        return found

    def work(self, tier: int) -> Work:
        """Of all questions at one tier."""
        lower, upper, _, _ = self.tokens(tier)
        return Work(int(lower.sum()), int(upper.sum()))

    def flops(self) -> Float[np.ndarray, " N"]:
        """All passes of each question: `LayerSizes.flops`."""
        total = np.zeros(len(self.routes.answered_by))
        for place, tier in enumerate(self.tiers):
            lower, upper, _, _ = self.tokens(place)
            total += pass_flops(tier.sizes, lower, upper)
        return total

    def paper_flops(self) -> Float[np.ndarray, " N"]:
        """The paper's count for each question: 2 N of the tier that answered it."""
        sizes = np.array([2.0 * tier.sizes.parameters for tier in self.tiers])
        counted: np.ndarray = sizes[self.routes.answered_by]
        return counted

    def price(self) -> Float[np.ndarray, " N"]:
        """Of each question, all passes; as if a tier billed what it computed."""
        total = np.zeros(len(self.routes.answered_by))
        for place, tier in enumerate(self.tiers):
            _, _, prompt, output = self.tokens(place)
            total += (prompt * tier.price_in + output * tier.price_out) / 1e6
        return total

    def seconds(self) -> Float[np.ndarray, " N"]:
        """Of each question, all passes one after the other; a pass that ends at the tap takes its layers' share."""
        total = np.zeros(len(self.routes.answered_by))
        for place, tier in enumerate(self.tiers):
            if tier.seconds is not None:
                lower, upper, _, _ = self.tokens(place)
                whole = pass_flops(tier.sizes, lower, lower)
                share = np.divide(
                    pass_flops(tier.sizes, lower, upper), whole, out=np.zeros_like(whole), where=whole > 0
                )
                total += tier.seconds * share
        return total

    def saved(self, largest: Ledger) -> tuple[float, float]:
        """Reduced CC beside a ledger of the largest model alone: of all passes, and by the paper's count."""
        true = 1 - self.flops().sum() / largest.flops().sum()
        return float(true), float(1 - self.paper_flops().sum() / largest.paper_flops().sum())


def alone(tiers: Sequence[TierCosts], tier: int) -> Ledger:
    """The ledger of one tier that answers everything."""
    count = len(tiers[tier].prompt_tokens)
    refused = np.full((count, len(tiers)), NOT_ASKED, np.int8)
    refused[:, tier] = 0
    return Ledger(tuple(tiers), Routes(np.full(count, tier), refused))


def pass_flops(sizes: LayerSizes, lower: np.ndarray, upper: np.ndarray) -> Float[np.ndarray, " N"]:
    """`LayerSizes.flops` of many passes."""
    total: np.ndarray = 2.0 * (sizes.lower * lower + sizes.upper * upper)
    return total
