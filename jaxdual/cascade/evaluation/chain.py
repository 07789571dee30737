"""Tiers as their signals have them: what a chain of them answers, and what that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from jaxdual.cascade.evaluation.items import Split
from jaxdual.cascade.evaluation.ledger import Ledger, TierCosts, alone
from jaxdual.cascade.evaluation.rules import Routes, Scores, p_t_of, refusals, route
from jaxdual.cascade.evaluation.signals import Signals, check_same_questions
from jaxdual.cascade.evaluation.train import p_ik_of
from jaxdual.cascade.gate import Gate, PtMode
from jaxdual.cascade.probe import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One model over questions.

    Attributes:
      signals: of the model.
      p_ik: `[N]`, of its probe; None without one.
      costs: of its passes.
    """

    signals: Signals
    p_ik: Float[np.ndarray, " N"] | None
    costs: TierCosts

    @classmethod
    def of(cls, signals: Signals, probe: Probe | None, *, price_in: float = 0.0, price_out: float = 0.0) -> Tier:
        """A tier of its signals and its probe.

        Raises:
          ValueError: a probe of another model or another tap.
        """
        header = signals.header
        if probe is not None:
            found = probe.fingerprint, probe.num_layers, probe.tap
            wanted = header.fingerprint, header.sizes.layers, header.sizes.tap
            if found != wanted:
                raise ValueError(
                    f"the probe is of {probe.model} ({found[0][:16]}, tap {found[2]} of {found[1]} layers), the "
                    f"signals are of {header.model} ({wanted[0][:16]}, tap {wanted[2]} of {wanted[1]})"
                )
        p_ik = None if probe is None else p_ik_of(probe.parameters, signals.hidden)
        return cls(signals=signals, p_ik=p_ik, costs=signals.costs(price_in=price_in, price_out=price_out))

    @property
    def name(self) -> str:
        return self.signals.header.model

    @property
    def correct(self) -> Bool[np.ndarray, " N"]:
        return self.signals.correct

    def p_t(self, mode: PtMode = "full", temperature: float = 1.0) -> Float[np.ndarray, " N"]:
        """P(T) of each question, not calibrated but for the temperature."""
        return p_t_of(self.signals.header.confidence(mode, temperature), self.signals.logprobs)

    def scores(self, gate: Gate) -> Scores:
        """What a gate compares."""
        p_t = None if gate.confidence is None else p_t_of(gate.confidence, self.signals.logprobs)
        return Scores(self.p_ik, p_t)

    def taken(self, chosen: np.ndarray) -> Tier:
        """Over some of the questions, by indices or a mask."""
        costs = self.costs
        return Tier(
            signals=self.signals.taken(chosen),
            p_ik=None if self.p_ik is None else self.p_ik[chosen],
            costs=dataclasses.replace(
                costs,
                prompt_tokens=costs.prompt_tokens[chosen],
                output_tokens=costs.output_tokens[chosen],
                judged_tokens=costs.judged_tokens[chosen],
                seconds=None if costs.seconds is None else costs.seconds[chosen],
            ),
        )


@dataclass(frozen=True, slots=True)
class Chain:
    """Tiers from the smallest to the largest, over the same questions.

    Raises:
      ValueError: fewer than two, or other questions for some.
    """

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        if len(self.tiers) < 2:
            raise ValueError(f"{len(self.tiers)} tiers; a chain has at least 2")
        check_same_questions([tier.signals for tier in self.tiers])

    def __len__(self) -> int:
        return len(self.tiers[0].signals)

    @property
    def costs(self) -> tuple[TierCosts, ...]:
        return tuple(tier.costs for tier in self.tiers)

    @property
    def correct(self) -> Bool[np.ndarray, "N tiers"]:
        """Whether each tier is right."""
        return np.stack([tier.correct for tier in self.tiers], axis=1)

    def taken(self, chosen: np.ndarray) -> Chain:
        """Over some of the questions, by indices or a mask."""
        return Chain(tuple(tier.taken(chosen) for tier in self.tiers))

    def of(self, split: Split) -> Chain:
        """Over the questions of one split.

        Raises:
          ValueError: there are none.
        """
        chosen = self.tiers[0].signals.splits == split
        if not chosen.any():
            raise ValueError(f"signals of {self.tiers[0].name} have no {split} questions")
        return self.taken(chosen)

    def with_parameters(self, parameters: Sequence[int]) -> Chain:
        """The same answers, as if the layers of each tier had so many parameters."""
        pairs = zip(self.tiers, parameters, strict=True)
        return Chain(tuple(dataclasses.replace(tier, costs=tier.costs.scaled(size)) for tier, size in pairs))

    def ledger(self, gates: Sequence[Gate]) -> Ledger:
        """What the chain computes with these gates, one for each tier but the last.

        Raises:
          ValueError: another number of gates.
        """
        if len(gates) != len(self.tiers) - 1:
            raise ValueError(f"{len(gates)} gates of {len(self.tiers)} tiers; all but the last have one")
        asked = [refusals(gate, tier.scores(gate)) for gate, tier in zip(gates, self.tiers, strict=False)]
        return Ledger(self.costs, route(asked, len(self)))

    def alone(self, tier: int) -> Ledger:
        """The ledger of one tier that answers everything."""
        return alone(self.costs, tier)

    def answered(self, routes: Routes) -> Bool[np.ndarray, " N"]:
        """Whether each question is answered right."""
        right: np.ndarray = self.correct[np.arange(len(self)), routes.answered_by]
        return right

    def given(self, routes: Routes) -> np.ndarray:
        """What each question is answered with."""
        every = np.stack([tier.signals.given for tier in self.tiers], axis=1)
        chosen: np.ndarray = every[np.arange(len(self)), routes.answered_by]
        return chosen
