"""LLM serving on JAX: engine, scheduling, KV memory, Python API and batch jobs."""

from jaxdual.api import LLM
from jaxdual.async_api import AsyncLLM
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.errors import EngineDeadError
from jaxdual.outputs import CompletionOutput, EngineStats, Logprob, RequestMetrics, RequestOutput
from jaxdual.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]
