"""A chain run through real engines, beside what its signals say of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdual.api import LLM
from jaxdual.cascade.evaluation.chain import Chain
from jaxdual.cascade.evaluation.rules import compared
from jaxdual.cascade.gate import Gate, Verdict
from jaxdual.cascade.work import LayerSizes, Work
from jaxdual.config import EngineConfig
from jaxdual.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class TierRun:
    """One engine over the prompts that came to it.

    Attributes:
      places: of the questions.
      passed: of each, whether the engine answered it.
      verdicts: of each; None where it had no gate.
      work: of the engine, by its own statistics.
      sizes: of its layers, likewise.
      seconds: from the first prompt to the last answer, without those spent compiling.
    """

    places: np.ndarray
    passed: np.ndarray
    verdicts: list[Verdict | None]
    work: Work
    sizes: LayerSizes
    seconds: float


def run_engines(
    configs: Sequence[EngineConfig], prompts: Sequence[Sequence[Sequence[int]]], gates: Sequence[Gate], max_output: int
) -> list[TierRun]:
    """Asks each engine what those before it have refused, one engine after the other.

    Args:
      configs: of the engines, smallest model first. Prefixes are not shared, so that all passes are whole.
      prompts: tokens of each question, by each engine's tokenizer.
      gates: of each engine but the last.
      max_output: tokens of an answer.
    """
    waiting, runs = np.arange(len(prompts[0])), []
    params = SamplingParams(temperature=0.0, max_tokens=max_output)
    for config, gate, own in zip(configs, [*gates, None], prompts, strict=True):
        llm = LLM.from_config(config)
        before, begin = llm.stats(), time.perf_counter()
        outputs = [llm.submit({"prompt_token_ids": list(own[place])}, params, gate=gate) for place in waiting.tolist()]
        while llm.has_unfinished:
            llm.step()
        after = llm.stats()
        seconds = time.perf_counter() - begin - (after.compile_seconds - before.compile_seconds)
        passed = np.array([output.outputs[0].finish_reason != "refused" for output in outputs], bool)
        verdicts = [output.verdict for output in outputs]
        work = Work(after.work.lower - before.work.lower, after.work.upper - before.work.upper)
        runs.append(TierRun(waiting, passed, verdicts, work, llm.info.layer_sizes, seconds))
        waiting = waiting[~passed]
    return runs


def compare(chain: Chain, gates: Sequence[Gate], runs: Sequence[TierRun]) -> dict[str, Any]:
    """Whether engines decide and compute as the ledger says.

    Args:
      chain: over the questions that the engines were asked.
      gates: of both.
      runs: of `run_engines`.
    """
    ledger = chain.ledger(gates)
    answered = np.full(len(chain), len(chain.tiers) - 1)
    tiers = []
    for place, (tier, run) in enumerate(zip(chain.tiers, runs, strict=True)):
        answered[run.places[run.passed]] = place
        wanted, sizes = ledger.work(place), tier.costs.sizes
        tiers.append(
            {
                "name": tier.name,
                "questions": len(run.places),
                "answered": int(run.passed.sum()),
                "engine": {"lower": run.work.lower, "upper": run.work.upper, "flops": run.sizes.flops(run.work)},
                "ledger": {"lower": wanted.lower, "upper": wanted.upper, "flops": sizes.flops(wanted)},
                # Without a tap an engine counts all of its layers as lower ones.
                "equal": run.sizes.flops(run.work) == sizes.flops(wanted),
                "seconds": run.seconds,
                **({"off_by": _off_by(chain, place, gates[place], run)} if place < len(gates) else {}),
            }
        )
    return {
        "questions": len(chain),
        "other_tier": int((answered != ledger.routes.answered_by).sum()),
        "equal": all(tier["equal"] for tier in tiers),
        "tiers": tiers,
    }


def _off_by(chain: Chain, place: int, gate: Gate, run: TierRun) -> dict[str, float]:
    """Largest differences of scores, where engine and signals both have them."""
    tier = chain.tiers[place]
    found = compared(gate, tier.scores(gate))
    largest = {"p_ik": 0.0, "p_t": 0.0}
    for question, verdict in zip(run.places, run.verdicts, strict=True):
        for name, scores in (("p_ik", found.p_ik), ("p_t", found.p_t)):
            score = None if verdict is None else getattr(verdict, name)
            if score is not None and scores is not None:
                largest[name] = max(largest[name], abs(score - float(scores[question])))
    return largest
