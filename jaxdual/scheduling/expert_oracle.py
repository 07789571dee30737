"""The best placement of few experts, by mixed integer programming: the formal problem of arXiv 2602.21626.

Too slow to serve by, as its authors say; it shows how far the heuristics are from the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxdual.scheduling.expert_figures import cut, device_loads
from jaxdual.scheduling.experts import Placement


@dataclass(frozen=True, slots=True)
class BestPlacement:
    """The solver's answer.

    Attributes:
      placement: the best one found.
      objective: its value; `bound` is what no placement can be below.
      deviation: greatest difference between a device's load in a layer and the layer's mean, by the mean of all layers'
        means.
      cut: part of the transitions between different devices.
    """

    placement: Placement
    objective: float
    bound: float
    deviation: float
    cut: float


class _Program:
    """Rows of a mixed integer program, gathered one by one."""

    def __init__(self, variables: int) -> None:
        self.variables = variables
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def row(self, columns: np.ndarray, values: np.ndarray, low: float, high: float) -> None:
        self._rows += [len(self._low)] * len(columns)
        self._columns += columns.tolist()
        self._values += np.broadcast_to(values, columns.shape).tolist()
        self._low.append(low)
        self._high.append(high)

    def solve(
        self, cost: np.ndarray, integral: np.ndarray, high: np.ndarray, seconds: float
    ) -> tuple[np.ndarray, float]:
        from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import, and only planners want it
        from scipy.sparse import csr_array

        matrix = csr_array((self._values, (self._rows, self._columns)), shape=(len(self._low), self.variables))
        result = milp(
            cost,
            constraints=LinearConstraint(matrix, self._low, self._high),
            integrality=integral,
            bounds=Bounds(np.zeros(self.variables), high),
            options={"time_limit": seconds},
        )
        if result.x is None:
            raise ValueError(f"no placement was found in {seconds} s: {result.message}")
        return result.x, float(result.mip_dual_bound)


def best_placement(
    loads: np.ndarray,
    transitions: np.ndarray,
    devices: int,
    *,
    balance: float = 1.0,
    affinity: float = 1.0,
    by_column: bool = False,
    seconds: float = 60.0,
) -> BestPlacement:
    """Minimises `balance * deviation + affinity * cut`, both as in `BestPlacement`.

    The paper's sum over pairs j < k leaves out transitions from k to j; both directions count here.

    Args:
      loads: `[layers, experts]`.
      transitions: `[layers - 1, experts, experts]` counts.
      devices: that share each layer's experts evenly.
      by_column: one assignment for all layers, as the paper states the problem; else one for each.
      seconds: for the solver.

    Raises:
      ValueError: sizes that can't be divided, or nothing found in time.
    """
    layers, experts = loads.shape
    if experts % devices:
        raise ValueError(f"{experts} experts can't be split over {devices} devices")
    columns = 1 if by_column else layers
    at = np.arange(columns * experts * devices).reshape(columns, experts, devices)
    pairs = _pairs(transitions, by_column)
    deviation = at.size + len(pairs) * devices
    program = _Program(deviation + 1)
    for column in range(columns):
        for expert in range(experts):
            program.row(at[column, expert], np.ones(1), 1, 1)
        for device in range(devices):
            program.row(at[column, :, device], np.ones(1), experts // devices, experts // devices)
    mean = loads.sum(axis=1) / devices
    for layer in range(layers):
        for device in range(devices):
            where = np.append(at[0 if by_column else layer, :, device], deviation)
            program.row(where, np.append(loads[layer], -1.0), -np.inf, mean[layer])
            program.row(where, np.append(loads[layer], 1.0), mean[layer], np.inf)
    cost = np.zeros(program.variables)
    total = max(float(transitions.sum()), 1e-9)
    for number, (before, after, weight) in enumerate(pairs):
        for device in range(devices):
            together = at.size + number * devices + device
            # The cut is minimised, so `together` rises as far as these let it: no lower bound is needed.
            for one in (before, after):
                column, expert = (0, one % experts) if by_column else divmod(one, experts)
                program.row(np.array([together, at[column, expert, device]]), np.array([1.0, -1.0]), -np.inf, 0)
            cost[together] = -affinity * weight / total
    scale = max(float(mean.mean()), 1e-9)
    cost[deviation] = balance / scale
    integral = np.zeros(program.variables)
    integral[: at.size] = 1
    high = np.ones(program.variables)
    high[deviation] = np.inf
    solution, bound = program.solve(cost, integral, high, seconds)
    # One device holds an expert: rounding takes the solver's tolerance away.
    device_of = solution[: at.size].reshape(at.shape).argmax(axis=2)
    placed = np.argsort(np.broadcast_to(device_of, (layers, experts)), axis=1, kind="stable").astype(np.int32)
    placement = Placement(placed, devices, experts)
    deviation_found = float(np.abs(device_loads(loads, placement) - mean[:, None]).max() / scale)
    cut_found = cut(transitions, placement)
    all_apart = affinity * sum(weight for *_, weight in pairs) / total
    return BestPlacement(
        placement,
        objective=balance * deviation_found + affinity * cut_found,
        bound=bound + all_apart,
        deviation=deviation_found,
        cut=cut_found,
    )


def _pairs(transitions: np.ndarray, by_column: bool) -> list[tuple[int, int, float]]:
    """Pairs of experts that follow each other, each expert by its number (layer by layer), and how often."""
    experts = transitions.shape[1]
    if not by_column:
        found = np.argwhere(transitions > 0)
        return [
            (int(gap * experts + i), int((gap + 1) * experts + j), float(transitions[gap, i, j])) for gap, i, j in found
        ]
    both = transitions.sum(axis=0)
    both = both + both.T
    return [(i, j, float(both[i, j])) for i in range(experts) for j in range(i + 1, experts) if both[i, j]]
