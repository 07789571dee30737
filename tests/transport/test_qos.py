"""Configuration of InfiniBand and RoCE, and that both agree with what a transport marks its packets with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxdual.transport import TrafficClass
from jaxdual.transport.lanes import DSCP, LANES, SERVICE_LEVEL
from jaxdual.transport.qos import infiniband, main, roce


def test_opensm_options_are_those_of_the_paper() -> None:
    options = dict(line.split(" ", 1) for line in infiniband().splitlines() if not line.startswith("#"))
    assert options == {
        "qos": "TRUE",
        "qos_max_vls": "4",
        "qos_high_limit": "240",
        "qos_vlarb_high": "0:192,1:192,2:0,3:192",
        "qos_vlarb_low": "0:192,1:192,2:64,3:192",
        "qos_sl2vl": "0,1,2,3,2,2,2,2,2,2,2,2,2,2,2,2",
    }
    lanes = [int(lane) for lane in options["qos_sl2vl"].split(",")]
    assert lanes[SERVICE_LEVEL[TrafficClass.KV]] == 2  # the one without weight in the high table
    assert lanes[SERVICE_LEVEL[TrafficClass.MODEL]] == 0


def test_roce_has_four_lossless_classes_and_weights_that_sum_to_all() -> None:
    settings = [line.split('"$netdev" ')[1] for line in roce().splitlines() if line.startswith("mlnx_qos")]
    assert settings[0] == "--trust dscp"
    points = dict(line.removeprefix("--dscp2prio set,").split(",") for line in settings if "dscp2prio" in line)
    assert points == {"26": "3", "34": "4", "10": "1", "42": "5"}
    assert "--pfc 0,1,0,1,1,1,0,0" in settings
    weights = [int(weight) for weight in settings[-1].partition("--tcbw ")[2].split(",")]
    assert sum(weights) == 100
    assert weights[int(points[str(DSCP[TrafficClass.KV])])] == 1
    assert weights[int(points[str(DSCP[TrafficClass.MODEL])])] > 30


def test_lanes_are_told_apart_by_every_mark() -> None:
    for mark in ("virtual_lane", "service_level", "dscp", "priority"):
        assert len({getattr(lane, mark) for lane in LANES}) == len(LANES)


def test_roce_template_is_a_shell_script(tmp_path: Path) -> None:
    file = tmp_path / "roce.sh"
    assert main(["--fabric", "roce", "--out", str(file)]) == 0
    assert file.read_text() == roce()
    subprocess.run(["sh", "-n", str(file)], check=True)


@pytest.mark.parametrize("fabric", ["infiniband", "roce"])
def test_command_writes_it_and_warns_of_nothing(fabric: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "jaxdual.transport.qos", "--fabric", fabric]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ((infiniband if fabric == "infiniband" else roce)(), "")
