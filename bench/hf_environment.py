"""The environment of the reference side: Python 3.11 with torch for the CPU and transformers, made on first use.

It is not jaxdual's own, since torch's CPU wheel for 3.11 and jaxdual's Python do not go together.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "safetensors", "numpy")
PYTHON_VERSION = "3.11"
_CHECK = "import torch, transformers; print(torch.__version__, transformers.__version__)"


class EnvironmentUnavailableError(RuntimeError):
    """The reference side can't run here; the message says why."""


def ensure(folder: Path, log: Callable[[str], None]) -> Path:
    """Python of the environment in `folder`, which is made if it is not there.

    Wheels come from where pip is configured to look; `PIP_EXTRA_INDEX_URL` can name an index with torch's CPU wheels,
    since PyPI's own bring CUDA along.

    Args:
      folder: of the environment.
      log: told what is done.

    Raises:
      EnvironmentUnavailableError: no Python 3.11 is found, or pip fails.
    """
    python = folder / "bin" / "python"
    marker = folder / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS) + "\n"
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted and _run([str(python), "-c", _CHECK]) is None:
        return python
    base = _find_python()
    log(f"making {folder} with {base}: {' '.join(REQUIREMENTS)} (about 1.2 GB)")
    for command in (
        [base, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS],
        [str(python), "-c", _CHECK],
    ):
        failure = _run(command)
        if failure is not None:
            raise EnvironmentUnavailableError(f"{' '.join(command)} failed: {failure}")
    marker.write_text(wanted, encoding="utf-8")
    return python


def _find_python() -> str:
    for candidate in _candidates():
        if (
            _run([candidate, "-c", f"import sys, venv, ensurepip; assert sys.version.startswith({PYTHON_VERSION!r})"])
            is None
        ):
            return candidate
    raise EnvironmentUnavailableError(f"no Python {PYTHON_VERSION} with venv on PATH or under ~/.pyenv/versions")


def _candidates() -> Iterator[str]:
    for found in (shutil.which(f"python{PYTHON_VERSION}"), shutil.which("python3")):
        if found:
            yield found
    yield from map(str, sorted(Path.home().glob(f".pyenv/versions/{PYTHON_VERSION}.*/bin/python3")))


def _run(command: list[str]) -> str | None:
    """Runs a command; None if it worked, else the end of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (
        None
        if done.returncode == 0
        else (done.stderr or done.stdout).strip()[-500:] or f"exit status {done.returncode}"
    )
