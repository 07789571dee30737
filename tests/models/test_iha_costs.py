"""Costs of Interleaved Head Attention: against counts by hand, by brute force, and the published accounting."""

from __future__ import annotations

import itertools

import pytest

from models.config import IHAConfig, ModelConfig
from models.iha import num_mixing_parameters, schedule
from models.iha_costs import (
    attention_flops,
    cache_bytes,
    cache_tokens,
    decode_costs,
    global_baseline,
    local_baseline,
    mixing_flops,
    projection_costs,
    ratio_to_global,
    square_pairs,
    visible_pairs,
)
from tests.models.iha_oracle import visible

CONTEXT = 8192


def config_of(pseudo: int, layers: int = 5, heads: int = 20, head_dim: int = 128, **iha: str) -> ModelConfig:
    windows, with_iha = schedule(layers, CONTEXT, pseudo)
    return ModelConfig(
        family="jaxdual_iha",
        vocab_size=8,
        hidden_size=heads * head_dim,
        intermediate_size=8,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        layer_windows=windows,
        iha=IHAConfig(pseudo_heads=pseudo, layers=with_iha, **iha),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 20])
@pytest.mark.parametrize("pseudo", [1, 2, 3])
def test_visible_pairs_are_those_of_the_mask(mask: str, window: int | None, pseudo: int) -> None:
    places = list(itertools.product(range(7), range(pseudo)))
    seen = sum(visible(query, key, pseudo, mask, window) for query in places for key in places)
    assert visible_pairs(7, window, pseudo, mask) == seen


@pytest.mark.parametrize(("pseudo", "window"), [(2, 1024), (4, 256), (8, 64)])
def test_schedule_costs_three_fifths_of_global_by_the_papers_count(pseudo: int, window: int) -> None:
    config = config_of(pseudo)
    assert config.window_of(0) == window
    assert 2 * square_pairs(CONTEXT, window, pseudo) == square_pairs(CONTEXT)
    assert ratio_to_global(config, CONTEXT, as_paper=True) == pytest.approx(3 / 5)
    # Causal halving spares global layers more than windows do, and mixing isn't free.
    assert ratio_to_global(config, CONTEXT) > 3 / 5


def test_layers_with_iha_to_all_tokens_cost_its_square() -> None:
    assert schedule(5, CONTEXT, 4, iha_global=True)[1] == (0, 1, 2, 3, 4)
    assert square_pairs(100, None, 4) == 16 * square_pairs(100)
    assert visible_pairs(100, None, 4, "token") == 16 * visible_pairs(100)


@pytest.mark.parametrize(("pseudo", "tokens"), [(2, 12_292), (4, 9_220), (20, 8_236)])
def test_cached_tokens_of_five_layers(pseudo: int, tokens: int) -> None:
    config = config_of(pseudo)
    assert cache_tokens(config, CONTEXT) == tokens
    assert cache_tokens(global_baseline(config), CONTEXT) == 40_960
    assert cache_tokens(local_baseline(config), CONTEXT) == 4 * 512 + CONTEXT
    assert cache_bytes(config, CONTEXT) == tokens * 2 * 20 * 128 * 2
    # P times as much in the four layers that have it.
    in_windows = tokens - CONTEXT
    assert cache_bytes(config, CONTEXT, pseudo=True) == (pseudo * in_windows + CONTEXT) * 2 * 20 * 128 * 2


def test_short_sequences_fill_no_window() -> None:
    config = config_of(2)
    assert cache_tokens(config, 10) == 50
    assert attention_flops(global_baseline(config), 10) == 5 * 4 * 20 * 128 * 55


def test_mixing_of_a_layer() -> None:
    four_layers = config_of(4, heads=16, head_dim=64)
    assert mixing_flops(four_layers) == 4 * 4 * 2 * 16**2 * 4 * 64
    per_head = config_of(4, heads=16, head_dim=64, collapse="per_head")
    assert mixing_flops(per_head) == 4 * (3 * 2 * 16**2 * 4 * 64 + 2 * 16 * 4 * 64)
    assert mixing_flops(global_baseline(four_layers)) == 0


@pytest.mark.parametrize(
    ("heads", "pseudo", "collapse", "count"),
    [(20, 20, "global", 32_000), (20, 20, "per_head", 24_400), (8, 2, "global", 512), (16, 4, "global", 4_096)],
)
def test_parameters_that_iha_adds_to_a_layer(heads: int, pseudo: int, collapse: str, count: int) -> None:
    config = config_of(pseudo, heads=heads, collapse=collapse)
    assert config.iha is not None
    assert num_mixing_parameters(config) == len(config.iha.layers) * count
    if collapse == "global":
        assert count == 4 * heads**2 * pseudo


# Microseconds a layer and 1,000 cached tokens on an H200: plain, pseudo, fly, absorbed (section 9.1).
ROOFLINE = {
    (8, 64, 2): (0.43, 0.85, 0.43, 0.43),
    (8, 64, 4): (0.43, 1.71, 0.43, 0.43),
    (8, 64, 8): (0.43, 3.41, 0.43, 1.06),
    (16, 64, 2): (0.85, 1.71, 0.85, 0.85),
    (16, 64, 4): (0.85, 3.41, 0.85, 1.06),
    (16, 64, 16): (0.85, 13.65, 2.12, 16.96),
    (20, 128, 2): (2.13, 4.27, 2.13, 2.13),
    (20, 128, 4): (2.13, 8.53, 2.13, 3.31),
    (20, 128, 20): (2.13, 42.67, 8.28, 82.83),
}


@pytest.mark.parametrize("shape", ROOFLINE)
def test_ways_to_decode_have_the_times_of_the_roofline(shape: tuple[int, int, int]) -> None:
    times = [1e9 * cost.seconds(4.8e12, 989e12) for cost in decode_costs(*shape).values()]
    assert times == pytest.approx(ROOFLINE[shape], abs=0.006)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((16, 64, 2), (6.49, 12.6, 6.3, 12.6, 4.2)),
        ((8, 64, 4), (1.67, 6.29, 1.6, 6.3, 2.1)),
        ((20, 128, 20), (45.5, 786, 39, 786, 262)),
    ],
)
def test_folding_pays_for_one_pseudo_head_only(shape: tuple[int, int, int], wanted: tuple[float, ...]) -> None:
    cost = projection_costs(*shape)
    found = (cost.mixed_flops, cost.folded_flops, cost.mixed_bytes, cost.folded_bytes, cost.folded_output_bytes)
    assert [count / 1e6 for count in found] == pytest.approx(wanted, rel=0.02)
    single = projection_costs(shape[0], shape[1], 1)
    assert single.folded_flops < single.mixed_flops
