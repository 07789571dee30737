"""Tiny models of random weights that speak the quiz's vocabulary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.training import quiz, tokenizer
from models.training.recipes import QUIZ_CONFIGS
from tests import seeded_models


def config(**fields: Any) -> ModelConfig:
    """Of the small quiz model, but for these fields."""
    return dataclasses.replace(QUIZ_CONFIGS["small"], **{"hidden_size": 16, "intermediate_size": 24, **fields})


def write(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A model folder with tokenizer and chat template."""
    made = config(**fields)
    seeded_models.write(made, folder, seed)
    tokenizer.save(quiz.build_tokenizer(), folder, made.max_position_embeddings)
    return folder
