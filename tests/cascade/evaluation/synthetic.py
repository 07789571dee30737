"""Signals of tiers that were never run: confidences drawn with the answers that they are of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.signals import Header, Signals
from jaxdual.cascade.gate import Confidence
from jaxdual.cascade.work import LayerSizes

LETTERS = np.array(list("ABCD"))


def chain(
    skills: Sequence[float] = (0.0, 3.0),
    sizes: Sequence[int] = (1000, 8750),
    count: int = 4000,
    seed: int = 0,
    noise: float = 0.7,
) -> Chain:
    """Tiers of rising skill over questions of one difficulty each; P(T) and P(IK) tell of both what noise leaves."""
    rng = np.random.default_rng(seed)
    difficulty, right = rng.normal(0, 2, count), rng.integers(0, 4, count)
    splits = rng.permuted(np.repeat(["train", "validation", "test"], [count // 2, count // 4, count - count * 3 // 4]))
    tokens = rng.integers(8, 16, count)
    tiers = []
    for number, (skill, size) in enumerate(zip(skills, sizes, strict=True)):
        knows = skill - difficulty
        correct = rng.random(count) < 0.25 + 0.75 * expit(1.5 * knows)
        given = np.where(correct, right, (right + rng.integers(1, 4, count)) % 4)
        sure = 0.25 + 0.74 * expit(1.5 * knows + rng.normal(0, noise, count))
        letters = np.repeat(0.98 * (1 - sure)[:, None] / 3, 4, axis=1)
        letters[np.arange(count), given] = 0.98 * sure
        header = Header(
            model=f"tier{number}",
            folder=f"models/tier{number}",
            fingerprint=f"{number:02}" * 32,
            dtype="float32",
            sizes=LayerSizes(size * 3 // 4, size - size * 3 // 4, 4, 3),
            hidden_size=4,
            form="chat",
            kind="choices",
            tokens=((1,), (2,), (3,), (4,)),
            items="synthetic",
        )
        signals = Signals(
            header=header,
            ids=np.arange(count).astype(str),
            subjects=np.full(count, "all"),
            splits=splits,
            given=LETTERS[given],
            right=LETTERS[right],
            correct=correct,
            hidden=np.zeros((count, 4), np.float32),
            logprobs=np.log(letters)[:, :, None].astype(np.float32),
            prompt_tokens=tokens,
            output_tokens=np.ones(count, int),
            judged_tokens=np.ones(count, int),
            seconds=np.full(count, size * 1e-6),
        )
        p_ik = 0.25 + 0.75 * expit(1.5 * knows + rng.normal(0, noise, count))
        tiers.append(Tier(signals=signals, p_ik=p_ik if number < len(skills) - 1 else None, costs=signals.costs()))
    return Chain(tuple(tiers))


CHOICES = Confidence("choices", ((1,), (2,), (3,), (4,)))
