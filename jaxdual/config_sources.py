"""The one place that makes configurations from flags, environment variables and files."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from jaxdual.config import ClusterConfig, ConfigError, EngineConfig, ServerConfig, refuse_unknown

ENVIRONMENT_PREFIX = "JAXDUAL_"
# All settings that flags of some program, variables and files may hold.
_KINDS = (EngineConfig, ClusterConfig, ServerConfig)


def add_arguments(parser: argparse.ArgumentParser, *kinds: type) -> None:
    """Adds a flag for every setting of `kinds`, and `--config FILE`.

    Values are checked by the configurations themselves, so that a bad one has the same message from a flag, a variable
    and a file.
    """
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings; flags and variables win over it")
    for kind in kinds:
        group = parser.add_argument_group(
            kind.__name__.removesuffix("Config").lower(),
            f"each setting can also come from an environment variable ({ENVIRONMENT_PREFIX}...) or --config",
        )
        hints = get_type_hints(kind)
        helps = _attribute_docs(kind)
        for field in fields(kind):
            flag = "--" + field.name.replace("_", "-")
            text = f"{helps[field.name]} (default: {field.default})".replace("%", "%%")
            if hints[field.name] is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
            else:
                group.add_argument(flag, default=None, metavar="VALUE", help=text)


def read_config[T](kind: type[T], namespace: argparse.Namespace, environment: Mapping[str, str] | None = None) -> T:
    """A configuration from flags (`add_arguments`), then `JAXDUAL_*` variables, then the file of `--config`.

    Variables and file may hold settings of other kinds too: one file serves every program.

    Raises:
      ConfigError: an unknown name, a value that can't be used, or an unreadable file.
    """
    environment = os.environ if environment is None else environment
    values = read_config_file(namespace.config) if namespace.config else {}
    refuse_unknown(values, _KINDS)
    known = {ENVIRONMENT_PREFIX + field.name.upper() for each in _KINDS for field in fields(each)}
    unknown = sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    if unknown:
        raise ConfigError(f"unknown environment variable {unknown[0]}; known are {', '.join(sorted(known))}")
    chosen: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        flag = getattr(namespace, field.name, None)
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        if flag is not None:
            chosen[field.name] = flag
        elif variable in environment:
            chosen[field.name] = environment[variable]
        elif field.name in values:
            chosen[field.name] = values[field.name]
    return kind(**chosen)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Settings of a TOML file; dashes in names stand for underscores.

    Raises:
      ConfigError: no such file, or not TOML.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def _attribute_docs(config: type) -> dict[str, str]:
    """The lines of a docstring's "Attributes:" part, by name."""
    docs: dict[str, str] = {}
    names = {field.name for field in fields(config)}
    current = None
    for line in (config.__doc__ or "").split("Attributes:")[-1].splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name in names:
            current = name
            docs[name] = text
        elif current and line.strip():
            docs[current] += " " + line.strip()
    return docs
