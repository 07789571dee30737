"""What every run leaves beside its weights: ``metrics.json``, and the model card that is made of it."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import ModelConfig
from models.training.recipes import Recipe
from models.training.state import TrainState


def record(size: str, config: ModelConfig, recipe: Recipe, state: TrainState) -> dict[str, Any]:
    """What the metrics of all runs have: name of the model, configuration, recipe, what was done, where and when."""
    return {
        "size": size,
        "config": asdict(config),
        "recipe": asdict(recipe),
        "steps": state.step,
        "tokens": state.tokens,
        "train_cpu_minutes": round(state.cpu_seconds / 60, 1),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write_record(folder: Path, metrics: Mapping[str, Any], card: Callable[[Mapping[str, Any]], str]) -> None:
    """Writes ``metrics.json``, and ``README.md`` from it."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(metrics), encoding="utf-8")


def card_fields(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the cards of all models tell."""
    config = metrics["config"]
    return {
        "size": metrics["size"],
        "parameters": metrics["parameters"],
        "family": config["family"],
        "layers": config["num_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "feed_forward": f"{config['intermediate_size']} (SwiGLU)",
        "vocab": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "tokens": metrics["tokens"],
        "steps": metrics["steps"],
        "cpu_minutes": metrics["train_cpu_minutes"],
        "machine": metrics["machine"],
        "date": metrics["date"],
    }


def machine() -> str:
    """Architecture, and name of the CPU where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{platform.machine()}, {next(names, platform.processor())}"
