"""The configuration keys that all families share, in the names of transformers."""

from typing import Any

from models.config import MAX_COUNT, ModelConfig, MoEConfig, RopeConfig
from models.config_reader import ConfigReader, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"

DEFAULT_WINDOW = 4096  # of the configuration classes that have `sliding_window`, where the key is left out


def read_common(
    reader: ConfigReader,
    *,
    default_head_dim: int | None = None,
    default_kv_heads: int | None = None,
    default_theta: float = 10000.0,
    default_eps: float = 1e-6,
) -> dict[str, Any]:
    """Fields of `ModelConfig` that every family's configuration holds.

    Args:
      reader: the whole configuration; the keys read here count as used.
      default_head_dim: what the family's configuration class takes without `head_dim`; None is hidden size / heads.
      default_kv_heads: the same for `num_key_value_heads`; None is all heads, and so is a key set to null.
      default_theta, default_eps: the same for `rope_theta` and `rms_norm_eps`.

    Returns:
      Keyword arguments of `ModelConfig`.

    Raises:
      ModelError: a missing key, a wrong type, or an unsupported value.
    """
    reader.require("hidden_act", ["silu"], "silu")
    hidden_size, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    max_positions = reader.integer("max_position_embeddings")
    if default_head_dim is None and not reader.has("head_dim") and (heads < 1 or hidden_size % heads):
        raise reader.error("hidden_size", f"is {hidden_size}; a multiple of num_attention_heads ({heads}) is expected")
    kv_heads = heads if default_kv_heads is None or reader.mentions("num_key_value_heads") else default_kv_heads
    return {
        "family": reader.text("model_type"),
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_layers": reader.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.integer("num_key_value_heads", kv_heads),
        "head_dim": reader.integer("head_dim", default_head_dim or hidden_size // max(heads, 1)),
        "rms_norm_eps": reader.number("rms_norm_eps", default_eps),
        "rope": read_rope(reader, max_positions, default_theta),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "bos_token_id": reader.integer("bos_token_id") if reader.has("bos_token_id") else None,
        "eos_token_ids": reader.integers("eos_token_id"),
    }


def read_window(reader: ConfigReader, default: int | None) -> int | None:
    """`sliding_window` in tokens: null is none, and `default` is what a file without the key means."""
    if not reader.mentions("sliding_window"):
        return default
    return reader.integer("sliding_window") if reader.has("sliding_window") else None


def read_switched_window(reader: ConfigReader) -> int | None:
    """`sliding_window` where `use_sliding_window` turns it on, else None."""
    window = read_window(reader, DEFAULT_WINDOW)
    return window if reader.boolean("use_sliding_window", False) else None


def read_layer_windows(reader: ConfigReader, window: int | None, first: int = 0) -> tuple[int | None, ...]:
    """`ModelConfig.layer_windows`: as `layer_types` says, and without it, `window` from layer `first` on.

    Args:
      reader: the whole configuration.
      window: in tokens, or None if the model has none.
      first: layers before it attend to everything.

    Raises:
      ModelError: another kind of layer, or not one for each layer.
    """
    layers = reader.integer("num_hidden_layers")
    kinds = reader.raw("layer_types", None)
    if kinds is None:
        # Bounded: the number of layers is checked later, with all sizes.
        kinds = [FULL if window is None or i < first else SLIDING for i in range(min(layers, MAX_COUNT))]
    else:
        known = [FULL] if window is None else [FULL, SLIDING]
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            reason = " (there is no sliding_window)" if window is None else ""
            raise reader.error("layer_types", f"is {kinds!r}; supported: a list of {' and '.join(known)}{reason}")
        if len(kinds) != layers:
            raise reader.error("layer_types", f"has {len(kinds)} entries; num_hidden_layers is {layers}")
    return tuple(window if kind == SLIDING else None for kind in kinds) if SLIDING in kinds else ()


def read_moe(reader: ConfigReader) -> MoEConfig:
    """A mixture of experts in the keys of Qwen3-MoE; raises `ModelError` for what is not supported."""
    return MoEConfig(
        num_experts=_read_num_experts(reader),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        intermediate_size=reader.integer("moe_intermediate_size"),
        norm_topk_prob=reader.boolean("norm_topk_prob", False),
        decoder_sparse_step=reader.integer("decoder_sparse_step", 1),
        mlp_only_layers=reader.integers("mlp_only_layers"),
    )


def _read_num_experts(reader: ConfigReader) -> int:
    """`num_experts` in transformers 4, `num_local_experts` in transformers 5."""
    if not reader.has("num_local_experts"):
        return reader.integer("num_experts")
    count = reader.integer("num_local_experts")
    if reader.integer("num_experts", count) != count:
        raise reader.error("num_experts", f"is {reader.integer('num_experts')}, but num_local_experts is {count}")
    return count


def write_moe(moe: MoEConfig) -> dict[str, Any]:
    """The inverse of `read_moe`."""
    return {
        "decoder_sparse_step": moe.decoder_sparse_step,
        "mlp_only_layers": list(moe.mlp_only_layers),
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
    }


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window`, and `layer_types` where only some layers have it.

    Raises:
      ValueError: layers with windows of different sizes, which the format cannot express.
    """
    sizes = {window for window in config.layer_windows if window is not None}
    if len(sizes) > 1:
        raise ValueError(f"layer_windows has sizes {sorted(sizes)}; a {config.family} checkpoint has one")
    keys: dict[str, Any] = {"sliding_window": min(sizes, default=None)}
    if sizes and None in config.layer_windows:
        keys["layer_types"] = [FULL if window is None else SLIDING for window in config.layer_windows]
    return keys


def write_switched_windows(config: ModelConfig) -> dict[str, Any]:
    """`write_windows` for families with `use_sliding_window`.

    `max_window_layers` says it to versions of transformers that do not know `layer_types`.
    """
    windowed = [layer for layer, window in enumerate(config.layer_windows) if window is not None]
    keys = write_windows(config) | {"use_sliding_window": bool(windowed)}
    return keys | ({"max_window_layers": windowed[0]} if windowed else {})


def write_common(config: ModelConfig, *, uneven: bool = False) -> dict[str, Any]:
    """The inverse of `read_common`, in the spelling that transformers 4 and 5 both read.

    Args:
      config: to write.
      uneven: the family's format has a width for each layer and packed weights, which the caller writes.

    Raises:
      ValueError: a width for each layer, or packed weights, and a format without.
    """
    if not uneven:
        require_equal(config, layer_intermediate_sizes=(), packed=None)
    eos: int | list[int] | None = list(config.eos_token_ids)
    if len(config.eos_token_ids) <= 1:
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _write_rope_scaling(config.rope),
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }


def _write_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.type, "factor": rope.factor}
    if rope.type != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return scaling


def require_equal(config: ModelConfig, **expected: Any) -> None:
    """Refuse to write a configuration whose fields differ from what the family's format implies.

    Raises:
      ValueError: naming field, value and the expected one.
    """
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field} is {getattr(config, field)!r}; a {config.family} checkpoint means {value!r}")
