"""Files that a command writes its results to: whether it can, before the work starts, and how."""

from __future__ import annotations

import os
from pathlib import Path

from jaxdual.config import ConfigError


def check_writable(path: Path) -> None:
    """Makes sure that a file can be written.

    Raises:
      ConfigError: it can't.
    """
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path}: cannot be written")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)


def check_picture(path: Path) -> None:
    """Makes sure that a picture can be drawn.

    Raises:
      ConfigError: matplotlib is not installed, or the file's ending is none of its formats.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'jaxdual[plot]'") from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ConfigError(f"--plot {path}: its ending must be one of {', '.join(sorted(known))}")
