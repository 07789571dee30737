"""What a structured pruning takes out of a model, and the configuration of what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from models import ModelConfig, pruned_form

MULTIPLE = 16  # neurons: the widths of what stays, which vector units and tensor cores divide
WIDTHS = ("even", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """How much goes, and how it is made up for.

    Attributes:
      share: of the neurons of dense MLPs and of the experts of mixtures that go, from 0 to below 1. What stays is
        rounded: neurons to the nearest multiple of `MULTIPLE`, experts to a whole number.
      kv_groups: key-value heads that go from each layer, with the query heads that share them.
      widths: "even": every layer loses the same share of its neurons; "error": as many go in all, from the layers
        where they are missed least.
      shift: whether outputs get biases that make up for the means of what goes.

    Raises:
      ValueError: a value outside its range, or nothing that goes.
    """

    share: float = 0.0
    kv_groups: int = 0
    widths: Literal["even", "error"] = "even"
    shift: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share {self.share:g}: a number from 0 to below 1 is expected")
        if self.kv_groups < 0:
            raise ValueError(f"{self.kv_groups} key-value heads: at least 0 can go")
        if self.widths not in WIDTHS:
            raise ValueError(f"widths {self.widths!r}: known are {', '.join(WIDTHS)}")
        if self.share == 0 and self.kv_groups == 0:
            raise ValueError("nothing goes: a share above 0, or key-value heads, is expected")

    @classmethod
    def parse(
        cls, share: str, *, kv_groups: int = 0, widths: Literal["even", "error"] = "even", shift: bool = False
    ) -> Structure:
        """With the share as it is written on a command line; raises `ValueError` for N:M and whatever is no number."""
        try:
            value = float(share)
        except ValueError:
            raise ValueError(
                f"pattern {share!r} must be a share from 0 to below 1: structured pruning takes whole neurons"
            ) from None
        return cls(share=value, kv_groups=kv_groups, widths=widths, shift=shift)

    def check(self, config: ModelConfig, tokens: int) -> None:
        """Raises `ValueError` if a model can't be pruned so with so many tokens of calibration text."""
        if config.iha is not None:
            raise ValueError(f"models of the family {config.family} can't be pruned: their heads are mixed")
        if self.kv_groups >= config.num_kv_heads:
            raise ValueError(
                f"{self.kv_groups} key-value heads of {config.num_kv_heads} can't go: "
                f"0 to {config.num_kv_heads - 1} are expected"
            )
        dense = dense_layers(config)
        if self.widths == "error" and (self.share == 0 or len(dense) < 2):
            raise ValueError("widths by error need a share above 0 and two dense layers at least")
        fitted = 0
        if self.share > 0:
            self._check_experts(config)
            fitted = max((self._check_width(config, layer) for layer in dense), default=0)
        if self.kv_groups:
            fitted = max(fitted, kept_heads(config, self.kv_groups)[0] * config.head_dim)
        if tokens < fitted:
            raise ValueError(f"{tokens} tokens of calibration text are too few to fit {fitted} inputs of a matrix")

    def check_learning(self, config: ModelConfig, *, scales: bool) -> None:
        """Raises `ValueError` if scales of neurons or shifts are asked for where there is nothing to have them."""
        neurons = self.share > 0 and bool(dense_layers(config))
        if scales and not neurons:
            raise ValueError("Sparsity Induction is of neurons that go from dense MLPs, and none go")
        if self.shift and not neurons and not self.kv_groups:
            raise ValueError("shifts are of dense MLPs and of the attention, and nothing goes from these")

    def width(self, size: int) -> int:
        """Neurons that stay of `size` where all layers lose the same share."""
        if self.share == 0:
            return size
        return int(size * (1 - self.share) / MULTIPLE + 0.5) * MULTIPLE

    def experts(self, count: int) -> int:
        """Experts that stay of `count`."""
        return int(count * (1 - self.share) + 0.5)

    def _check_experts(self, config: ModelConfig) -> None:
        if config.moe is None or not config.sparse_layers:
            return
        count, kept = config.moe.num_experts, self.experts(config.moe.num_experts)
        if not config.moe.num_experts_per_tok <= kept < count:
            raise ValueError(
                f"share {self.share:g} leaves {kept} of {count} experts: {config.moe.num_experts_per_tok} (those of a "
                f"token) to {count - 1} are expected"
            )

    def _check_width(self, config: ModelConfig, layer: int) -> int:
        """Neurons that are fitted to."""
        size = config.intermediate_size_of(layer)
        kept = self.width(size)
        if not MULTIPLE <= kept < size:
            raise ValueError(
                f"share {self.share:g} leaves {kept} of the {size} neurons of layer {layer}: {MULTIPLE} to {size - 1} "
                f"are expected, in multiples of {MULTIPLE}"
            )
        return kept if self.widths == "even" else size


def dense_layers(config: ModelConfig) -> list[int]:
    """Layers that are no mixtures of experts."""
    return [layer for layer in range(config.num_layers) if not config.is_sparse(layer)]


def kept_heads(config: ModelConfig, kv_groups: int) -> tuple[int, int]:
    """Query and key-value heads that stay if so many of the latter go."""
    kv_heads = config.num_kv_heads - kv_groups
    return config.num_heads // config.num_kv_heads * kv_heads, kv_heads


def smaller_config(config: ModelConfig, structure: Structure, widths: Sequence[int]) -> ModelConfig:
    """The configuration of a pruned model: its family's own as long as that can express it.

    Args:
      config: of the model before.
      structure: what went.
      widths: neurons of each layer; those of mixtures count for nothing.
    """
    heads, kv_heads = kept_heads(config, structure.kv_groups)
    changed = replace(config, num_heads=heads, num_kv_heads=kv_heads)
    dense = dense_layers(config)
    if structure.share > 0:
        if config.moe is not None and config.sparse_layers:
            moe = replace(config.moe, num_experts=structure.experts(config.moe.num_experts))
            changed = replace(changed, moe=moe)
        if dense:
            widest = max(widths[layer] for layer in dense)
            sizes = tuple(widest if config.is_sparse(layer) else width for layer, width in enumerate(widths))
            even = set(sizes) == {widest}
            changed = replace(changed, intermediate_size=widest, layer_intermediate_sizes=() if even else sizes)
    if structure.shift:
        changed = replace(
            changed,
            o_bias=changed.o_bias or structure.kv_groups > 0,
            mlp_bias=changed.mlp_bias or (structure.share > 0 and bool(dense)),
        )
    return pruned_form(changed)
