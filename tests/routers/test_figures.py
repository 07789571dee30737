"""Figures by hand, of two layers of four experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxdual.routers.figures import comparison, figures, pools
from jaxdual.routers.picture import device_traffic, draw
from jaxdual.scheduling.expert_policies import RouterWindow

# Ten tokens of two devices; each chooses one expert a layer.
SOURCES = np.array([[[5, 0, 1, 0], [1, 2, 1, 0]], [[0, 2, 4, 0], [0, 0, 2, 2]]])
TRANSITIONS = np.array([[[0, 0, 6, 0], [0, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]])
ONE = RouterWindow(10, SOURCES, TRANSITIONS)
# The same of the experts 1, 2, 3, 0.
OTHER = RouterWindow(10, np.roll(SOURCES, 1, axis=2), np.roll(TRANSITIONS, (1, 1), axis=(1, 2)))


def test_figures_of_a_workload() -> None:
    found = figures(ONE, [3, 5], 2)
    assert found["tokens"] == 10
    assert found["relative_loads"] == [[2.4, 0.8, 0.8, 0], [0, 0.8, 2.4, 0.8]]
    assert found["most_skewed"] == [
        {"layer": 3, "expert": 0, "load": 2.4},
        {"layer": 5, "expert": 2, "load": 2.4},
    ]
    assert found["pairs"][:2] == [
        {"layers": [3, 5], "experts": [0, 2], "share": 0.6},
        {"layers": [3, 5], "experts": [1, 1], "share": 0.2},
    ]
    assert found["pools"]["threshold"] == {"pairs": 1, "experts": 2, "most_in_a_layer": 1, "rarest_share": 0.6}
    assert found["pools"]["top"] == {"pairs": 3, "experts": 6, "most_in_a_layer": 3, "rarest_share": 0.2}
    assert found["pools"]["edr"] == found["pools"]["threshold"]
    linear = found["placements"]["linear"]
    assert linear["imbalance"] == {"mean": 1.6, "worst": 1.6, "by_layer": [1.6, 1.6]}
    assert linear["cut"] == 0.6
    assert found["placements"]["eplb"]["imbalance"]["worst"] == pytest.approx(1.2)
    assert found["placements"]["edr"]["cut"] <= 0.4


def test_a_pool_without_frequent_pairs_is_that_of_the_strongest_ones() -> None:
    even = RouterWindow(10, SOURCES, np.full((1, 4, 4), 1))
    found = pools(even, 2)
    assert [found[name].edges for name in ("threshold", "top", "edr")] == [0, 16, 0]


def test_one_layer_has_no_pairs(tmp_path: Path) -> None:
    one = RouterWindow(10, SOURCES[:1], TRANSITIONS[:0])
    found = figures(one, [3], 2)
    assert found["pairs"] == []
    assert [pool["experts"] for pool in found["pools"].values()] == [0, 0, 0]
    assert found["placements"]["edr"] == found["placements"]["eplb"]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    draw({"batch": one}, [3], tmp_path / "routers.png")
    assert (tmp_path / "routers.png").read_bytes().startswith(b"\x89PNG")


def test_what_two_workloads_have_in_common() -> None:
    assert comparison(ONE, ONE, 2)["correlation"] == pytest.approx([1, 1])
    assert comparison(ONE, ONE, 2)["pools"]["top"] == {"both": 6, "either": 6}
    found = comparison(ONE, OTHER, 2)
    want = [np.corrcoef(*loads)[0, 1] for loads in ([[6, 2, 2, 0], [0, 6, 2, 2]], [[0, 2, 6, 2], [2, 0, 2, 6]])]
    assert found["correlation"] == pytest.approx(want)
    assert found["pools"]["threshold"] == {"both": 0, "either": 4}
    # Of the first, experts 0 and 3, then 0 and 2 share a device; of the second, 0 and 1, then 1 and 3.
    placed = found["placements"]
    assert placed["of_first_for_second"]["eplb"]["imbalance"]["by_layer"] == pytest.approx([1.6, 1.2])
    assert placed["of_second_for_first"]["eplb"]["imbalance"]["by_layer"] == pytest.approx([1.6, 1.2])
    assert comparison(ONE, RouterWindow(10, np.ones((2, 1, 4), int), TRANSITIONS), 2)["correlation"] == [None, None]


def test_traffic_between_devices_is_that_of_experts_in_order() -> None:
    np.testing.assert_allclose(device_traffic(ONE), [[7 / 12, 5 / 12], [3 / 8, 5 / 8]])
