"""What a simulation is of: a TOML file, and settings over it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from jaxdual.config import ConfigError
from jaxdual.scheduling.capacity import NodeRates
from jaxdual.scheduling.path_modes import MODES
from jaxdual.scheduling.quota import AttentionShape, GroupedAttention, SparseLatentAttention

type Count = Annotated[int, Meta(ge=1)]
type Whole = Annotated[int, Meta(ge=0)]
# Finite: what takes for ever is no time, and what is endless no rate.
type Above = Annotated[float, Meta(gt=0, le=1e30)]
type AtLeast = Annotated[float, Meta(ge=0, le=1e30)]
type MaxLen = Literal["32K", "48K", "64K"]
type Share = Annotated[float, Meta(ge=0, lt=1)]


MAX_LENS: tuple[str, ...] = get_args(MaxLen.__value__)


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ClusterSpec(_Section, frozen=True, kw_only=True):
    """Nodes, all of the same hardware (DualPath 7.1); rates in bytes per second.

    Attributes:
      prefill_nodes, decode_nodes: P and D.
      gpus: g, of a node, each an engine with a compute NIC.
      prefill_group_nodes, decode_group_nodes: nodes whose engines fetch work together; those of prefill nodes compute
        in lock step, too, where the model is expert-parallel.
      nic: B, of a compute NIC in each direction, as its host's memory sees it.
      snic: of a node's storage NIC in each direction.
      dram: M, of a node's memory, both directions together.
      collective_share: part of the compute NICs' time that collectives take, to which KV yields.
      prefill_buffer, decode_buffer: bytes of a node's memory that KV passes through.
      copy_seconds: to submit the copy of one Layer Block.
      fetch_seconds: between two fetches of a group; groups take turns.
    """

    prefill_nodes: Count
    decode_nodes: Count
    gpus: Count = 8
    prefill_group_nodes: Count = 1
    decode_group_nodes: Count = 1
    nic: Above = 50e9
    snic: Above = 50e9
    dram: Above = 500e9
    collective_share: Share = 0.0
    prefill_buffer: Above = 80e9
    decode_buffer: Above = 80e9
    copy_seconds: AtLeast = 1e-6
    fetch_seconds: Above = 0.1

    def node_rates(self) -> NodeRates:
        """For `scheduling.capacity`."""
        return NodeRates(self.gpus, self.nic, self.snic / self.nic, self.dram)


class GroupedSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="grouped"):
    """See `GroupedAttention`."""

    heads: Count
    head_dim: Count

    def shape(self, layers: int) -> AttentionShape:
        return GroupedAttention(layers, self.heads, self.head_dim)


class SparseLatentSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="sparse-latent"):
    """See `SparseLatentAttention`."""

    heads: Count
    indexer_heads: Count
    indexer_dim: Count
    top_k: Count
    key_dim: Count = 576
    value_dim: Count = 512

    def shape(self, layers: int) -> AttentionShape:
        return SparseLatentAttention(
            layers, self.heads, self.indexer_heads, self.indexer_dim, self.top_k, self.key_dim, self.value_dim
        )


class ModelSpec(_Section, frozen=True, kw_only=True):
    """A model.

    Attributes:
      layers: of attention.
      kv_token_bytes: of one token, all layers.
      active_parameters: that a token passes through.
      expert_parallel: whether the engines of a group wait for each other in every forward.
      attention: its work.
    """

    name: str
    layers: Count
    kv_token_bytes: Count
    active_parameters: Above
    expert_parallel: bool
    attention: SparseLatentSpec | GroupedSpec


class PrefillSpec(_Section, frozen=True, kw_only=True):
    """A prefill engine.

    Attributes:
      flops: operations per second of its matrix products, those of attention aside.
      attention_flops: of attention.
      pass_seconds: of any forward.
      item_seconds: more for each request of it.
      kv_bytes: memory for keys and values.
      batch_tokens: computed in a forward at most, where the quota does not limit it.
      quota_seconds: attention of a forward at most, in the modes that have a quota.
      min_chunk: tokens of a prompt that is cut at least.
    """

    flops: Above
    attention_flops: Above
    pass_seconds: AtLeast
    item_seconds: AtLeast = 0.0
    kv_bytes: Above
    batch_tokens: Count = 8192
    quota_seconds: Above = 0.3
    min_chunk: Count = 64


class DecodeSpec(_Section, frozen=True, kw_only=True):
    """A decode engine: its step takes `step_seconds + sequence_seconds * sequences + token_seconds * tokens`.

    Attributes:
      kv_bytes: memory for keys and values.
    """

    step_seconds: AtLeast
    sequence_seconds: AtLeast
    token_seconds: AtLeast = 0.0
    kv_bytes: Above


class SchedulerSpec(_Section, frozen=True, kw_only=True):
    """Constants of the path scheduler (DualPath A.4).

    Attributes:
      read_seconds: alpha: a node with more to read than it does in this time has a long queue.
      compute_seconds: beta: an engine with more than it does in this time gets nothing.
      block_tokens: of a Full Block.
    """

    read_seconds: Above = 3.0
    compute_seconds: Above = 5.0
    block_tokens: Count = 64


class WorkloadSpec(_Section, frozen=True, kw_only=True):
    """Agents and what they do.

    Attributes:
      max_len: which of the published sets is drawn from, where `trace` is not given.
      trace: a file, see `offline.trace_files`, in place of `max_len`; its path from the configuration's folder on.
      stored: whether the full blocks of first prompts are in the store already.
      agents: how many; None for those of the trace.
      turns: of an agent at most; None for all.
      append_scale, generation_scale: of the trace's lengths.
      arrivals_per_second: of agents, Poisson; None for all at once, or as `speed` says.
      speed: agents start by the trace's timestamps, so many times as fast.
    """

    max_len: MaxLen = "64K"
    trace: str | None = None
    stored: bool = False
    agents: Count | None = None
    turns: Count | None = None
    append_scale: Above = 1.0
    generation_scale: Above = 1.0
    arrivals_per_second: Above | None = None
    speed: Above | None = None


class SimConfig(_Section, frozen=True, kw_only=True):
    """A whole simulation.

    Attributes:
      mode: of the path scheduler, see `scheduling.path_modes`.
      seed: of all that is drawn.
      window_seconds: of the figures over time.
    """

    cluster: ClusterSpec
    model: ModelSpec
    prefill: PrefillSpec
    decode: DecodeSpec
    scheduler: SchedulerSpec = SchedulerSpec()
    workload: WorkloadSpec = WorkloadSpec()
    mode: Literal["basic", "layerwise", "roundrobin", "full", "split", "oracle"] = "full"
    seed: Whole = 0
    window_seconds: Above = 10.0


_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "": SimConfig,
    "cluster": ClusterSpec,
    "model": ModelSpec,
    "prefill": PrefillSpec,
    "decode": DecodeSpec,
    "scheduler": SchedulerSpec,
    "workload": WorkloadSpec,
}
_CHOICES = {
    "mode": tuple(MODES),
    "workload.max_len": MAX_LENS,
    "model.attention.kind": ("sparse-latent", "grouped"),
}


def read_sim_config(path: Path, settings: Sequence[str] = ()) -> SimConfig:
    """Reads a file and puts `section.key=value` over it; a value is TOML, or a bare word, of which `null` is nothing.

    A trace of the settings takes the place of the file's load: all of it is run, unless the settings say how many
    agents. So does a set that they name that of a file's trace. Paths of settings are from the working directory on.

    Raises:
      ConfigError: the file can't be read or has an unknown key or a bad value, or a setting is not one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for setting in settings:
        _put(values, setting)
    named = {setting.partition("=")[0].strip() for setting in settings}
    _choose_load(path, values.get("workload"), named)
    try:
        config = msgspec.convert(values, SimConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_in_keys(str(error))}") from None
    if not (config.decode.step_seconds or config.decode.sequence_seconds or config.decode.token_seconds):
        raise ConfigError(f"{path}: decode: step_seconds, sequence_seconds or token_seconds must be above 0")
    _check_together(path, config)
    if config.workload.trace is None:
        return config
    folder = Path.cwd() if "workload.trace" in named else path.parent
    trace = str(folder / config.workload.trace)
    return msgspec.structs.replace(config, workload=msgspec.structs.replace(config.workload, trace=trace))


