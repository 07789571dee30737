"""Reading `config.json` so that no key that could change the mathematics is overlooked."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.config import ROPE_TYPES, RopeConfig
from models.errors import ModelError

# Keys that transformers writes and that do not change the logits of a forward pass: bookkeeping, training settings,
# defaults of text generation (they belong to generation_config.json) and settings of other model classes.
HARMLESS = frozenset(
    {
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "finetuning_task",
        "hidden_dropout",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)

_MISSING = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in file `path`.

    Raises:
      ModelError: the file is missing, unreadable, not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}, an object is expected")
    return value


class ConfigReader:
    """Typed access to a JSON object that records which keys were used.

    A key set to null counts as absent. `finish` then refuses every key that nobody asked for, that is not known to be
    harmless, and that is set to something.

    Args:
      values: the JSON object.
      file: named in errors.
      prefix: the path of this object inside the file, for errors.
    """

    def __init__(self, values: Mapping[str, Any], file: Path | str, prefix: str = "") -> None:
        self._values = values
        self._file = file
        self._prefix = prefix
        self._used: set[str] = set()

    def error(self, key: str, problem: str) -> ModelError:
        """An error about `key`, for the caller to raise."""
        return ModelError(f"{self._file}: key '{self._prefix}{key}' {problem}")

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self._values.get(key) is not None

    def mentions(self, key: str) -> bool:
        """Whether `key` is present, null or not: some keys mean one thing when null and another when left out."""
        return key in self._values

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key` as it is; without a default the key is required."""
        self._used.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(key, "is missing")
        return default

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """An integer; ranges are the configuration's to check."""
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"is {value!r}; an integer is expected")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number."""
        value = self.raw(key, default)
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, f"is {value!r}; a finite number is expected")
        return number

    def boolean(self, key: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; true or false is expected")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self.raw(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r}; a string is expected")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers, one integer, or nothing."""
        value = self.raw(key, ())
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self.error(key, f"is {value!r}; an integer or a list of integers is expected")
        return tuple(items)

    def section(self, key: str) -> "ConfigReader | None":
        """The object under `key`, or None if it is absent."""
        value = self.raw(key, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; an object is expected")
        return ConfigReader(value, self._file, f"{self._prefix}{key}.")

    def require(self, key: str, accepted: Iterable[Any], default: Any) -> None:
        """Refuse any value of `key` but the accepted ones."""
        value = self.raw(key, default)
        accepted = list(accepted)
        # bool is an int in Python: 1 and true are different answers here.
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in accepted):
            names = ", ".join(json.dumps(item) for item in accepted)
            raise self.error(key, f"is {value!r}; supported: {names}")

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse keys that nobody read, that are not in `harmless` and that are set to something.

        Raises:
          ModelError: a key that may change the mathematics and is set.
        """
        for key, value in self._values.items():
            if key in self._used or key in harmless or key.startswith("_"):
                continue
            if value is None or value in ([], {}):
                continue
            shown = json.dumps(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise self.error(key, f"is {shown}; it is not known and may change the mathematics, so it is not supported")


def read_rope(reader: ConfigReader, max_position_embeddings: int, default_theta: float) -> RopeConfig:
    """Rotary settings in either spelling.

    transformers 4 has `rope_theta` and `rope_scaling` at the top; transformers 5 has one `rope_parameters` with all.

    Args:
      reader: the whole configuration.
      max_position_embeddings: the stretched context, which YaRN falls back to.
      default_theta: what the family's configuration class takes when no theta is written.
    """
    reader.require("partial_rotary_factor", [1.0], 1.0)
    parameters = reader.section("rope_parameters")
    scaling = reader.section("rope_scaling")
    top_theta = reader.number("rope_theta") if reader.has("rope_theta") else None
    if parameters is not None and scaling is not None:
        raise reader.error("rope_scaling", "and 'rope_parameters' are both set; one is expected")
    section = parameters if parameters is not None else scaling
    if section is None:
        return RopeConfig(theta=default_theta if top_theta is None else top_theta)
    theta = default_theta if top_theta is None else top_theta
    if section.has("rope_theta"):
        theta = section.number("rope_theta")
        if top_theta is not None and top_theta != theta:
            raise reader.error("rope_theta", f"is {top_theta}, but {section.number('rope_theta')} in the rope section")
    return _read_rope_section(section, theta, max_position_embeddings)


def _read_rope_section(section: ConfigReader, theta: float, max_position_embeddings: int) -> RopeConfig:
    kind = section.text("rope_type", section.text("type", "default"))
    section.text("type", kind)
    section.require("partial_rotary_factor", [1.0], 1.0)
    settings: dict[str, Any] = {"type": kind, "theta": theta}
    if kind not in ROPE_TYPES:
        raise section.error("rope_type", f"is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    if kind != "default":
        settings["factor"] = section.number("factor")
    if kind == "llama3":
        settings["original_max_position_embeddings"] = section.integer("original_max_position_embeddings")
        settings["low_freq_factor"] = section.number("low_freq_factor")
        settings["high_freq_factor"] = section.number("high_freq_factor")
    if kind == "yarn":
        settings["original_max_position_embeddings"] = section.integer(
            "original_max_position_embeddings", max_position_embeddings
        )
        settings["beta_fast"] = section.number("beta_fast", 32.0)
        settings["beta_slow"] = section.number("beta_slow", 1.0)
        settings["truncate"] = section.boolean("truncate", True)
        settings["attention_factor"] = _yarn_attention_factor(section, settings["factor"])
    if kind in ("default", "linear"):
        section.raw("original_max_position_embeddings", None)
    section.finish()
    return RopeConfig(**settings)


def _yarn_attention_factor(section: ConfigReader, factor: float) -> float | None:
    if section.has("attention_factor"):
        return section.number("attention_factor")
    # DeepSeek's form: the ratio of two magnitude scales.
    mscale, mscale_all = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    if not (mscale and mscale_all):
        return None
    if mscale < 0 or mscale_all < 0:
        key, value = ("mscale", mscale) if mscale < 0 else ("mscale_all_dim", mscale_all)
        raise section.error(key, f"is {value}; at least 0 is expected")
    if factor <= 1.0:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all * math.log(factor) + 1.0)
