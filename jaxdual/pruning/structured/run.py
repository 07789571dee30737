"""Structured pruning of a whole model: each layer is looked at behind those that were pruned before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.linears import ATTENTION_OUT, MLP_OUT
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.stream import attend_within, behind, with_window
from jaxdual.pruning.structured.induced import learn_neuron_scales
from jaxdual.pruning.structured.plan import Structure, smaller_config
from jaxdual.pruning.structured.removal import expert_importance, remove_experts, remove_kv_groups, remove_neurons
from jaxdual.pruning.structured.widths import ErrorCurve, allocate, error_curve
from jaxdual.pruning.ways import INDUCED, PLAIN, Example, held_out_windows, take_best
from models import Decoder, ModelConfig
from models.moe import MoE
from models.rope import Rope
from models.shapes import parameters_of, with_parameters


@dataclass(frozen=True, slots=True)
class SmallerLayer:
    """What became of a layer; kept, and how many there were.

    Attributes:
      layer: its number.
      kv_heads: key-value heads.
      neurons: of a dense MLP; (0, 0) for a mixture.
      experts: of a mixture; (0, 0) for a dense MLP.
      taken, errors: as of `jaxdual.pruning.run.PrunedLayer`; neurons' scales are all that is learned.
      error: on the calibration text, mean square of the change of the layer's output, relative to what the layer adds
        to the residual stream.
    """

    layer: int
    kv_heads: tuple[int, int]
    neurons: tuple[int, int]
    experts: tuple[int, int]
    error: float
    taken: str
    errors: dict[str, float]


def chosen_widths(
    model: Decoder,
    windows: Int32[np.ndarray, "N L"],
    structure: Structure,
) -> list[int]:
    """Neurons that each layer of a whole model shall keep; those of mixtures count for nothing.

    By error, this takes a pass of the calibration text through the model.

    Args:
      model: before anything goes.
      windows: calibration text, rows of tokens.
      structure: how much goes.

    Raises:
      ValueError: a model that doesn't fit.
    """
    config = model.config
    structure.check(config, windows.size)
    widths = [structure.width(config.intermediate_size_of(layer)) for layer in range(config.num_layers)]
    if structure.widths == "even" or structure.share == 0:
        return widths
    streams, rope = _begin(model, windows)
    curves: dict[int, ErrorCurve] = {}
    for index, layer in enumerate(model.layers):
        window = config.window_of(index)
        moments = _moments(layer, MLP_OUT, window, streams, rope) if not config.is_sparse(index) else None
        streams = [behind(layer, window, x, rope) for x in streams]
        if moments is not None:
            square = float(np.mean([jnp.mean(jnp.sum(x**2, axis=-1)) for x in streams]))
            curves[index] = error_curve(layer, moments, square, shift=structure.shift)
    found = allocate(curves, sum(widths[layer] for layer in curves))
    return [found.get(layer, width) for layer, width in enumerate(widths)]


def prune_structured(
    model: Decoder,
    windows: Int32[np.ndarray, "N L"],
    structure: Structure,
    widths: Sequence[int],
    *,
    first: int = 0,
    done: Callable[[SmallerLayer], None] = lambda layer: None,
    induction: Induction | None = None,
) -> Decoder:
    """Prunes all layers of a model in place, and returns the smaller model that they make up.

    Beside the model, the moments of one layer and the residual stream of the text are held.

    Args:
      model: its embedding, head, norms and rotary positions stay as they are; of no use itself afterwards, as its
        configuration doesn't fit any more.
      windows: calibration text, rows of tokens.
      structure: how much goes.
      widths: of `chosen_widths`, which were asked for before anything went.
      first: layers before it are pruned already.
      done: is told of each layer.
      induction: how scales of neurons are learned, which are taken where the layer is better with them on text that
        nothing was learned from; None for none.

    Raises:
      ValueError: a model that doesn't fit.
    """
    structure.check(model.config, windows.size)
    streams, rope = _begin(model, windows)
    for index, layer in enumerate(model.layers):
        window = model.config.window_of(index)
        if index >= first:
            before = nnx.clone(layer)
            plan = _Plan(model.config, structure, widths[index], window, induction)
            taken, errors = _prune(layer, plan, streams, rope)
            error = _error(before, layer, window, streams, rope)
            done(_told(index, before, layer, error, taken, errors))
        streams = [behind(layer, window, x, rope) for x in streams]
    return with_parameters(smaller_config(model.config, structure, widths), parameters_of(model))


def _begin(model: Decoder, windows: Int32[np.ndarray, "N L"]) -> tuple[list[Array], Rope]:
    return [model.embed(jnp.asarray(window)) for window in windows], model.rope(jnp.arange(windows.shape[1]))


class _Plan(NamedTuple):
    """How a layer is pruned: the width that it shall have, its window, and the rest as of `prune_structured`."""

    config: ModelConfig
    structure: Structure
    width: int
    window: int | None
    induction: Induction | None


def _prune(layer: Any, plan: _Plan, streams: Sequence[Array], rope: Rope) -> tuple[str, dict[str, float]]:
    """`taken` and `errors` of `SmallerLayer`."""
    structure, window = plan.structure, plan.window
    before = nnx.clone(layer)
    if structure.kv_groups:
        moments = _moments(layer, ATTENTION_OUT, window, streams, rope)
        remove_kv_groups(layer, moments, structure.kv_groups, shift=structure.shift)
    if structure.share == 0:
        return PLAIN, {}
    # The MLP is looked at behind the attention that was pruned.
    if isinstance(layer.mlp, MoE):
        graph, state = nnx.split(layer)
        importance = np.sum([_experts(graph, window, state, x, rope) for x in streams], axis=0)
        remove_experts(layer, importance, structure.experts(layer.mlp.experts.gate.shape[0]))
    else:
        moments = _moments(layer, MLP_OUT, window, streams, rope)
        if plan.induction is not None:
            return _prune_induced(layer, before, plan, moments, streams, rope)
        remove_neurons(layer, moments, plan.width, shift=structure.shift)
    return PLAIN, {}


def _prune_induced(
    layer: Any, before: nnx.Module, plan: _Plan, moments: Moments, streams: Sequence[Array], rope: Rope
) -> tuple[str, dict[str, float]]:
    assert plan.induction is not None
    examples = [Example(x, behind(before, plan.window, x, rope)) for x in streams]
    last = held_out_windows(len(examples))
    learned = learn_neuron_scales(
        layer,
        plan.config,
        plan.window,
        moments,
        plan.width,
        plan.induction,
        rope,
        examples[:-last],
        examples[-last:],
    )
    shift = plan.structure.shift
    ways = {
        name: partial(remove_neurons, moments=moments, keep=plan.width, shift=shift, scale=scale)
        for name, scale in ((PLAIN, None), (INDUCED, learned))
    }
    return take_best(layer, ways, plan.window, examples[-last:], rope)[:2]


def _moments(layer: Any, group: str, window: int | None, streams: Sequence[Array], rope: Rope) -> Moments:
    matrix = layer.attention.o if group == ATTENTION_OUT else layer.mlp.down
    moments = {group: Moments.none(matrix.kernel.shape[0], whole=True)}
    for x in streams:
        moments = with_window(moments, layer, window, x, rope)
    return moments[group]


def _error(before: Any, after: Any, window: int | None, streams: Sequence[Array], rope: Rope) -> float:
    changed = added = 0.0
    for x in streams:
        whole = behind(before, window, x, rope)
        changed += float(jnp.sum((behind(after, window, x, rope) - whole) ** 2))
        added += float(jnp.sum((whole - x) ** 2))
    return changed / max(added, float(np.finfo(np.float32).tiny))


def _told(index: int, before: Any, after: Any, error: float, taken: str, errors: dict[str, float]) -> SmallerLayer:
    def counts(layer: Any) -> tuple[int, int, int]:
        kv_heads = layer.attention.k.kernel.shape[1] // layer.attention.head_dim
        if isinstance(layer.mlp, MoE):
            return kv_heads, 0, layer.mlp.experts.gate.shape[0]
        return kv_heads, layer.mlp.down.kernel.shape[0], 0

    kv_heads, neurons, experts = zip(counts(after), counts(before), strict=True)
    return SmallerLayer(index, kv_heads, neurons, experts, error, taken, errors)


@partial(jax.jit, static_argnames=("graph", "window"))
def _experts(
    graph: Any, window: int | None, state: Any, x: Float[Array, "T D"], rope: Rope
) -> Float[Array, " experts"]:
    return expert_importance(nnx.merge(graph, state), x, rope, attend_within(window, x.shape[0]))