def _put(values: dict[str, Any], setting: str) -> None:
    name, sign, text = setting.partition("=")
    *sections, key = name.strip().split(".")
    if not sign or not key or not all(sections):
        raise ConfigError(f"--set {setting!r} must be section.key=value, such as cluster.decode_nodes=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.strip() == "null" else text.strip()
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {setting!r}: {section} is not a section")
    values[key] = value


def _choose_load(path: Path, load: Any, named: set[str]) -> None:
    """Leaves one of a trace and a set: of the settings that are named, if there is one among them, else of the file."""
    if not isinstance(load, dict):
        return
    for key in [key for key, value in load.items() if value is None]:
        del load[key]  # what is nothing is left out
    if "workload.trace" in named and "trace" in load:
        replaced = {"max_len", "agents"}
    else:
        replaced = {"trace"} if "workload.max_len" in named else set()
    for key in replaced:
        if f"workload.{key}" not in named:
            load.pop(key, None)
    if {"trace", "max_len"} <= load.keys():
        raise ConfigError(f"{path}: workload.trace and workload.max_len are two loads: give one of them")


def _check_together(path: Path, config: SimConfig) -> None:
    """Refuses values that exclude each other."""
    load = config.workload
    if load.speed is not None and load.arrivals_per_second is not None:
        raise ConfigError(f"{path}: workload.speed and workload.arrivals_per_second both say when agents start")


def _in_keys(message: str) -> str:
    """`Expected ... - at `$.cluster.gpus`` the other way round, as the file names it."""
    expected, at, place = message.partition(" - at `$.")
    choices = _CHOICES.get(place.rstrip("`"))
    if "unknown field" in expected:
        section = _SECTIONS.get(place.rstrip("`"))
        choices = None if section is None else section.__struct_fields__
    if choices is not None:
        expected += f"; accepted are {', '.join(choices)}"
    return f"{place.rstrip('`')}: {expected[0].lower()}{expected[1:]}" if at else f"{expected[0].lower()}{expected[1:]}"
