"""What Interleaved Head Attention costs: operations and bytes of cache, counted from a model's configuration.

A multiply-add is two operations. Projections and MLPs are not counted, since IHA leaves them as they are; what it adds
are more pairs of query and key, and the mixing of heads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from models.config import ModelConfig
from models.iha import schedule


def global_baseline(config: ModelConfig) -> ModelConfig:
    """The same model with plain attention to all tokens in every layer."""
    return dataclasses.replace(config, iha=None, layer_windows=())


def local_baseline(config: ModelConfig, window: int = 512) -> ModelConfig:
    """The same model with plain attention, in the paper's proportion: four layers with a window, then a global one."""
    windows, _ = schedule(config.num_layers, window, 1)
    return dataclasses.replace(
        config, iha=None, layer_windows=tuple(None if one is None else window for one in windows)
    )


def visible_pairs(tokens: int, window: int | None = None, pseudo_heads: int = 1, mask: str = "flat") -> int:
    """Pairs of pseudo query and pseudo key that a head of a causal layer looks at, of all `tokens`.

    Args:
      tokens: of the sequence.
      window: of the layer in tokens; None for all.
      pseudo_heads: P; 1 is plain attention.
      mask: "flat" or "token", see `pallas_kernels.pseudo_heads.PseudoHeads`.
    """
    span, rows = (pseudo_heads, 1) if mask == "token" else (1, pseudo_heads)
    places = tokens * rows
    reach = places if window is None else min(window * rows, places)
    return (reach * (reach + 1) // 2 + (places - reach) * reach) * span**2


def square_pairs(tokens: int, window: int | None = None, pseudo_heads: int = 1) -> int:
    """The paper's count (appendix C) of what `visible_pairs` counts: every query meets as many keys as the last one."""
    return tokens * min(tokens, tokens if window is None else window) * pseudo_heads**2


def attention_flops(config: ModelConfig, tokens: int, *, as_paper: bool = False) -> int:
    """Operations of all layers' scores and weighted sums, of a sequence that is computed as a whole.

    Args:
      config: of the model.
      tokens: of the sequence.
      as_paper: counts pairs by `square_pairs`, without the causal halving, in place of `visible_pairs`.
    """
    pairs = 0
    for layer in range(config.num_layers):
        window = config.window_of(layer)
        pseudo = config.iha.pseudo_heads if config.iha is not None and config.has_iha(layer) else 1
        mask = "flat" if config.iha is None else config.iha.mask
        pairs += square_pairs(tokens, window, pseudo) if as_paper else visible_pairs(tokens, window, pseudo, mask)
    return 4 * config.num_heads * config.head_dim * pairs


def mixing_flops(config: ModelConfig) -> int:
    """Operations a token of all layers' mixing and collapse: `8 H^2 P d` a layer for as many key/value heads (global).

    A model of `P = 1` can have none by folding the weights into its projections; they are counted all the same.
    """
    if config.iha is None:
        return 0
    rows = config.num_heads * config.iha.pseudo_heads
    sources = config.num_heads + 2 * config.num_kv_heads
    outputs = config.num_heads if config.iha.collapse == "global" else 1
    return len(config.iha.layers) * 2 * rows * (sources + outputs) * config.head_dim


def ratio_to_global(config: ModelConfig, tokens: int, *, as_paper: bool = False) -> float:
    """Operations of attention and mixing of a sequence, by those of `global_baseline`.

    Args:
      config: of the model.
      tokens: of the sequence.
      as_paper: as of `attention_flops`, and mixing is free, as in the paper's count.
    """
    mixing = 0 if as_paper else mixing_flops(config) * tokens
    whole = attention_flops(global_baseline(config), tokens, as_paper=as_paper)
    return (attention_flops(config, tokens, as_paper=as_paper) + mixing) / whole


def cache_tokens(config: ModelConfig, tokens: int) -> int:
    """Tokens whose keys and values the layers keep, all together, after `tokens` of a sequence.

    Layers with a window keep what their next query may see: a token more than the window under the flat mask.
    """
    sights = (config.tokens_in_sight(layer) for layer in range(config.num_layers))
    return sum(tokens if sight is None else min(tokens, sight) for sight in sights)


def cache_bytes(config: ModelConfig, tokens: int, *, itemsize: int = 2, pseudo: bool = False) -> int:
    """Bytes of keys and values that a sequence of `tokens` keeps.

    Args:
      config: of the model.
      tokens: of the sequence.
      itemsize: bytes of a number.
      pseudo: what it were if pseudo keys and values were kept; jaxdual keeps them unmixed.
    """
    if not pseudo or config.iha is None:
        return 2 * config.num_kv_heads * config.head_dim * itemsize * cache_tokens(config, tokens)
    total = 0
    for layer in range(config.num_layers):
        sight = config.tokens_in_sight(layer)
        kept = tokens if sight is None else min(tokens, sight)
        heads = config.num_heads * config.iha.pseudo_heads if config.has_iha(layer) else config.num_kv_heads
        total += 2 * heads * config.head_dim * itemsize * kept
    return total


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """What a decode step does for each cached token of a layer.

    Attributes:
      bytes: that are read.
      flops: operations.
    """

    bytes: int
    flops: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The longer of the times that reading and computing take on a device of these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def decode_costs(heads: int, head_dim: int, pseudo_heads: int, *, itemsize: int = 2) -> dict[str, DecodeCost]:
    """Ways to decode with IHA, for as many key/value heads as query heads.

    Args:
      heads, head_dim: of the layer.
      pseudo_heads: P.
      itemsize: bytes of a cached number.

    Returns:
      By name: "plain" attention without pseudo heads; "pseudo" keys and values that are cached mixed; "fly", cached
      unmixed and mixed for each step; "absorbed", cached unmixed, the mixing in the queries and outputs.
    """
    width = heads * head_dim
    raw = 2 * width * itemsize
    return {
        "plain": DecodeCost(raw, 4 * width),
        "pseudo": DecodeCost(raw * pseudo_heads, 4 * width * pseudo_heads**2),
        "fly": DecodeCost(raw, 4 * width * pseudo_heads * (heads + pseudo_heads)),
        "absorbed": DecodeCost(raw, 4 * width * heads * pseudo_heads**2),
    }


@dataclass(frozen=True, slots=True)
class ProjectionCost:
    """Projections to queries, keys and values of a layer whose width is `heads * head_dim`.

    Attributes:
      mixed_flops: a token's, with mixing as a step of its own.
      folded_flops: a token's, with the mixing in the projections' weights.
      mixed_bytes, folded_bytes: of the weights.
      folded_output_bytes: of the output projection's weights with the collapse in them.
    """

    mixed_flops: int
    folded_flops: int
    mixed_bytes: int
    folded_bytes: int
    folded_output_bytes: int


def projection_costs(heads: int, head_dim: int, pseudo_heads: int, *, itemsize: int = 2) -> ProjectionCost:
    """What folding the mixing weights into the projections saves or costs; it saves for `P = 1` only."""
    width = heads * head_dim
    return ProjectionCost(
        mixed_flops=3 * 2 * (width**2 + heads * width * pseudo_heads),
        folded_flops=3 * 2 * width**2 * pseudo_heads,
        mixed_bytes=3 * width**2 * itemsize,
        folded_bytes=3 * width**2 * pseudo_heads * itemsize,
        folded_output_bytes=width**2 * pseudo_heads * itemsize,
    )
