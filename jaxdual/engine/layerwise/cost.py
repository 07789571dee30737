"""Measures what the compute quota needs to know of a device (DualPath 6.2)."""

from __future__ import annotations

from jaxdual.engine.layerwise.runner import LayerRunner
from jaxdual.scheduling.quota import AttentionCost, AttentionShape, ProfileSample

_REPEATS = 2  # the quickest counts


def measure_cost(runner: LayerRunner, shape: AttentionShape, max_model_len: int) -> AttentionCost:
    """Fits the cost of attention to times of one layer, whole: what does not grow with attention is in the base.

    Args:
      runner: with nothing under way; all programs of a layer are compiled.
      shape: of the model's attention, all layers.
      max_model_len: tokens of the longest sequence.

    Returns:
      Of no cost at all where the shapes that passes run in are too few to tell.
    """
    samples = []
    shapes = runner.buckets.prefill_shapes
    for padded in {shapes[0], shapes[len(shapes) // 2], shapes[-1], *(one for one in shapes if one.rows > 1)}:
        for cached in (0, max_model_len - padded.chunk):
            seconds = min(runner.layer_seconds(padded, cached) for _ in range(_REPEATS)) * runner.stages.num_layers
            samples.append(ProfileSample(padded.rows * shape.flops(cached, padded.chunk), padded.rows, seconds))
    try:
        return AttentionCost.fit(shape, samples)
    except ValueError:
        return AttentionCost(shape, 0.0, 0.0, 0.0)
