"""What the measurements of training count and claim."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from bench.iha import lm
from bench.iha.paired import difference, judged, summary
from bench.iha.training_flops import forward, pairs, training, training_executed
from bench.iha.training_runs import SHIPPED, Text
from models import ModelConfig
from models.config import IHAConfig
from models.iha import is_mixing
from models.training import tokenizer
from tests.models.iha_oracle import visible


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("mask", ["flat", "token"])
def test_pairs_are_those_that_the_mask_lets_through(mask: str, window: int | None) -> None:
    length, pseudo = 7, 3
    config = ModelConfig(
        family="jaxdual_iha",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        layer_windows=(window, window),
        iha=IHAConfig(pseudo_heads=pseudo, layers=(0,), mask=mask),  # type: ignore[arg-type]
    )
    places = list(itertools.product(range(length), range(pseudo)))
    counted = sum(visible(query, key, pseudo, mask, window) for query in places for key in places)
    assert pairs(config, 0, length) == counted
    plain = sum(m <= n and (window is None or n - m < window) for n in range(length) for m in range(length))
    assert pairs(config, 1, length) == plain
    assert pairs(config, 0, length, executed=True) >= counted


def test_operations_are_the_products_of_the_weights_and_the_attention() -> None:
    config = lm.arms()["mha"]
    parts = forward(config, lm.LENGTH)
    matrices = 5 * (4 * 128 * 128 + 3 * 128 * 384)
    assert parts["projections"] + parts["feed_forward"] == 2 * matrices
    assert parts["head"] == 2 * 128 * config.vocab_size
    # Each query sees half of the sequence and half a key more; scores and their products with values.
    assert parts["attention"] == 5 * 4 * 128 * (lm.LENGTH + 1) / 2
    assert training(config, lm.LENGTH) == 3 * sum(parts.values()) < training_executed(config, lm.LENGTH)
    # Four layers mix four heads into twice two, three times, and back.
    assert forward(lm.arms()["iha"], lm.LENGTH)["mixing"] == 4 * 4 * (2 * 4 * 4 * 2 * 32)


def test_arms_follow_the_schedule_and_get_equal_operations() -> None:
    configs = lm.arms()
    assert configs["iha"].layer_windows == (32, 32, 32, 32, None)
    assert configs["iha"].iha is not None
    assert configs["iha"].iha.layers == (0, 1, 2, 3)
    assert configs["global_local"].layer_windows == (16, 16, 16, 16, None)
    assert configs["iha_lite"].layer_windows == configs["mha"].layer_windows == ()
    steps = lm.steps_of(configs, 1000)
    assert steps["mha"] == 1000
    for name, config in configs.items():
        one = training(config, lm.LENGTH)
        assert abs(steps[name] * one - 1000 * training(configs["mha"], lm.LENGTH)) <= one / 2


def test_a_verdict_claims_no_more_than_its_interval() -> None:
    base = [5.0, 5.2, 5.1]
    assert "no difference shown" in judged("iha", "mha", difference([5.1, 5.1, 5.2], base), "nats")
    assert judged("iha", "mha", difference([4.9, 5.1, 5.0], base), "nats").startswith("iha is better than mha")
    assert judged("iha", "mha", difference([5.3, 5.5, 5.41], base), "nats").startswith("iha is worse than mha")
    found = summary([1.0, 2.0, 3.0])
    # Student's quantile with two degrees of freedom is 4.3027.
    np.testing.assert_allclose(found["interval"], [2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], rtol=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        summary([1.0])


def test_arms_of_a_seed_begin_alike_and_see_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the training itself replaced by losses that the arm and the seed say."""
    text = Text(tokenizer.load(SHIPPED / "small"), {"a.py": "x = 1\n" * 400}, np.ones((1, 257), np.int32), 0.5)
    begun: list[tuple[ModelConfig, dict[str, Any], Any]] = []
    loss = {"qwen3": 5.0, "jaxdual_iha": 4.0}

    def trained(
        config: ModelConfig, _recipe: Any, steps: int, data: Any, _heldout: Any, initial: Any, **more: Any
    ) -> Any:
        begun.append((config, initial, data))
        seed = (len(begun) - 1) // 4
        points = sorted({*more["measured_at"], steps})
        return {"curve": [(step, loss[config.family] + seed) for step in points], "steps": steps, "cpu_seconds": 1.0}

    monkeypatch.setattr(Text, "read", lambda *_: text)
    monkeypatch.setattr(lm, "trained", trained)
    found = lm.run(seeds=2, steps=100, tell=lambda _: None)
    json.dumps(found)
    for first in (0, 4):
        _, shared, data = begun[first]
        for _, initial, also in begun[first : first + 4]:
            assert also is data
            for name, value in initial.items():
                assert is_mixing(name) or (value == shared[name]).all()
    assert (begun[0][1]["embedding"] != begun[4][1]["embedding"]).any()
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows["iha"]["difference"]["values"] == [-1.0, -1.0]
    assert rows["global_local"]["loss"]["mean"] == 5.5
    assert found["common_step"] == min(row["steps"] for row in rows.values()) < 100
    verdicts = found["verdict"]["equal_operations"]
    assert [verdict.partition(":")[0] for verdict in verdicts] == [
        "global_local and mha",
        "iha is better than mha",
        "iha_lite is better than mha",
        "iha is better than global_local",
    ]
    assert found["baselines"]["uniform"] == pytest.approx(np.log(4096))
    assert "no difference shown" in lm.lines(found)
