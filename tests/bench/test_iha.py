"""Experiments with Interleaved Head Attention: exact constructions, counts, learned tasks, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.iha import __main__ as command
from bench.iha import composition, constructions, costs, cpm3, filters, masks
from bench.iha.attention import Mixing, attend
from bench.iha.cpm3_task import brute_force, check_coefficients, counts_of, is_symmetric
from bench.iha.encoder import Encoder, EncoderConfig
from bench.iha.experiments import EXPERIMENTS
from bench.iha.results import Curves, Result, Setting, Table
from bench.iha.training import num_parameters
from bench.summary import Summary, compared
from models.iha import initial_collapse, initial_mixing
from tests.models.iha_oracle import collapsed, pseudo_outputs

# Attention without a mask


def test_unmasked_pseudo_heads_are_those_of_the_oracle() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 5, 4, 6))
    alphas = rng.normal(size=(3, 4, 4, 3))
    weights = rng.normal(size=(4, 4, 3))
    with jax.enable_x64(True):
        out = Mixing(*alphas, weights)(*(jnp.asarray(x)[None] for x in (q, k, v)))[0]
    wanted = pseudo_outputs(q, k, v, *alphas, mask="none", window=None, rope="none")
    np.testing.assert_allclose(out, collapsed(wanted, weights), atol=1e-12)


def test_padding_is_not_looked_at() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 1, 5, 4, 6)))
    mixing = Mixing.initial(4, 2, 0.3, rng)
    valid = jnp.arange(5)[None] < 3
    for layer in (attend, mixing):
        for linear in (False, True):
            short = layer(q[:, :3], k[:, :3], v[:, :3], linear=linear)
            whole = layer(q, k, v, linear=linear, valid=valid)
            np.testing.assert_allclose(whole[:, :3], short, atol=1e-5)


def test_copies_stay_copies_without_noise() -> None:
    """No mask and no positions: gradients are the same for all pseudo heads, unless noise tells them apart."""
    rng = np.random.default_rng(2)

    def spreads(noise: float) -> list[float]:
        q, k, v, direction = (jnp.asarray(x) for x in np.random.default_rng(3).normal(size=(4, 5, 4, 6)))
        own, mean = initial_mixing(4, 4, 3), initial_collapse(4, 3, "global")
        mixing = Mixing(*(one + noise * rng.normal(size=one.shape) for one in (own, own, own, mean)))
        gradient = jax.jit(nnx.grad(lambda layer: jnp.sum(layer(q, k, v) * direction) ** 2))(mixing)
        return [
            float((leaf.max(axis=-1) - leaf.min(axis=-1)).max() / jnp.abs(leaf).max())
            for leaf in jax.tree.leaves(gradient)
        ]

    with jax.enable_x64(True):
        assert max(spreads(0.0)) < 1e-12
        assert min(spreads(0.02)) > 1e-3


# Masks, counts and constructions


def test_masks_and_special_cases_are_as_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "WINDOWS", (2,))
    result = masks.experiment(Setting(seeds=1))
    assert result.holds
    cells = [cell for row in result.tables[1].rows for cell in row[2:]]
    assert len(cells) == 24
    assert sum(float(str(cell).split()[0]) < 1e-12 for cell in cells) == 8


def test_tables_have_the_papers_proportions() -> None:
    result = costs.experiment(Setting())
    assert result.holds
    block = {row[0]: row for row in result.tables[0].rows}
    head = list(result.tables[0].head)
    assert block["IHA P=2"][head.index("by the paper")] == "0.600"
    assert block["IHA P=2"][head.index("cached tokens")] == "12,292"
    assert block["IHA P=20"][head.index("cached tokens")] == "8,236"
    assert block["Global"][head.index("counted")] == "1.000"
    assert block["IHA P=20"][head.index("parameters")] == f"{4 * 32_000:,}"
    assert {row[0] for row in result.tables[1].rows} >= {"Global", "Global+Local(512)", "iha_lite (P=1)"}


def test_witness_needs_the_other_sign() -> None:
    with jax.enable_x64(True):
        corrected, printed = constructions.witness(-1, 5), constructions.witness(1, 5)
    assert corrected["mha"] < 1e-12
    assert corrected["tanh"] < 1e-12
    assert corrected["iha"] > 0.1
    assert printed["iha"] < 1e-12
    assert printed["value"] < 1e-12


@pytest.mark.parametrize("powers", [4, 5, 9])
def test_powers_are_exact_by_construction(powers: int) -> None:
    with jax.enable_x64(True):
        assert constructions.filter_error(powers, seed=3) < 1e-12


def test_cpm3_by_construction_is_brute_force() -> None:
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        for tokens in (2, 8):
            x = rng.integers(0, 20, tokens)
            error, counts = constructions.cpm3_construction(x, 5, 13)
            assert error < 1e-12
            np.testing.assert_array_equal(counts, brute_force(x, 5, 13))


def test_all_constructions_hold() -> None:
    result = constructions.experiment(Setting(seeds=1))
    assert result.holds
    assert result.figures["cpm3"]["counts"] > 1000


@pytest.mark.parametrize(("modulus", "coefficient"), [(5, 15), (5, 16), (5, 10), (3, 10), (5, 8)])
def test_coefficients_that_tell_no_order_are_refused(modulus: int, coefficient: int) -> None:
    with pytest.raises(ValueError, match=f"G is {coefficient}"):
        check_coefficients(modulus, coefficient)


def test_the_papers_example_is_symmetric() -> None:
    """x = (1, 2, 3) and G = 10 have the counts (3, 3, 3) for M = 3 alone, where pairs have no order."""
    assert brute_force(np.array([1, 2, 3]), 3, 10).tolist() == [3, 3, 3]
    assert all(brute_force(np.array([1, 2, 3]), m, 10).tolist() != [3, 3, 3] for m in (2, 4, 5))
    assert is_symmetric(3, 10)
    assert not is_symmetric(5, 13)


# Learned tasks


@pytest.mark.parametrize(
    ("arm", "parameters"),
    [(filters.Arm(2, 2), 1328), (filters.Arm(2), 1296), (filters.Arm(4), 2448)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_filters_have_the_published_number_of_parameters(arm: filters.Arm, parameters: int) -> None:
    assert num_parameters(filters.FilterBank(arm, 0)) == parameters


@pytest.mark.slow
def test_two_heads_with_pseudo_heads_learn_four_powers() -> None:
    assert filters.learn(filters.Arm(2, 2), seed=0).error < 1e-6
    assert filters.learn(filters.Arm(2), seed=0).error == pytest.approx(0.5, abs=0.01)


def test_counts_of_many_sequences_are_those_of_each() -> None:
    x = np.random.default_rng(7).integers(0, 5, (4, 8))
    np.testing.assert_array_equal(counts_of(x, 5, 13), [brute_force(row, 5, 13) for row in x])


def test_cpm3_is_learned_beside_its_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpm3, "HEADS", ((3, 3), (3, 0)))
    size = cpm3.Size(train=200, test=100, epochs=1, batch=50)
    result = cpm3.run(size, seeds=2)
    (table,) = result.tables
    baselines = ["commonest count", "commonest of the own token"]
    assert [row[0] for row in table.rows] == ["IHA H=3 P=3", "MHA H=3", *baselines]
    # After one short epoch neither is above them, and the verdict says so.
    assert not result.holds
    assert result.verdict.startswith("NOT every")


def test_relations_are_composed_as_by_loops() -> None:
    data = composition.make(composition.TERNARY, 5, np.random.default_rng(8))
    for symbols, wanted, valid in zip(data.symbols, data.wanted, data.valid, strict=True):
        size = int(valid.sum() ** 0.5)
        assert valid[: size**2].all()
        r = symbols[: size**2].reshape(size, size)
        for i in range(size):
            for j in range(size):
                paths = [(a, b) for a in range(size) for b in range(size) if r[i, a] and r[a, b] and r[b, j]]
                assert wanted[i * size + j] == bool(paths)


def test_baselines_of_composition_are_those_of_the_specification() -> None:
    rng = np.random.default_rng(9)
    binary, ternary = (
        composition.baselines(composition.make(task, 3000, rng), composition.make(task, 1000, rng))
        for task in (composition.BINARY, composition.TERNARY)
    )
    assert binary["positive rate"] == pytest.approx(0.61, abs=0.015)
    assert binary["own entry"] == pytest.approx(0.610, abs=0.015)
    assert binary["degrees and own entry"] == pytest.approx(0.782, abs=0.01)
    assert ternary["positive rate"] == pytest.approx(0.50, abs=0.015)
    assert ternary["own entry"] == pytest.approx(0.696, abs=0.01)
    assert ternary["degrees and own entry"] == pytest.approx(0.822, abs=0.01)


def test_parameters_of_the_trained_layer_differ_by_the_mixing_weights() -> None:
    plain = EncoderConfig(symbols=3, positions=4, outputs=1, width=16, inner=16, heads=8)
    iha = dataclasses.replace(plain, pseudo_heads=2)
    assert num_parameters(Encoder(iha, 0)) - num_parameters(Encoder(plain, 0)) == 4 * 8**2 * 2


def test_composition_stops_early_by_valid_examples() -> None:
    protocol = dataclasses.replace(
        composition.FULL,
        tasks=(composition.TERNARY,),
        train=64,
        valid=32,
        test=32,
        width=16,
        inner=16,
        heads=2,
        pseudo_heads=2,
        learning_rates=(0.0,),
        batch=32,
        epochs=5,
        patience=2,
    )
    result = composition.run(protocol, seeds=2)
    (picture,) = result.curves
    assert [len(curve) for curves in picture.lines.values() for curve in curves] == [3] * 4  # the best is the first
    assert not result.holds
    assert "shows no separation from MHA" in result.verdict
    assert "none has learned to compose" in result.verdict


def test_summaries_have_students_interval() -> None:
    summary = Summary.of([1.0, 2.0, 3.0])
    assert summary.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert Summary.of([1.0]).interval is None
    assert compared(summary) == "shows no separation from"
    assert compared(Summary.of([1.0, 1.1, 1.2])) == "is ahead of"
    assert compared(Summary.of([-1.0, -1.1, -1.2])) == "is behind"


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment whose result is known in place of one that trains."""
    lines = {"a": [[(1.0, 0.5), (2.0, 0.1)], [(1.0, 0.4), (2.0, 0.2), (3.0, 0.1)]]}
    result = Result(
        [Table("Numbers", ["name", "value"], [["one", 1.0]])],
        "it is so",
        True,
        [Curves("Curve", "step", "loss", lines, levels={"nothing": 1.0}), Curves("Other", "x", "y", lines, log=True)],
    )
    known = dict(EXPERIMENTS)
    known["filter"] = dataclasses.replace(known["filter"], run=lambda setting: result)
    monkeypatch.setattr(command, "EXPERIMENTS", known)


@pytest.mark.usefixtures("quick")
def test_command_writes_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, pictures = tmp_path / "iha.json", tmp_path / "pictures"
    arguments = ["--only", "filter", "--only", "tables", "--json", str(file), "--pictures", str(pictures)]
    assert command.main(arguments) == 0
    report = json.loads(file.read_text())
    assert list(report["experiments"]) == ["filter", "tables"]
    assert report["experiments"]["filter"]["verdict"] == "it is so"
    assert report["experiments"]["tables"]["tables"][0]["rows"][0][0] == "Global"
    assert "machine" in report
    assert sorted(path.name for path in pictures.iterdir()) == ["iha_filter_0.png", "iha_filter_1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())
    assert "verdict: it is so" in capsys.readouterr().out


def test_command_says_what_pictures_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["--only", "tables", "--pictures", str(tmp_path / "pictures")]) == 2
    assert "--pictures needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_command_wants_seeds_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "masks", "--only", "lm", "--seeds", "1"]) == 2
    told = capsys.readouterr()
    assert "--seeds 1: lm compares arms by seed, and needs at least 2" in told.err
    assert not told.out, "nothing was begun"


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--seeds", "0"]])
def test_command_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in last
    assert arguments[1] in last
