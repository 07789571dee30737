"""Decoder models in Flax nnx: configuration, layers, and weights in the Hugging Face layout."""

from models.checkpoint import init, load, save
from models.config import IHAConfig, ModelConfig, MoEConfig, RopeConfig
from models.decoder import Decoder
from models.errors import ModelError
from models.families import load_config, pruned_form, to_hf
from models.generation import GenerationConfig, load_generation_config
from models.hub import resolve

__all__ = [
    "Decoder",
    "GenerationConfig",
    "IHAConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelError",
    "RopeConfig",
    "init",
    "load",
    "load_config",
    "load_generation_config",
    "pruned_form",
    "resolve",
    "save",
    "to_hf",
]
