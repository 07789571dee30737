"""`python -m bench.pruning.packed`: bytes are as computed, and all forms give the same tokens but the blocks."""

from __future__ import annotations

import dataclasses

import pytest

import models
from bench.pruning import packed
from bench.pruning.turns import medians_of
from tests.pruned_models import KINDS


def test_measurements_take_turns_and_give_their_medians() -> None:
    order: list[str] = []

    def measure(name: str, values: list[float]) -> float:
        order.append(name)
        return values[len(order) // 2 % len(values)]

    found = medians_of({"a": lambda: measure("a", [1.0]), "b": lambda: measure("b", [2.0, 3.0, 9.0])}, 0.0)
    assert order == ["a", "b"] * 6
    assert found == {"a": 1.0, "b": 3.0}


def test_products_have_the_bytes_that_their_forms_say() -> None:
    rows = list(packed.products(128, 192, 0.01))
    assert [(row["batch"], row["form"]) for row in rows] == [(b, form) for b in packed.BATCHES for form in packed.FORMS]
    for row in rows:
        assert row["bytes"] == row["bytes_computed"]
        assert row["ms"] > 0
    of_form = {row["form"]: row["bytes"] / (128 * 192 * 4) for row in rows}
    assert of_form["packed 2:4"] == 17 / 32
    assert of_form["block-sparse 64"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_decode_steps_say_bytes_times_and_whether_tokens_are_the_same() -> None:
    config = dataclasses.replace(
        KINDS["pruned"],
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        layer_intermediate_sizes=(),
        num_kv_heads=4,
    )
    rows = list(packed.steps("tested", models.init(config), 10, 0.01))
    assert len(rows) == 2 * len(packed.FORMS)
    by_form = {row["form"]: row for row in rows}
    for row in rows:
        assert row["bytes"] == row["bytes_computed"]
        assert row["ms"] > 0
        assert row["file_bytes"] < row["all_parameter_bytes"]
    assert by_form["packed 2:4"]["tokens_of_zeros"]
    assert by_form["packed 2:4"]["file_bytes"] < by_form[packed.ZEROS]["file_bytes"] == by_form["dense"]["file_bytes"]
