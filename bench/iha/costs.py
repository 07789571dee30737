"""Tables of what IHA costs, by `models.iha_costs`, for the shape of the paper's 2.4B model and some smaller ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.iha.results import Result, Setting, Table
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
)

CONTEXT = 8192
LAYERS = {"a block of 5 layers": 5, "26 layers": 26}
SIZES = (2, 4, 8, 20)  # P; the paper's own is not stated
DECODE_SHAPES = (
    *((8, 64, pseudo) for pseudo in (2, 4, 8)),
    *((16, 64, pseudo) for pseudo in (2, 4, 16)),
    *((20, 128, pseudo) for pseudo in (2, 4, 20)),
)
FOLDED_SHAPES = ((16, 64, 1), (16, 64, 2), (8, 64, 4), (20, 128, 1), (20, 128, 20))
H200 = (4.8e12, 989e12)  # bytes and bfloat16 operations a second, by its data sheet


def models(num_layers: int) -> Mapping[str, ModelConfig]:
    """Baselines and IHA of several P, with the heads of the paper's 2.4B model."""
    plain = ModelConfig(
        family="jaxdual_iha",
        vocab_size=128_256,
        hidden_size=2560,
        intermediate_size=10_240,
        num_layers=num_layers,
        num_heads=20,
        num_kv_heads=20,
        head_dim=128,
    )
    lite = IHAConfig(pseudo_heads=1, layers=tuple(range(num_layers)))
    found = {
        "Global": global_baseline(plain),
        "Global+Local(512)": local_baseline(plain, 512),
        "iha_lite (P=1)": dataclasses.replace(plain, iha=lite),
    }
    for pseudo in SIZES:
        windows, layers = schedule(num_layers, CONTEXT, pseudo)
        iha = IHAConfig(pseudo_heads=pseudo, layers=layers)
        found[f"IHA P={pseudo}"] = dataclasses.replace(plain, layer_windows=windows, iha=iha)
    windows, layers = schedule(num_layers, CONTEXT, 2, iha_global=True)
    iha = IHAConfig(pseudo_heads=2, layers=layers)
    found["IHA P=2, global ones too"] = dataclasses.replace(plain, layer_windows=windows, iha=iha)
    return found


def experiment(setting: Setting) -> Result:
    """Counts; no seeds."""
    del setting
    shown, figures = [], {}
    for title, num_layers in LAYERS.items():
        rows = []
        for name, config in models(num_layers).items():
            one = _costs(config)
            figures[f"{name}, {title}"] = one
            rows.append([name, *(value if value is None else _cell(value) for value in one.values())])
        shown.append(
            Table(
                f"{title.capitalize()} with H=20, d=128 and a context of {CONTEXT}, bfloat16",
                ["model", *next(iter(figures.values()))],
                rows,
            )
        )
    shown += [_decode_table(), _folding_table()]
    by_paper, counted = (
        {name: figures[f"{name}, a block of 5 layers"][column] for name in (f"IHA P={pseudo}" for pseudo in SIZES)}
        for column in ("by the paper", "counted")
    )
    holds = all(abs(ratio - 3 / 5) < 0.01 for ratio in by_paper.values())
    verdict = (
        f"by the paper's count IHA has {min(by_paper.values()):.3f} to {max(by_paper.values()):.3f} of Global's "
        f"operations of attention; causal and with mixing, {min(counted.values()):.2f} to {max(counted.values()):.2f}"
    )
    return Result(shown, verdict, holds, figures=figures)


def _costs(config: ModelConfig) -> dict[str, Any]:
    per_token = attention_flops(config, CONTEXT) / CONTEXT
    return {
        "window": config.window_of(0),
        "parameters": num_mixing_parameters(config),
        "by the paper": ratio_to_global(config, CONTEXT, as_paper=True),
        "counted": ratio_to_global(config, CONTEXT),
        "attention, MFLOP/token": per_token / 1e6,
        "mixing, MFLOP/token": mixing_flops(config) / 1e6,
        "cached tokens": cache_tokens(config, CONTEXT),
        "cache, KiB/token": cache_bytes(config, CONTEXT) / CONTEXT / 1024,
        "if kept mixed": cache_bytes(config, CONTEXT, pseudo=True) / CONTEXT / 1024,
    }


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _decode_table() -> Table:
    rows: list[list[object]] = []
    for heads, head_dim, pseudo in DECODE_SHAPES:
        costs = decode_costs(heads, head_dim, pseudo)
        times = [f"{1e9 * cost.seconds(*H200):.2f}" for cost in costs.values()]
        rows.append([f"{heads}, {head_dim}, {pseudo}", *times, costs["plain"].bytes, costs["pseudo"].bytes])
    return Table(
        "A decode step's microseconds a layer and 1,000 cached tokens, by an H200's data sheet (not measured), and "
        "bytes a cached token",
        ["H, d, P", "plain", "pseudo cached", "mixed on the fly", "absorbed", "bytes raw", "bytes pseudo"],
        rows,
    )


def _folding_table() -> Table:
    rows: list[list[object]] = []
    for heads, head_dim, pseudo in FOLDED_SHAPES:
        cost = projection_costs(heads, head_dim, pseudo)
        counts = (cost.mixed_flops, cost.folded_flops, cost.mixed_bytes, cost.folded_bytes, cost.folded_output_bytes)
        rows.append([f"{heads}, {head_dim}, {pseudo}", *(f"{count / 1e6:.2f}" for count in counts)])
    return Table(
        "Projections to queries, keys and values with the mixing beside them or folded into them: MFLOP a token, and "
        "MB of weights",
        ["H, d, P", "MFLOP mixed", "folded", "MB mixed", "folded", "output folded"],
        rows,
    )
