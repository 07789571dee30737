"""The kernels compiled for an H200, ahead of time: what the compiler made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.iha_prefill.virtual import GROUP_BYTES

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[3]
PLUGIN = Path(os.environ.get("JAXDUAL_AOT", ROOT / ".aot"))
PTXAS = Path("/usr/local/cuda/bin/ptxas")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if not PTXAS.exists() or not (PLUGIN / "jax_plugins").exists():
        pytest.skip(f"AHEAD-OF-TIME COMPILATION NOT TESTED: needs {PTXAS} and JAX's CUDA plugin in {PLUGIN}")
    file = tmp_path_factory.mktemp("aot") / "aot.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--json", file],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(PLUGIN)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.fixture
def operations(report):
    return report["operations"]


def kernels(operations, *names):
    for name in names:
        for spec, report in operations[name].items():
            for kernel, counts in report["kernels"].items():
                yield f"{name} {spec} {kernel}", counts


def test_nothing_is_spilled(operations):
    spilled = {name: counts["spilled_bytes"] for name, counts in kernels(operations, *operations)}
    assert len(spilled) > 30
    assert not any(spilled.values()), spilled


def test_products_are_wgmma_and_loads_are_tma(operations):
    seen = set()
    attention = ("prefill_attention", "decode_attention", "iha_prefill", "iha_decode", "retrieval_scores")
    names = (*attention, "grouped_matmul", "sparse_matmul", "block_sparse_matmul")
    for name, counts in kernels(operations, *names):
        if not name.endswith("_merge"):  # adds up a few rows
            seen.add(name.split()[0])
            assert counts["wgmma"] > 0, name
            assert counts["tma"] > 0, name
    assert seen == set(names)


def test_blocks_move_with_bulk_copies_and_in_place(operations):
    for name, counts in kernels(operations, "kv_blocks"):
        assert counts["tma"] > 0, name
    for name, report in operations["kv_blocks"].items():
        assert report["aliased_bytes"] == report["donated_bytes"], name
        assert report["temporary_bytes"] == 0, name


def test_operations_need_little_memory_beside_its_results(operations):
    for op, specs in operations.items():
        for name, report in specs.items():
            limit = 8 * 2**20
            if op == "iha_prefill" or (op == "iha_decode" and "iha_decode_parts" not in report["kernels"]):
                limit = GROUP_BYTES  # pseudo keys and values
            elif op == "iha_decode":
                limit = 12 * 2**20  # parts of up to 128 rows
            assert report["temporary_bytes"] < limit, (op, name)


def test_steps_on_meshes_write_the_arena_in_place_and_expand_no_experts(report):
    assert len(report["meshes"]) == 8
    for name, step in report["meshes"].items():
        assert step["aliased_bytes"] >= step["arena_bytes"], name
        # An array of all tokens for every expert, or a good part of it, is nowhere made.
        assert step["temporary_bytes"] < step["dense_bytes"] / 4, name
        exchanged = "expert 1," not in name
        assert (step["ragged_all_to_alls"] > 0) == exchanged, name


def test_engine_steps_write_the_arena_in_place_and_copy_none_of_it(report):
    plain = {"decode_32", "decode_8_dysco", "prefill_4_times_1024", "prefill_4_times_1024_layer"}
    assert set(report["steps"]) == plain | {"decode_32_iha", "prefill_4_times_1024_iha"}
    for name, step in report["steps"].items():
        assert step["aliased_bytes"] == step["donated_bytes"] >= step["arena_bytes"], name
        of_attention = 4 * 2**20  # its parts before they are merged
        if name.endswith("_iha"):
            of_attention = GROUP_BYTES  # or pseudo keys and values
        assert step["temporary_bytes"] < step["page_bytes"] + step["activation_bytes"] + of_attention, name
