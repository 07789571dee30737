"""The configuration keys that all families share, in the names of transformers."""

from typing import Any

from models.config import ModelConfig, RopeConfig
from models.config_reader import ConfigReader, read_rope


def read_common(reader: ConfigReader, *, default_head_dim: int | None = None) -> dict[str, Any]:
    """Fields of `ModelConfig` that every family's configuration holds.

    Args:
      reader: the whole configuration; the keys read here count as used.
      default_head_dim: what the family's configuration class takes without `head_dim`; None is hidden size / heads.

    Returns:
      Keyword arguments of `ModelConfig`.

    Raises:
      ModelError: a missing key, a wrong type, or an unsupported value.
    """
    reader.require("hidden_act", ["silu"], "silu")
    hidden_size, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    layers = reader.integer("num_hidden_layers")
    max_positions = reader.integer("max_position_embeddings")
    if default_head_dim is None and not reader.has("head_dim") and (heads < 1 or hidden_size % heads):
        raise reader.error("hidden_size", f"is {hidden_size}; a multiple of num_attention_heads ({heads}) is expected")
    kinds = reader.raw("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or kinds != ["full_attention"] * len(kinds)):
        raise reader.error("layer_types", f"is {kinds!r}; supported: a list of 'full_attention'")
    if kinds is not None and len(kinds) != layers:
        raise reader.error("layer_types", f"has {len(kinds)} entries; num_hidden_layers is {layers}")
    return {
        "family": reader.text("model_type"),
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": reader.integer("head_dim", default_head_dim or hidden_size // max(heads, 1)),
        "rms_norm_eps": reader.number("rms_norm_eps", 1e-6),
        "rope": read_rope(reader, max_positions, 10000.0),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "bos_token_id": reader.integer("bos_token_id") if reader.has("bos_token_id") else None,
        "eos_token_ids": reader.integers("eos_token_id"),
    }


def refuse_window(reader: ConfigReader) -> None:
    """Refuse a sliding window that is in use; `use_sliding_window` says so where the key exists."""
    in_use = reader.boolean("use_sliding_window", False)
    window = reader.raw("sliding_window", None)
    if in_use:
        raise reader.error("use_sliding_window", f"is true (sliding_window is {window!r}); windows are not supported")


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_common`, in the spelling that transformers 4 and 5 both read."""
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
