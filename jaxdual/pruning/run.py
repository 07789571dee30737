"""Pruning of a whole model, layer by layer: each is looked at behind those that were pruned before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from jaxdual.pruning.induction.absorb import Scales
from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.induction.starts import first_scales
from jaxdual.pruning.induction.training import Problem, batched, learn_scales
from jaxdual.pruning.layer import Plan, PrunedMatrix, prune_layer
from jaxdual.pruning.linears import Linear, linears_of
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.stream import behind, inputs_behind, with_window
from jaxdual.pruning.ways import INDUCED, PLAIN, Example, check_windows, held_out_windows, take_best
from models import Decoder, ModelConfig, pruned_form
from models.rope import Rope

# Of windows whose inputs give the medians of the paper's first scales.
_SAMPLED = 8


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """What became of a layer.

    Attributes:
      layer: its number.
      matrices: of the way that was taken.
      taken: "plain", "induced", "shifted" or "induced and shifted".
      errors: of each way, on the part of the calibration text that nothing is learned from: mean square of the change
        of the layer's output, relative to what the layer adds to the stream. Empty where there is one way only.
    """

    layer: int
    matrices: list[PrunedMatrix]
    taken: str
    errors: dict[str, float]


def check(model: Decoder, plan: Plan, windows: int) -> None:
    """Raises `ValueError` if a model can't be pruned so, before any work is done."""
    for index, layer in enumerate(model.layers):
        for linear in linears_of(model.config, index):
            outputs, inputs = linear.read(layer).shape
            name = f"{linear.name} of layer {index}"
            plan.pattern.check(name, inputs, outputs)
            if plan.pattern.removed(outputs, inputs, plan.method.scope) == 0:
                raise ValueError(f"pattern {plan.pattern}: nothing of {name} would go, which is {outputs} by {inputs}")
    swaps = plan.update is not None and plan.update.swaps
    if plan.pattern.block and (plan.method.sweeps or plan.induction is not None or swaps):
        raise ValueError(
            f"pattern {plan.pattern}: blocks are chosen by scores alone, without Sparsity Induction, by another method "
            "than sparsegpt, with another update than dsnot"
        )
    if plan.shift:
        with_biases(model.config)
    if plan.induction is not None or plan.shift:
        check_windows(windows, 1 if plan.induction is None else plan.induction.batch)


def prune_model(
    model: Decoder,
    windows: Int32[np.ndarray, "N L"],
    plan: Plan,
    *,
    first: int = 0,
    done: Callable[[PrunedLayer], None] = lambda layer: None,
) -> None:
    """Prunes all layers of a model in place.

    Beside the model, the moments of one layer are held, the residual stream of the text, and where there are several
    ways to choose from, the stream behind the layer.

    Args:
      model: its embedding, head and norms stay as they are, but for norms that a fold goes into. With shifts it has
        biases at all matrices but those of experts afterwards.
      windows: calibration text, rows of tokens.
      plan: how, and what.
      first: layers before it are pruned already.
      done: is told of each layer.

    Raises:
      ValueError: a model or a pattern that doesn't fit.
    """
    check(model, plan, len(windows))
    streams = [model.embed(jnp.asarray(window)) for window in windows]
    rope = model.rope(jnp.arange(windows.shape[1]))
    for index, layer in enumerate(model.layers):
        if index >= first:
            done(_prune(model, index, plan, streams, rope))
        streams = [behind(layer, model.config.window_of(index), x, rope) for x in streams]
    if plan.shift:
        model.config = with_biases(model.config)


def with_biases(config: ModelConfig) -> ModelConfig:
    """The configuration of a model whose matrices have been shifted.

    Raises:
      ValueError: what no format expresses.
    """
    dense = any(not config.is_sparse(index) for index in range(config.num_layers))
    return pruned_form(dataclasses.replace(config, qkv_bias=True, o_bias=True, mlp_bias=config.mlp_bias or dense))


def _prune(model: Decoder, index: int, plan: Plan, streams: Sequence[Array], rope: Rope) -> PrunedLayer:
    layer, config = model.layers[index], model.config
    linears, window = linears_of(config, index), config.window_of(index)
    moments = {one.group: Moments.none(one.read(layer).shape[1], whole=plan.whole) for one in linears}
    for x in streams:
        moments = with_window(moments, layer, window, x, rope)
    if plan.shift:
        for one in linears:
            if one.expert is None:
                one.shift(layer, jnp.zeros(one.read(layer).shape[0]))
    if plan.induction is None and not plan.shift:
        return PrunedLayer(index, prune_layer(layer, config, linears, moments, plan), PLAIN, {})

    examples = [Example(x, behind(layer, window, x, rope)) for x in streams]
    last = held_out_windows(len(examples))
    learned_from, chosen_by = examples[:-last], examples[-last:]
    of_induction: list[Scales | None] = [None]
    if plan.induction is not None:
        of_induction.append(
            _induced(model, index, plan, plan.induction, linears, moments, learned_from, chosen_by, rope)
        )
    ways: dict[str, Callable[[nnx.Module], list[PrunedMatrix]]] = {}
    for scales in of_induction:
        for shift in (False, True) if plan.shift else (False,):
            ways[_NAMES[scales is not None, shift]] = partial(
                prune_layer,
                config=config,
                linears=linears,
                moments=moments,
                plan=plan,
                scales=scales,
                shift=shift,
            )
    taken, errors, matrices = take_best(layer, ways, window, chosen_by, rope)
    return PrunedLayer(index, matrices, taken, errors)


_NAMES = {
    (False, False): PLAIN,
    (True, False): INDUCED,
    (False, True): "shifted",
    (True, True): "induced and shifted",
}


def _induced(
    model: Decoder,
    index: int,
    plan: Plan,
    settings: Induction,
    linears: Sequence[Linear],
    moments: Mapping[str, Moments],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    rope: Rope,
) -> Scales:
    if settings.start is None:
        settings = dataclasses.replace(settings, start="rms" if plan.method.power == 0 else "ones")
    layer, config, window = model.layers[index], model.config, model.config.window_of(index)
    samples: Mapping[str, Array] = {}
    if settings.start == "paper":
        taken = [inputs_behind(layer, window, one.before, rope) for one in examples[:_SAMPLED]]
        samples = {group: jnp.concatenate([inputs[group] for inputs in taken]) for group in taken[0]}
    together = batched(examples, settings.batch)
    problem = Problem(
        config,
        window,
        plan.method,
        plan.pattern,
        settings,
        len(together) * settings.epochs,
        tuple(dict.fromkeys((one.path, one.kind) for one in linears)),
    )
    begin = first_scales(layer, config, linears, moments, settings, samples)
    return learn_scales(layer, problem, linears, moments, begin, rope, together, held_out)
