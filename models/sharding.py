"""Where the parameters of a model live on a mesh of devices: logical axes of each, and the mesh axes of those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.shapes import ShardingRule

# Logical axes of parameters, by the end of their path. What is not listed is the same on all devices.
LOGICAL_AXES: Mapping[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", None),
    "lm_head.kernel": (None, "vocab"),
    "attention.q.kernel": (None, "heads"),
    "attention.q.bias": ("heads",),
    "attention.k.kernel": (None, "kv_heads"),
    "attention.k.bias": ("kv_heads",),
    "attention.v.kernel": (None, "kv_heads"),
    "attention.v.bias": ("kv_heads",),
    "attention.o.kernel": ("heads", None),
    "mlp.gate.kernel": (None, "inner"),
    "mlp.gate.bias": ("inner",),
    "mlp.up.kernel": (None, "inner"),
    "mlp.up.bias": ("inner",),
    "mlp.down.kernel": ("inner", None),
    "mlp.experts.gate": ("experts", None, "expert_inner"),
    "mlp.experts.up": ("experts", None, "expert_inner"),
    "mlp.experts.down": ("experts", "expert_inner", None),
}


@dataclass(frozen=True, slots=True)
class ShardingRules:
    """Mesh axes that each logical axis is split over; None keeps it whole.

    Attributes:
      tokens: rows of the residual stream.
      vocab: entries of the embedding and of the output head.
      heads, kv_heads: of the attention; query heads stay with their key-value heads.
      inner: hidden width of a dense MLP.
      experts: of a layer.
      expert_inner: hidden width of one expert.
    """

    tokens: tuple[str, ...] | str | None = ("data", "expert")
    vocab: tuple[str, ...] | str | None = "tensor"
    heads: tuple[str, ...] | str | None = "tensor"
    kv_heads: tuple[str, ...] | str | None = "tensor"
    inner: tuple[str, ...] | str | None = "tensor"
    experts: tuple[str, ...] | str | None = "expert"
    expert_inner: tuple[str, ...] | str | None = "tensor"

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Mesh axes of an array with these logical axes."""
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))

    def parameter_spec(self, path: str) -> PartitionSpec:
        """Mesh axes of the parameter with this dotted path."""
        for suffix, axes in LOGICAL_AXES.items():
            if path == suffix or path.endswith(f".{suffix}"):
                return self.spec(*axes)
        return PartitionSpec()


def sharding_rule(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> ShardingRule:
    """What `models.load` and `models.init` take as `sharding`; an axis that can't be split evenly is left whole."""

    def rule(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = [
            None if axis is None or size % _devices(mesh, axis) else axis
            for size, axis in zip(shape, rules.parameter_spec(path), strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return rule


def _devices(mesh: Mesh, axis: tuple[str, ...] | str) -> int:
    count = 1
    for name in (axis,) if isinstance(axis, str) else axis:
        count *= mesh.shape[name]
    return count
