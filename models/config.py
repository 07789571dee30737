"""What a decoder is: its sizes and the choices that change its mathematics, as plain data."""

import math
from dataclasses import dataclass

from models.packed_config import PackedConfig
from pallas_kernels.pseudo_heads import MASKS, Mask, tokens_in_sight

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
IHA_ROPES = ("virtual", "token", "scaled", "none")
IHA_COLLAPSES = ("global", "per_head")

# Far beyond any model; a corrupt configuration is refused before it makes anything large.
MAX_COUNT = 10_000
MAX_SIZE = 1 << 24
MAX_POSITIONS = (1 << 31) - 1

_FILE_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched for longer contexts.

    Args:
      type: one of `ROPE_TYPES`.
      theta: base of the frequencies.
      factor: stretch of the context (linear, llama3, yarn).
      original_max_position_embeddings: context length in tokens before the stretch (llama3, yarn).
      low_freq_factor, high_freq_factor: borders of the llama3 interpolation, in turns per original context.
      beta_fast, beta_slow: borders of the YaRN ramp, in turns per original context.
      attention_factor: factor on cos and sin (YaRN); None takes the paper's `0.1 ln(factor) + 1`.
      truncate: whether the borders of the YaRN ramp are rounded to whole dimensions.

    Raises:
      ValueError: a field outside its range.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"rope {name} is {value!r}; it must be a positive number")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(f"rope attention_factor is {self.attention_factor!r}; it must be a positive number")
        if self.factor < 1.0:
            raise ValueError(f"rope factor is {self.factor!r}; it must be at least 1")
        if self.theta <= 1.0:
            raise ValueError(f"rope theta is {self.theta!r}; it must be greater than 1")
        if self.type in ("llama3", "yarn"):
            original = self.original_max_position_embeddings
            if original is None or not 1 <= original <= MAX_POSITIONS:
                raise ValueError(
                    f"rope original_max_position_embeddings is {original!r}; {self.type} needs 1 to {MAX_POSITIONS}"
                )
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor ({self.low_freq_factor}) must be less than "
                f"high_freq_factor ({self.high_freq_factor})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: how many, how many a token, and in which layers.

    Args:
      num_experts: experts of one layer.
      num_experts_per_tok: experts that a token is sent to.
      intermediate_size: hidden width of one expert.
      norm_topk_prob: whether the weights of the chosen experts are scaled to sum to one.
      decoder_sparse_step: layer `i` is sparse if `i + 1` is a multiple of this.
      mlp_only_layers: layers that are dense all the same.

    Raises:
      ValueError: a field outside its range.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_range(self, MAX_COUNT, "num_experts", "num_experts_per_tok", "decoder_sparse_step")
        _check_range(self, MAX_SIZE, "intermediate_size")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most num_experts ({self.num_experts})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IHAConfig:
    """Interleaved Head Attention (Duvvuri et al. 2026): which layers have it, and in which form.

    Args:
      pseudo_heads: P, pseudo queries, keys and values of each query head.
      layers: that have it, in order; the others have plain attention.
      mask: "flat": causal over the virtual sequence of `tokens * P` pseudo tokens; "token": pseudo tokens of one token
        see the same. See `pallas_kernels.pseudo_heads.PseudoHeads`, also for what a window means.
      rope: position of pseudo head p of token n: "virtual" `n * P + p`, "token" n, "scaled" `n + p / P`, "none" without
        rotary positions.
      collapse: how the P outputs of each head become one again: "global" mixes those of all heads, "per_head" only its
        own.

    Raises:
      ValueError: a field outside its range.
    """

    pseudo_heads: int
    layers: tuple[int, ...]
    mask: Mask = "flat"
    rope: str = "virtual"
    collapse: str = "global"

    def __post_init__(self) -> None:
        if not 1 <= self.pseudo_heads <= MAX_COUNT:
            raise ValueError(f"iha_pseudo_heads is {self.pseudo_heads}; it must be 1 to {MAX_COUNT}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"iha_layers is {list(self.layers)}; numbers of layers in order are expected")
        for name, known in (("mask", MASKS), ("rope", IHA_ROPES), ("collapse", IHA_COLLAPSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"iha_{name} is {getattr(self, name)!r}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only language model.

    Args:
      family: key of `models.families.FAMILIES` (the `model_type` of the checkpoint).
      vocab_size: entries of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: hidden width of a dense MLP, of the widest one where layers differ.
      layer_intermediate_sizes: that of each layer, where layers differ; empty is `intermediate_size` in every layer.
        The entry of a layer that is a mixture of experts counts for nothing.
      num_layers, num_heads, num_kv_heads, head_dim: shape of the attention; `num_heads` is a multiple of
        `num_kv_heads`, `head_dim` is even and need not be `hidden_size / num_heads`.
      rms_norm_eps: added to the mean square in every norm.
      rope: rotary position embedding.
      max_position_embeddings: longest context in tokens that the model is made for.
      tie_word_embeddings: the output head is the transposed embedding.
      qkv_bias, o_bias, mlp_bias: whether these projections have biases.
      qk_norm: RMS norm over each head of q and k, before the rotation.
      layer_windows: sliding window of each layer in tokens, None for full attention; empty is full in every layer. With
        window W, the query at position p sees the keys at positions j with `p - W < j <= p`.
      moe: mixture of experts, or None for a dense model.
      iha: Interleaved Head Attention in some layers, or None for plain attention in all.
      packed: projections are stored without what a pruner left out; None for dense ones.
      bos_token_id: first token of a text, if the model has one.
      eos_token_ids: tokens that end a text.

    Raises:
      ValueError: a field outside its range; the message uses the names of a checkpoint's `config.json`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    layer_intermediate_sizes: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    iha: IHAConfig | None = None
    packed: PackedConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_range(self, MAX_SIZE, "vocab_size", "hidden_size", "intermediate_size", "head_dim")
        _check_range(self, MAX_COUNT, "num_layers", "num_heads", "num_kv_heads")
        _check_range(self, MAX_POSITIONS, "max_position_embeddings")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; it must be even for rotary positions")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must be a positive number")
        if len(self.layer_windows) not in (0, self.num_layers):
            raise ValueError(
                f"layer_windows has {len(self.layer_windows)} entries; num_hidden_layers is {self.num_layers}"
            )
        for window in self.layer_windows:
            if window is not None and not 1 <= window <= MAX_POSITIONS:
                raise ValueError(f"sliding_window is {window}; it must be 1 to {MAX_POSITIONS}")
        self._check_widths()
        if self.moe is not None:
            outside = [i for i in self.moe.mlp_only_layers if not 0 <= i < self.num_layers]
            if outside:
                raise ValueError(f"mlp_only_layers names {outside[0]}; layers are 0 to {self.num_layers - 1}")
        if self.iha is not None and not 0 <= self.iha.layers[0] <= self.iha.layers[-1] < self.num_layers:
            raise ValueError(f"iha_layers is {list(self.iha.layers)}; layers are 0 to {self.num_layers - 1}")
        if self.iha is not None and self.max_position_embeddings * self.iha.pseudo_heads > MAX_POSITIONS:
            raise ValueError(
                f"max_position_embeddings ({self.max_position_embeddings}) times iha_pseudo_heads "
                f"({self.iha.pseudo_heads}) must be at most {MAX_POSITIONS}"
            )
        if self.packed is not None:
            self.packed.check(self)
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if token < 0:
                raise ValueError(f"bos_token_id or eos_token_id is {token}; it must be at least 0")

    def _check_widths(self) -> None:
        widths = self.layer_intermediate_sizes
        if not widths:
            return
        if len(widths) != self.num_layers:
            raise ValueError(
                f"layer_intermediate_sizes has {len(widths)} entries; num_hidden_layers is {self.num_layers}"
            )
        if min(widths) < 1 or max(widths) != self.intermediate_size:
            raise ValueError(
                f"layer_intermediate_sizes is {min(widths)} to {max(widths)}; at least 1 is expected, and "
                f"intermediate_size ({self.intermediate_size}) as the largest"
            )

    def intermediate_size_of(self, layer: int) -> int:
        """Hidden width of the MLP of layer `layer` (from 0), if it is dense."""
        return self.layer_intermediate_sizes[layer] if self.layer_intermediate_sizes else self.intermediate_size

    def window_of(self, layer: int) -> int | None:
        """Sliding window of layer `layer` (from 0) in tokens, or None for full attention."""
        return self.layer_windows[layer] if self.layer_windows else None

    def has_iha(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has Interleaved Head Attention."""
        return self.iha is not None and layer in self.iha.layers

    def tokens_in_sight(self, layer: int) -> int | None:
        """Tokens whose keys and values a query of layer `layer` may need, its own included; None for all before it.

        It is the window, but for pseudo heads under the flat mask, which reach a token further.
        """
        window = self.window_of(layer)
        if self.iha is None or layer not in self.iha.layers:
            return window
        return tokens_in_sight(window, self.iha.pseudo_heads, self.iha.mask)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers that are mixtures of experts."""
        return tuple(layer for layer in range(self.num_layers) if self.is_sparse(layer))

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is a mixture of experts."""
        moe = self.moe
        return moe is not None and layer not in moe.mlp_only_layers and (layer + 1) % moe.decoder_sparse_step == 0


def _check_range(config: object, upper: int, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not 1 <= value <= upper:
            raise ValueError(f"{_FILE_KEYS.get(field, field)} is {value}; it must be 1 to {upper}")
