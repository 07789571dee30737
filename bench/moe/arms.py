"""Policies of the three levels that are compared."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdual.scheduling.dispatch import DispatchPolicy, GimbalDispatch, GimbalThresholds, dispatch_policy

# No rule but that users return to their engine.
_AFFINITY_ONLY = GimbalThresholds(theta_kv=1.0, theta_diff=1.0, theta_load=2**62)


@dataclass(frozen=True, slots=True)
class Arm:
    """Policies of the three levels, by the names of the settings.

    Attributes:
      dispatch: of the settings' names, or "affinity": users return to their engine, all others come in turn.
      remaining: compares loads by tokens that are left to compute, not by those in memory.
    """

    name: str
    dispatch: str = "rr"
    queue: str = "fcfs"
    experts: str = "linear"
    remaining: bool = False

    def dispatcher(self) -> DispatchPolicy:
        if self.dispatch == "affinity":
            return GimbalDispatch(_AFFINITY_ONLY)
        if self.remaining:
            scope = "relaxed" if self.dispatch == "gimbal_relaxed" else "literal"
            return GimbalDispatch(GimbalThresholds(), load_scope=scope, load="remaining")  # type: ignore[arg-type]
        return dispatch_policy(self.dispatch)


ARMS = (
    Arm("rr"),
    Arm("vllm_counts", dispatch="vllm_counts"),
    Arm("DPLB", dispatch="gimbal"),
    Arm("DPLB, remaining", dispatch="gimbal", remaining=True),
    Arm("DPLB relaxed", dispatch="gimbal_relaxed"),
    Arm("DPLB relaxed, remaining", dispatch="gimbal_relaxed", remaining=True),
    Arm("SJFS", queue="sjf"),
    Arm("SJF, linear ageing", queue="sjf_linear"),
    Arm("SJF, rolling limit", queue="sjf_rolling"),
    Arm("EPLB", experts="eplb"),
    Arm("EDR", experts="edr"),
    Arm("EDR, one assignment", experts="edr_column"),
    Arm("source locality", experts="source"),
    Arm("METRO", experts="metro"),
    Arm("DPLB + SJFS", dispatch="gimbal", queue="sjf"),
    Arm("DPLB + EDR", dispatch="gimbal", experts="edr"),
    Arm("SJFS + EDR", queue="sjf", experts="edr"),
    Arm("score", dispatch="score"),
    Arm("Gimbal", dispatch="gimbal", queue="sjf", experts="edr"),
    Arm("Gimbal relaxed", dispatch="gimbal_relaxed", queue="sjf", experts="edr"),
    Arm("Gimbal relaxed, remaining", dispatch="gimbal_relaxed", queue="sjf", experts="edr", remaining=True),
    Arm("vllm_counts + SJFS + EPLB", dispatch="vllm_counts", queue="sjf", experts="eplb"),
)
BASELINES = ARMS[:2]  # what the paper names, and what vLLM does
SESSION_ARMS = (
    *BASELINES,
    Arm("affinity only", dispatch="affinity"),
    Arm("Gimbal", dispatch="gimbal", queue="sjf", experts="edr"),
)
