"""The matrices of a decoder layer that are pruned, and what they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.moments import Moments
from models import ModelConfig
from models.layers import LayerAttend
from models.moe import MoE
from models.rope import Rope

# Groups of matrices with the same inputs, in the order of a layer; those of experts have the expert's number behind.
ATTENTION, ATTENTION_OUT, MLP, MLP_OUT = "qkv", "o", "gate_up", "down"


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix of a layer.

    Attributes:
      path: of its parameter in the layer.
      group: of matrices with the same inputs.
      expert: its place in a stack; None where it stands alone.
    """

    path: str
    group: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """For reports."""
        path = self.path.removesuffix(".kernel")
        return path if self.expert is None else f"{path}.{self.expert}"

    @property
    def kind(self) -> str:
        """The group, whichever expert it is of."""
        return self.group.partition(".")[0]

    def read(self, layer: nnx.Module) -> Float[Array, "outputs inputs"]:
        """The matrix, a row for each output."""
        values = self._parameter(layer)[...]
        matrix: jax.Array = (values if self.expert is None else values[self.expert]).T
        return matrix

    def write(self, layer: nnx.Module, matrix: Float[Array, "outputs inputs"]) -> None:
        """Puts a matrix in its place, in the type of the one before."""
        parameter = self._parameter(layer)
        values = parameter[...]
        new = matrix.T.astype(values.dtype)
        parameter[...] = new if self.expert is None else values.at[self.expert].set(new)

    def shift(self, layer: nnx.Module, by: Float[Array, " outputs"]) -> None:
        """Adds to the biases of a matrix, which may have had none."""
        owner: Any = layer
        for part in self.path.split(".")[:-1]:
            owner = getattr(owner, part)
        before = jnp.zeros_like(by) if owner.bias is None else owner.bias[...]
        owner.bias = nnx.data(nnx.Param((before + by).astype(owner.kernel[...].dtype)))

    def _parameter(self, layer: nnx.Module) -> Any:
        found: Any = layer
        for part in self.path.split("."):
            found = getattr(found, part)
        return found


def linears_of(config: ModelConfig, layer: int) -> list[Linear]:
    """All matrices of layer `layer` that are pruned.

    Raises:
      ValueError: a model with matrices that can't be pruned.
    """
    if config.iha is not None:
        raise ValueError(f"models of the family {config.family} can't be pruned: their heads are mixed")
    if config.packed is not None:
        raise ValueError("the model's weights are packed: what it was made of can be pruned")
    found = [Linear(f"attention.{name}.kernel", ATTENTION) for name in ("q", "k", "v")]
    found.append(Linear("attention.o.kernel", ATTENTION_OUT))
    if config.moe is None or not config.is_sparse(layer):
        found += [Linear(f"mlp.{name}.kernel", MLP) for name in ("gate", "up")]
        return [*found, Linear("mlp.down.kernel", MLP_OUT)]
    for expert in range(config.moe.num_experts):
        found += [Linear(f"mlp.experts.{name}", f"{MLP}.{expert}", expert) for name in ("gate", "up")]
        found.append(Linear("mlp.experts.down", f"{MLP_OUT}.{expert}", expert))
    return found


type Inputs = Iterator[tuple[str, Float[Array, "T inputs"], Float[Array, " T"] | None]]


def inputs_of(layer: Any, x: Float[Array, "T D"], rope: Rope, attend: LayerAttend) -> Inputs:
    """What each group of matrices is multiplied with, and which tokens count for it; None for all."""
    normed = layer.attention_norm(x)
    yield ATTENTION, normed, None
    out, _ = attend(*layer.attention.project(normed, rope), None)
    yield ATTENTION_OUT, out.reshape(x.shape[0], -1), None
    x = x + layer.attention.output(out)
    normed = layer.mlp_norm(x)
    mlp = layer.mlp
    if not isinstance(mlp, MoE):
        yield MLP, normed, None
        yield MLP_OUT, jax.nn.silu(mlp.gate(normed)) * mlp.up(normed), None
        return
    chosen, _ = mlp.route(normed)
    gate, up = mlp.experts.gate[...], mlp.experts.up[...]
    for expert in range(gate.shape[0]):
        own = jnp.any(chosen == expert, axis=-1).astype(jnp.float32)
        yield f"{MLP}.{expert}", normed, own
        yield f"{MLP_OUT}.{expert}", jax.nn.silu(normed @ gate[expert]) * (normed @ up[expert]), own


def with_inputs(
    moments: dict[str, Moments], layer: Any, x: Float[Array, "T D"], rope: Rope, attend: LayerAttend
) -> dict[str, Moments]:
    """The moments of some groups of a layer, or of all, with some more tokens."""
    return {
        group: moments[group].with_tokens(inputs, counts)
        for group, inputs, counts in inputs_of(layer, x, rope, attend)
        if group in moments
    }
