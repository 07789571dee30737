"""The agents of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxdual.config import ConfigError
from jaxdual.offline.trace import Session
from jaxdual.offline.trace_files import read_sessions
from jaxdual.offline.trace_scaling import limit_turns, scale_work, with_agents
from jaxdual.offline.trace_shapes import TRAJECTORIES, generate_sessions
from jaxdual.offline.trace_starts import poisson_starts, timestamp_starts
from jaxdual.scheduling.path_modes import MODES
from jaxdual.sim.config import SimConfig


def sessions_of(config: SimConfig) -> list[Session]:
    """What each agent does.

    Raises:
      ConfigError: a prompt is too long for a decode engine.
      TraceError: the trace can't be read.
    """
    spec = config.workload
    if spec.trace is None:
        count = TRAJECTORIES if spec.agents is None else min(spec.agents, TRAJECTORIES)
        sessions = generate_sessions(spec.max_len.lower(), count, config.seed)
    else:
        sessions = read_sessions(Path(spec.trace))
    if spec.turns is not None:
        sessions = limit_turns(sessions, spec.turns)
    if (spec.append_scale, spec.generation_scale) != (1.0, 1.0):
        sessions = scale_work(sessions, spec.append_scale, spec.generation_scale)
    if spec.agents is not None:
        sessions = with_agents(sessions, spec.agents, config.seed)
    _check_lengths(config, sessions)
    return sessions


def starts_of(config: SimConfig, sessions: Sequence[Session]) -> list[float]:
    """When each agent starts, in seconds.

    Raises:
      TraceError: by timestamps, and there is one missing.
    """
    rate, speed = config.workload.arrivals_per_second, config.workload.speed
    if rate is not None:
        return poisson_starts(len(sessions), rate, config.seed)
    return [0.0] * len(sessions) if speed is None else timestamp_starts(sessions, speed)


def _check_lengths(config: SimConfig, sessions: Sequence[Session]) -> None:
    longest = max((length for session in sessions for length in session.prompt_lengths()), default=0)
    need = longest * config.model.kv_token_bytes
    mode = MODES[config.mode]
    for key, nbytes, wanted in (
        ("cluster.prefill_buffer", config.cluster.prefill_buffer, config.mode != "oracle"),
        ("cluster.decode_buffer", config.cluster.decode_buffer, config.mode != "oracle"),
        ("prefill.kv_bytes", config.prefill.kv_bytes, not mode.layerwise),
    ):
        if wanted and nbytes < need:
            raise ConfigError(f"{key}={nbytes:g} must be at least {need}: the longest prompt has {longest} tokens")
    capacity = int(config.decode.kv_bytes / config.model.kv_token_bytes)
    for session in sessions:
        for prompt, turn in zip(session.prompt_lengths(), session.turns, strict=True):
            if prompt + turn.generate > capacity:
                raise ConfigError(
                    f"decode.kv_bytes={config.decode.kv_bytes:g} hold {capacity} tokens: session {session.session_id} "
                    f"has a request of {prompt + turn.generate}"
                )
