"""Measures what the compute quota needs to know of a device (DualPath 6.2)."""

from __future__ import annotations

from jaxdual.engine.layerwise.runner import LayerRunner
from jaxdual.scheduling.quota import AttentionCost, AttentionShape

_REPEATS = 2  # the quickest counts


def measure_cost(runner: LayerRunner, shape: AttentionShape, max_model_len: int) -> AttentionCost:
    """Fits the cost of attention to how much longer one layer takes behind a long context than behind none: all else in
    it takes the same time in both.

    Args:
      runner: with nothing under way; all programs of a layer are compiled.
      shape: of the model's attention, all layers.
      max_model_len: tokens of the longest sequence.
    """
    flops_seconds = flops_squared = 0.0
    shapes = runner.buckets.prefill_shapes
    for padded in {shapes[0], shapes[len(shapes) // 2], shapes[-1], *(one for one in shapes if one.rows > 1)}:
        cached = max_model_len - padded.chunk
        near, far = (min(runner.layer_seconds(padded, start) for _ in range(_REPEATS)) for start in (0, cached))
        seconds = (far - near) * runner.stages.num_layers
        flops = padded.rows * (shape.flops(cached, padded.chunk) - shape.flops(0, padded.chunk))
        flops_seconds += flops * seconds
        flops_squared += flops * flops
    # Least squares through the origin; noise may make it negative where attention takes next to nothing.
    return AttentionCost(shape, 0.0, max(0.0, flops_seconds / flops_squared if flops_squared else 0.0), 0.0)
