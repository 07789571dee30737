"""Whether confidences are what they say, and maps that make them so: temperature, Platt, fusion.

All are fitted on validation questions by the negative log-likelihood (Guo et al. 2017; Platt 1999).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, stats
from scipy.special import expit

from jaxdual.cascade.evaluation.rules import softmax
from jaxdual.cascade.gate import Fusion, Platt

BINS = 15
_LEAST = 1e-12  # of a probability whose logit or logarithm is taken
_TEMPERATURES = (1e-2, 1e2)


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a confidence is.

    Attributes:
      count: questions.
      base_rate: share of right answers.
      ece: expected calibration error, 15 bins of equal mass.
      brier: mean squared error.
      nll: mean negative log-likelihood, in nats.
      auroc: chance that a right answer has more confidence than a wrong one; nan where all are right, or all wrong.
    """

    count: int
    base_rate: float
    ece: float
    brier: float
    nll: float
    auroc: float

    @classmethod
    def of(cls, confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]) -> Quality:
        return cls(
            len(correct),
            float(correct.mean()),
            expected_calibration_error(confidence, correct),
            float(np.mean((confidence - correct) ** 2)),
            negative_log_likelihood(confidence, correct),
            auroc(confidence, correct),
        )


def expected_calibration_error(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int = BINS
) -> float:
    """Mean distance of confidence and accuracy over bins of equal mass, weighted by their questions."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [len(part) * abs(confidence[part].mean() - correct[part].mean()) for part in parts]
    return float(sum(gaps) / len(confidence))


def negative_log_likelihood(confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]) -> float:
    """Of right and wrong, in nats a question."""
    clipped = np.clip(confidence, _LEAST, 1 - _LEAST)
    return float(-np.mean(np.where(correct, np.log(clipped), np.log1p(-clipped))))


def auroc(confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]) -> float:
    """Area under the ROC curve, by ranks: ties count half."""
    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return float("nan")
    ranks = stats.rankdata(confidence)
    return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def risk_coverage(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Shares of questions answered, the surest first, and of wrong ones among those (El-Yaniv and Wiener 2010)."""
    order = np.argsort(-confidence, kind="stable")
    counts = np.arange(1, len(order) + 1)
    return counts / len(order), np.cumsum(~correct[order]) / counts


def letter_nll(logits: Float[np.ndarray, "N letters"], right: Int[np.ndarray, " N"], temperature: float) -> float:
    """Mean negative log-likelihood of the right letter under the letters' own distribution at a temperature.

    Args:
      logits: of the letters; -inf for those that a question does not have.
      right: index of the right letter.
    """
    shares = softmax(logits, temperature)[np.arange(len(right)), right]
    return float(-np.mean(np.log(np.maximum(shares, _LEAST))))


def fit_temperature(logits: Float[np.ndarray, "N letters"], right: Int[np.ndarray, " N"]) -> float:
    """The temperature of the least `letter_nll`; never one with a higher value than 1 has.

    Args:
      logits, right: as for `letter_nll`; questions whose right letter is below 0 are left out.

    Raises:
      ValueError: no question has a right letter.
    """
    known = right >= 0
    if not known.any():
        raise ValueError("a temperature needs questions with a right letter")
    logits, right = logits[known].astype(np.float64), right[known]
    # Convex in the inverse temperature, so one minimum.
    found = optimize.minimize_scalar(
        lambda log: letter_nll(logits, right, float(np.exp(log))),
        bounds=(np.log(_TEMPERATURES[0]), np.log(_TEMPERATURES[1])),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = float(np.exp(found.x))
    return temperature if letter_nll(logits, right, temperature) <= letter_nll(logits, right, 1.0) else 1.0


def fit_platt(confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]) -> Platt:
    """Slope and intercept of the least negative log-likelihood.

    Raises:
      ValueError: all answers are right, or all are wrong.
    """
    slope, intercept = _logistic([logit(confidence)], correct)
    return Platt(slope, intercept)


def fit_fusion(
    p_ik: Float[np.ndarray, " N"], p_t: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], tau: float
) -> Fusion:
    """Weights of both scores of the least negative log-likelihood; raises as `fit_platt`.

    Args:
      p_ik, p_t: as the gate compares them.
      correct: whether the answer is right.
      tau: of the fusion.
    """
    of_p_t, of_p_ik, intercept = _logistic([logit(p_t), logit(p_ik)], correct)
    return Fusion(of_p_t, of_p_ik, intercept, tau)


def logit(p: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """log(p / (1 - p)), of probabilities kept off 0 and 1."""
    clipped = np.clip(np.asarray(p, np.float64), _LEAST, 1 - _LEAST)
    values: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return values


def fit_logistic(
    features: Float[np.ndarray, "N F"], correct: Bool[np.ndarray, " N"], ridge: float = 1e-6
) -> Float[np.ndarray, " F"]:
    """Weights of a logistic regression; a tiny ridge keeps those of separable data finite.

    Args:
      features: a column of ones among them, for the constant.
      correct: what is predicted.
      ridge: weight of the squared weights.
    """
    sign = np.where(correct, -1.0, 1.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = sign * (features @ weights)
        value = np.logaddexp(0, z).mean() + ridge * (weights @ weights)
        return float(value), (features.T @ (sign * expit(z))) / len(z) + 2 * ridge * weights

    start = np.zeros(features.shape[1])
    found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 500})
    weights: np.ndarray = found.x
    return weights


def _logistic(columns: list[np.ndarray], correct: np.ndarray) -> tuple[float, ...]:
    """Weights of a logistic regression, the constant's last."""
    if correct.all() or not correct.any():
        raise ValueError(f"{int(correct.sum())} of {len(correct)} answers are right; a fit needs right and wrong ones")
    features = np.stack([*columns, np.ones(len(correct))], axis=1)
    return tuple(float(weight) for weight in fit_logistic(features, correct))
