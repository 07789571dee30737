"""Which folder a configuration's model lies in, and what it is called."""

from __future__ import annotations

from pathlib import Path

import models
from jaxdual.config import EngineConfig

SHIPPED_MODEL = "base"


def shipped_model(name: str = SHIPPED_MODEL) -> Path:
    """Folder of a model that ships with jaxdual.

    Args:
      name: "small", "base", "moe" or "retrieval".

    Raises:
      ValueError: no model of that name.
    """
    root = Path(models.__file__).parent / "shipped"
    if not (root / name / "config.json").is_file():
        known = sorted(path.parent.name for path in root.glob("*/config.json"))
        raise ValueError(f"no model {name!r} ships with jaxdual; there are {known}")
    return root / name


def find_model(config: EngineConfig) -> tuple[Path, str]:
    """Folder and served name of the configured model; one named by its hub name is downloaded if need be.

    Raises:
      ModelError: no such model.
    """
    folder = shipped_model() if config.model is None else models.resolve(config.model)
    given = None if config.model is None or Path(config.model).expanduser().is_dir() else config.model
    return folder, config.served_model_name or given or folder.resolve().name
