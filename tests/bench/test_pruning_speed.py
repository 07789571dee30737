"""The measurement of pruned models beside dense ones: what it relates, and whose bytes it tells."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import models
from bench.pruning.speed import Arm, Load, markdown, pruned_arms, speed
from jaxdual.model_folder import shipped_model
from jaxdual.pruning.structured.plan import Structure
from models.shapes import parameters_of
from tests.pruned_models import KINDS, random_model


def test_arms_are_measured_beside_the_first_and_their_bytes_are_those_that_are_there(tmp_path: Path) -> None:
    dense = dataclasses.replace(
        KINDS["pruned_window"], layer_windows=(), layer_intermediate_sizes=(), max_position_embeddings=1024
    )
    narrow = dataclasses.replace(dense, layer_intermediate_sizes=(16, 48, 8), num_heads=2, num_kv_heads=1)
    arms = []
    for name, config in (("dense", dense), ("narrow", narrow)):
        models.save(random_model(config), tmp_path / name, "bfloat16")
        arms.append(Arm(name, tmp_path / name))
    rows = speed(arms, 2, (Load("decode", 2, 4, 8), Load("prefill", 1, 16, 1)))
    for row, config in zip(rows, (dense, narrow), strict=True):
        sizes = row["bytes"]
        assert sizes["weight_bytes"] == sizes["loaded"] == 4 * sizes["parameters"]
        assert sizes["parameters"] == sum(value.size for value in parameters_of(random_model(config)).values())
        assert 2 * sizes["parameters"] == sizes["files_computed"] < sizes["files"] < sizes["files_computed"] + 10_000
        assert sizes["kv_bytes_per_token"] == sizes["kv_loaded_per_token"] == 4 * 2 * 3 * config.num_kv_heads * 16
        for load in row["loads"].values():
            assert min(load["wall_ms"], load["cpu_ms"]) > 0
            assert load["cpu_ratio_lowest"] <= load["cpu_ratio"] <= load["cpu_ratio_highest"]
    assert {load[ratio] for load in rows[0]["loads"].values() for ratio in ("wall_ratio", "cpu_ratio")} == {1.0}
    assert rows[1]["bytes"]["kv_bytes_per_token"] == rows[0]["bytes"]["kv_bytes_per_token"] / 2
    lines = markdown(rows).splitlines()
    assert lines[0] == "|  | decode | prefill |"
    assert [line.split(" | ")[0] for line in lines if line.startswith("| n")] == ["| narrow", "| narrow"]


@pytest.mark.slow
def test_pruned_arms_are_folders_of_smaller_models(tmp_path: Path) -> None:
    (arm,) = pruned_arms(shipped_model("small"), tmp_path, {"half": Structure(share=0.5)})
    assert arm.name == "half"
    assert models.load(arm.folder).config.intermediate_size == 192
