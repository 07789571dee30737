"""What packed weights are, as plain data: the pattern, and which matrices follow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pallas_kernels.block_sparse_matmul.packing import check_block
from pallas_kernels.sparse_matmul.packing import check_pattern

if TYPE_CHECKING:
    from models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedConfig:
    """Projections that are stored without what a pruner left out: N:M, or square blocks.

    Args:
      keep, of: of every `of` neighbouring inputs of an output `keep` are there; 0 for blocks.
      block: outputs and inputs of a block; 0 for N:M.
      share: of the blocks that are left out, as many of each block of outputs, rounded down.

    Raises:
      ValueError: not one of the two, or a field outside its range.
    """

    keep: int = 0
    of: int = 0
    block: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.block) == bool(self.of) or (self.of and self.share) or (self.block and self.keep):
            raise ValueError(f"{self}: packed_keep and packed_of are expected, or packed_block and packed_share")
        if self.of:
            check_pattern(self.keep, self.of, 0)
        elif self.block < 1 or not 0 < self.share < 1:
            raise ValueError(
                f"packed_block is {self.block} and packed_share {self.share}; at least 1 and a share between 0 and 1 "
                "are expected"
            )

    def blocks_kept(self, inputs: int) -> int:
        """Blocks of each block of outputs."""
        blocks = inputs // self.block
        return blocks - int(blocks * self.share)

    def check(self, config: ModelConfig) -> None:
        """Raises `ValueError` if a model has a projection that can't be packed so."""
        for layer in range(config.num_layers):
            for path, (inputs, outputs) in projections(config, layer).items():
                try:
                    if self.of:
                        check_pattern(self.keep, self.of, inputs)
                    else:
                        check_block(self.block, inputs, outputs)
                except ValueError as error:
                    raise ValueError(f"{path} of layer {layer}: {error}") from None


def projections(config: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the projections of layer `layer` that are packed: all but those of experts and routers."""
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    sizes = {
        "attention.q": (hidden, queries),
        "attention.k": (hidden, keys),
        "attention.v": (hidden, keys),
        "attention.o": (queries, hidden),
    }
    if not config.is_sparse(layer):
        inner = config.intermediate_size_of(layer)
        sizes |= {"mlp.gate": (hidden, inner), "mlp.up": (hidden, inner), "mlp.down": (inner, hidden)}
    return sizes
