"""The families of models: which module knows a `model_type`, and reading and writing its `config.json`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from flax import nnx
from jax.typing import DTypeLike

from models import jaxdual_iha, jaxdual_pruned, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from models.config import ModelConfig
from models.config_reader import HARMLESS, ConfigReader, read_json
from models.errors import ModelError
from models.layers import DecoderLayer
from models.tensors import TensorSource, model_tensors


class BuildLayer(Protocol):
    """Builds decoder layer `index` with random weights."""

    def __call__(self, config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer: ...


@dataclass(frozen=True, slots=True)
class Family:
    """What a family's module supplies.

    Args:
      architecture: the class name that transformers writes under `architectures`.
      read: its configuration keys.
      write: the inverse of `read`, as a dictionary for `config.json`.
      build_layer: one decoder layer.
      layer_tensors: for layer `index`, where each parameter (dotted path within the layer) lies in a checkpoint.
    """

    architecture: str
    read: Callable[[ConfigReader], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    build_layer: BuildLayer
    layer_tensors: Callable[[ModelConfig, int], dict[str, TensorSource]]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "jaxdual_iha": Family(
            "JaxdualIHAForCausalLM",
            jaxdual_iha.read,
            jaxdual_iha.write,
            jaxdual_iha.build_layer,
            jaxdual_iha.layer_tensors,
        ),
        "jaxdual_pruned": Family(
            "JaxdualPrunedForCausalLM",
            jaxdual_pruned.read,
            jaxdual_pruned.write,
            jaxdual_pruned.build_layer,
            jaxdual_pruned.layer_tensors,
        ),
        "llama": Family("LlamaForCausalLM", llama.read, llama.write, llama.build_layer, llama.layer_tensors),
        "mistral": Family(
            "MistralForCausalLM", mistral.read, mistral.write, mistral.build_layer, mistral.layer_tensors
        ),
        "mixtral": Family(
            "MixtralForCausalLM", mixtral.read, mixtral.write, mixtral.build_layer, mixtral.layer_tensors
        ),
        "qwen2": Family("Qwen2ForCausalLM", qwen2.read, qwen2.write, qwen2.build_layer, qwen2.layer_tensors),
        "qwen3": Family("Qwen3ForCausalLM", qwen3.read, qwen3.write, qwen3.build_layer, qwen3.layer_tensors),
        "qwen3_moe": Family(
            "Qwen3MoeForCausalLM",
            qwen3_moe.read,
            qwen3_moe.write,
            qwen3_moe.build_layer,
            qwen3_moe.layer_tensors,
        ),
    }
)


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration.

    Raises:
      ModelError: the name is not in `FAMILIES`.
    """
    if config.family not in FAMILIES:
        raise ModelError(f"model family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def load_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder, in the spelling of transformers 4 or 5.

    Args:
      folder: holds `config.json`.

    Raises:
      ModelError: a missing file or key, a value of the wrong type or out of range, an unsupported `model_type`, or
        a key that may change the mathematics and is not supported; the message names file and key.
    """
    file = Path(folder) / "config.json"
    reader = ConfigReader(read_json(file), file)
    kind = reader.text("model_type")
    if kind not in FAMILIES:
        raise reader.error("model_type", f"is {kind!r}; supported: {', '.join(FAMILIES)}")
    try:
        config = FAMILIES[kind].read(reader)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None
    reader.finish(HARMLESS)
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `config`, which transformers 4 and 5 and `load_config` read.

    Raises:
      ModelError: an unsupported family.
      ValueError: a combination that the family's file format cannot express.
    """
    family = family_of(config)
    return {"architectures": [family.architecture], "model_type": config.family, **family.write(config)}


def pruned_form(config: ModelConfig) -> ModelConfig:
    """A configuration of the same mathematics that a checkpoint can hold.

    It is `config` where its own family's format expresses it, so that other programs read it, and otherwise of the
    family `jaxdual_pruned`: uneven widths, or biases where the family has none.

    Raises:
      ModelError: an unsupported family.
      ValueError: what no format expresses; the message names the field.
    """
    family = family_of(config)
    try:
        family.write(config)
    except ValueError:
        config = replace(config, family="jaxdual_pruned")
        to_hf(config)
    return config


def parameter_tensors(config: ModelConfig) -> dict[str, TensorSource]:
    """Where every parameter of a decoder (by dotted path) lies in a checkpoint."""
    layer_tensors = family_of(config).layer_tensors
    sources = model_tensors(config)
    for index in range(config.num_layers):
        for path, source in layer_tensors(config, index).items():
            sources[f"layers.{index}.{path}"] = source
    return sources
