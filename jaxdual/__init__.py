"""LLM serving on JAX: engine, scheduling, KV memory, Python API and batch jobs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdual.api import LLM
    from jaxdual.async_api import AsyncLLM
    from jaxdual.config import ConfigError, EngineConfig
    from jaxdual.decoding.dysco import DyscoParams
    from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError
    from jaxdual.outputs import (
        CompletionOutput,
        EngineInfo,
        EngineStats,
        Logprob,
        RequestMetrics,
        RequestOutput,
        SelectionStep,
    )
    from jaxdual.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "DyscoParams",
    "EngineConfig",
    "EngineDeadError",
    "EngineInfo",
    "EngineStats",
    "Logprob",
    "NotServingError",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SelectionStep",
]

# Imported when they are first asked for: a front process has no use for JAX, which takes seconds to import, and the
# engine none for the packages that carry messages.
_MODULES = {
    "LLM": "api",
    "AsyncLLM": "async_api",
    "ConfigError": "config",
    "DyscoParams": "decoding.dysco",
    "EngineConfig": "config",
    "EngineDeadError": "errors",
    "NotServingError": "errors",
    "QueueFullError": "errors",
    "SamplingParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'outputs')}"), name)


def __dir__() -> list[str]:
    return __all__
