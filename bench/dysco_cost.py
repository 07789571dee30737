"""What DySCO should cost a decode step, if bytes or arithmetic were all: sizes of a model, and two ratios to vanilla.

Of a token that n tokens can be attended to from, vanilla reads the weights once for the batch, and the keys and values
of each sequence. The first pass reads layers up to the last with a retrieval head once more, for the sequences that are
peeked, without the head of the vocabulary; and it writes and reads a score of each key for each retrieval head, and the
relevance of each key. What is selected is a bit for each key, read in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig

_SCORE_BYTES = 8  # of a key and a retrieval head: written and read, in float32
_RELEVANCE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a dense model.

    Attributes:
      layers, heads, kv_heads, head_dim: of it; heads are query heads.
      layer_weights: parameters of all layers.
      head_weights: parameters of the head of the vocabulary.
      weight_bytes, kv_bytes: of a parameter, and of a number in a key or value.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_weights: int
    head_weights: int
    weight_bytes: int
    kv_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, item_bytes: int) -> Sizes:
        """Sizes of a dense model whose numbers all have so many bytes; norms are left out."""
        attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
        inner = sum(map(config.intermediate_size_of, range(config.num_layers)))
        return cls(
            layers=config.num_layers,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer_weights=config.num_layers * attention + 3 * config.hidden_size * inner,
            head_weights=config.vocab_size * config.hidden_size,
            weight_bytes=item_bytes,
            kv_bytes=item_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Sequences of a decode step.

    Attributes:
      sequences: all of them.
      keys: of each, with the token itself.
      peeked: sequences that go through the first pass.
      raised: sequences with raised attention.
      every: there is a first pass in one of so many steps.
    """

    sequences: int
    keys: int
    peeked: int
    raised: int
    every: int = 1


def kv_bytes(sizes: Sizes, keys: int) -> int:
    """Of the keys and values of one sequence, in all layers."""
    return sizes.layers * 2 * sizes.kv_heads * sizes.head_dim * sizes.kv_bytes * keys


def vanilla_bytes(sizes: Sizes, sequences: int, keys: int) -> int:
    """That a decode step reads without DySCO."""
    weights = (sizes.layer_weights + sizes.head_weights) * sizes.weight_bytes
    return weights + sequences * kv_bytes(sizes, keys)


def vanilla_flops(sizes: Sizes, sequences: int, keys: int) -> int:
    """Of a decode step without DySCO."""
    of_token = 2 * (sizes.layer_weights + sizes.head_weights)
    return sequences * (of_token + 4 * sizes.layers * sizes.heads * sizes.head_dim * keys)


def byte_ratio(sizes: Sizes, shape: StepShape, last_layer: int, retrieval_heads: int) -> float:
    """Bytes of a step, on average, by those without DySCO.

    Args:
      last_layer: with a retrieval head, from 0.
      retrieval_heads: of all layers.
    """
    part = (last_layer + 1) / sizes.layers
    weights = (shape.peeked > 0) * part * sizes.layer_weights * sizes.weight_bytes / shape.every
    keys = shape.peeked * part * kv_bytes(sizes, shape.keys) / shape.every
    looked = shape.raised * shape.keys * (retrieval_heads * _SCORE_BYTES + _RELEVANCE_BYTES)
    bits = shape.raised * sizes.layers * shape.keys / 8
    return 1 + (weights + keys + looked + bits) / vanilla_bytes(sizes, shape.sequences, shape.keys)


def flop_ratio(sizes: Sizes, shape: StepShape, last_layer: int) -> float:
    """Arithmetic of a step, on average, by that without DySCO; what the selection takes is left out."""
    part = (last_layer + 1) / sizes.layers
    of_token = part * (2 * sizes.layer_weights + 4 * sizes.layers * sizes.heads * sizes.head_dim * shape.keys)
    return 1 + shape.peeked / shape.every * of_token / vanilla_flops(sizes, shape.sequences, shape.keys)
