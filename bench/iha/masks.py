"""Which pseudo keys a pseudo query sees, and where copies of heads are plain attention, by the models' functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.iha.results import Result, Setting, Table
from models.attention import causal_attention, pseudo_attention
from models.config import IHAConfig, ModelConfig
from models.iha import collapse, initial_collapse, initial_mixing, phases, pseudo_queries
from models.rope import Rope, angles_at, rotate
from pallas_kernels.pseudo_heads import MASKS, Mask, PseudoHeads

HEADS, HEAD_DIM, PSEUDO, TOKENS = 4, 6, 3, 7
EXACT, APART = 1e-12, 1e-2  # differences of float64 that are rounding, and ones that are not
ROPES = ("none", "token", "virtual", "scaled")
COLLAPSES = {"the first": 0, "the last": PSEUDO - 1, "the mean": None}
# Under a causal mask, copies of heads are plain attention in these cells only; the paper includes it without one.
INCLUDED = {
    (rope, mask, name)
    for rope in ("none", "token")
    for mask, names in (("token", tuple(COLLAPSES)), ("flat", ("the last",)))
    for name in names
}
WINDOWED = (("token", "the mean"), ("flat", "the last"))
WINDOWS = (1, 2, 3)


def mask_matrix(mask: Mask, window: int | None, tokens: int = 2, pseudo: int = 2) -> np.ndarray:
    """Whether pseudo queries (rows) see pseudo keys (columns), of `tokens` tokens with `pseudo` pseudo heads each.

    Read off attention itself: values are one-hot, so that an output is the row of weights.
    """
    places = tokens * pseudo
    return np.asarray(_weights(mask, window, tokens, pseudo).reshape(places, places) > 0).astype(int)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _weights(mask: Mask, window: int | None, tokens: int, pseudo: int) -> jax.Array:
    places = tokens * pseudo
    nothing = jnp.zeros((pseudo, places // 2))
    alphas = jnp.zeros((pseudo, 1, pseudo)), jnp.eye(pseudo)[:, None]
    heads = PseudoHeads(*alphas, nothing + 1, nothing, mask=mask, window=window)
    values = jnp.eye(places).reshape(tokens, pseudo, places)
    queries, keys = jnp.zeros((tokens, 1, pseudo, places)), jnp.zeros_like(values)
    return pseudo_attention(1, queries, keys, values, heads)[:, 0]


def differences(rope: str, mask: str, window: int | None, seed: int) -> dict[str, float]:
    """The largest difference of IHA with copied heads to plain attention, on random inputs, by what the collapse takes.

    Args:
      rope, mask: as of `IHAConfig`.
      window: in tokens.
      seed: of queries, keys and values.
    """
    iha = IHAConfig(pseudo_heads=PSEUDO, layers=(0,), mask=mask, rope=rope)  # type: ignore[arg-type]
    config = _config(iha)
    inputs = np.random.default_rng(seed).normal(size=(3, TOKENS, HEADS, HEAD_DIM))
    places = np.arange(TOKENS)
    of_plain = angles_at(config.rope, HEAD_DIM, places * (rope != "none"))
    own = angles_at(config.rope, HEAD_DIM, places * {"virtual": PSEUDO, "none": 0}.get(rope, 1))
    out, plain = _outputs(inputs, own, phases(config, iha), of_plain, iha.mask, window)
    found = {}
    for name, select in COLLAPSES.items():
        # The mean's thirds would be those of float32.
        mean = np.full((HEADS, PSEUDO), 1 / PSEUDO)
        weights = mean if select is None else initial_collapse(HEADS, PSEUDO, "per_head", select)
        found[name] = float(jnp.abs(collapse(out, jnp.asarray(weights, jnp.float64)) - plain).max())
    return found


@partial(jax.jit, static_argnums=(4, 5))
def _outputs(
    inputs: jax.Array, own: Rope, phase: Rope, of_plain: Rope, mask: Mask, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Outputs of copied heads before the collapse, and those of plain attention."""
    q, k, v = inputs
    alpha = jnp.asarray(initial_mixing(HEADS, HEADS, PSEUDO), inputs.dtype)
    pseudo = PseudoHeads(alpha, alpha, phase.cos, phase.sin, mask=mask, window=window)
    out = pseudo_attention(1, pseudo_queries(q, alpha, own, phase), rotate(k, own), v, pseudo)
    plain = causal_attention(rotate(q, of_plain)[None], rotate(k, of_plain)[None], v[None], window=window)
    return out, plain[0]


def experiment(setting: Setting) -> Result:
    with jax.enable_x64(True):
        return _experiment(setting.seeds)


def _experiment(seeds: int) -> Result:
    matrices = {(mask, window): mask_matrix(mask, window) for window in (None, 1) for mask in MASKS}
    rows = [[" ".join(map(str, matrix[row])) for matrix in matrices.values()] for row in range(4)]
    titles = [f"{mask}, {'no window' if window is None else f'W={window}'}" for mask, window in matrices]
    shown = [Table("Pseudo keys in sight, 2 tokens of 2 pseudo heads (rows are pseudo queries)", titles, rows)]
    cells, holds = [], True
    figures: dict[str, Any] = {
        "masks": {title: matrix.tolist() for title, matrix in zip(titles, matrices.values(), strict=True)}
    }
    for rope in ROPES:
        for mask in MASKS:
            row: list[object] = [rope, mask]
            runs = [differences(rope, mask, None, seed) for seed in range(seeds)]
            for name in COLLAPSES:
                found = [run[name] for run in runs]
                included = (rope, mask, name) in INCLUDED
                holds &= max(found) < EXACT if included else min(found) > APART
                row.append(f"{max(found):.0e}" if included else f"{min(found):.2g} to {max(found):.2g}")
                figures[f"{rope} {mask} {name}"] = found
            cells.append(row)
    shown.append(
        Table(
            f"max |IHA - MHA|, copied heads, P={PSEUDO}, N={TOKENS}, H={HEADS}, d={HEAD_DIM}, float64, {seeds} seeds: "
            "the largest where it is exact, else lowest to highest",
            ["RoPE", "mask", *(f"R takes {name}" for name in COLLAPSES)],
            cells,
        )
    )
    windowed: list[list[object]] = []
    for mask, name in WINDOWED:
        worst = [max(differences("token", mask, window, seed)[name] for seed in range(seeds)) for window in WINDOWS]
        holds &= max(worst) < EXACT
        windowed.append([f"{mask}, R takes {name}", *(f"{one:.0e}" for one in worst)])
        figures[f"windowed {mask} {name}"] = worst
    shown.append(Table("The same with a window, RoPE token", ["", *(f"W={window}" for window in WINDOWS)], windowed))
    verdict = (
        f"{'as derived' if holds else 'NOT as derived'}: copies are plain attention (below {EXACT:.0e}) in "
        f"{len(INCLUDED)} of {len(ROPES) * len(MASKS) * len(COLLAPSES)} cells, never with virtual or scaled positions"
    )
    return Result(shown, verdict, holds, figures=figures)


def _config(iha: IHAConfig) -> ModelConfig:
    return ModelConfig(
        family="jaxdual_iha",
        vocab_size=8,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=8,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        iha=iha,
    )
