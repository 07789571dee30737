"""How a forward pass is cut into stages, and where the keys and values of each lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jaxdual.kv.layout import ROWS_PER_LAYER


@dataclass(frozen=True, slots=True)
class Stages:
    """Layers whose keys and values come, are attended to and go together.

    A page of the arena holds the rows of `slots` stages: stage `s` takes the place of stage `s - slots`. Layerwise, a
    stage is one layer, and a few of them share the device's memory. Where a stage is all layers, nothing overlaps:
    everything comes, then is computed, then goes.

    Attributes:
      num_layers: of the model.
      layers: of a stage; divides `num_layers`.
      slots: stages of which a page holds rows.
      layer_bytes: of a Layer Block.

    Raises:
      ValueError: a number is out of range.
    """

    num_layers: int
    layers: int
    slots: int
    layer_bytes: int

    def __post_init__(self) -> None:
        if self.layers < 1 or self.num_layers % self.layers or not 1 <= self.slots <= self.count:
            raise ValueError(f"{self.layers=} must divide {self.num_layers=}, and {self.slots=} be 1 to the quotient")

    @classmethod
    def layerwise(cls, num_layers: int, layer_bytes: int, slots: int) -> Self:
        """A layer at a time, `slots` of them on the device, or all where there are fewer."""
        return cls(num_layers, 1, min(slots, num_layers), layer_bytes)

    @classmethod
    def whole(cls, num_layers: int, layer_bytes: int) -> Self:
        """All layers at once."""
        return cls(num_layers, num_layers, 1, layer_bytes)

    @property
    def count(self) -> int:
        return self.num_layers // self.layers

    @property
    def nbytes(self) -> int:
        """Of a block in one stage."""
        return self.layers * self.layer_bytes

    @property
    def layer_slots(self) -> int:
        """Layers of which a page of the arena holds rows."""
        return self.slots * self.layers

    @property
    def rows_per_block(self) -> int:
        return self.layers * ROWS_PER_LAYER

    @property
    def rows_per_page(self) -> int:
        return self.layer_slots * ROWS_PER_LAYER

    def layers_of(self, stage: int) -> range:
        return range(stage * self.layers, (stage + 1) * self.layers)

    def offset(self, stage: int) -> int:
        """Where a stage begins in a Full Block, in bytes."""
        return stage * self.nbytes

    def block_id(self, page: int, stage: int) -> int:
        """Number of a page's block of a stage among those of the arena, for `pallas_kernels.kv_blocks`."""
        return page * self.slots + stage % self.slots
