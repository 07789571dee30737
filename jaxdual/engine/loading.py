"""Loads the configured model, with what every kind of engine needs to know of it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxdual.cascade.probe import Probe, load_probe
from jaxdual.cascade.work import LayerSizes
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.decoding.dysco import DyscoModel
from jaxdual.decoding.profiles import DyscoProfile
from jaxdual.decoding.profiles import read_profile as read_dysco_profile
from jaxdual.kv.layout import KVLayout
from jaxdual.model_folder import find_model
from jaxdual.outputs import EngineInfo
from jaxdual.parallel.mesh import DeviceMesh, ParallelSizes, claim_devices, device_mesh
from jaxdual.parallel.placement import first_placement, put_experts
from jaxdual.routers.profile import RouterProfile, read_profile
from jaxdual.sampling_params import MAX_STOP_TOKENS, RECOMMENDED_SAMPLING
from jaxdual.scheduling.expert_policies import ExpertPolicy, expert_policy
from jaxdual.scheduling.experts import Placement
from jaxdual.telemetry import CompileCounter
from models import Decoder, GenerationConfig, ModelConfig, init, load, load_config, load_generation_config
from models.fingerprint import model_fingerprint
from models.shapes import ShardingRule, active_parameters
from models.sharding import sharding_rule

if TYPE_CHECKING:
    from jaxdual.engine.followers import Followers, Leader

_CPU_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
      model: with its weights.
      layout: of its KV memory.
      max_model_len, max_chunk: tokens of the longest sequence, and of its longest chunk.
      eos_token_ids: its end-of-sequence tokens.
      identity: fingerprint of its weights and number type.
      info: what a front needs to know.
      load_seconds: time that loading took.
      compiles: counts compilations from before that on.
      mesh: of the devices that it lies on; None for one.
      placement: of its experts on them; None for a model without, or on one device.
      expert_policy: where they should be; None for where they are.
      dysco_layers: those that the configured profile for DySCO watches.
      probe: the configured one for P(IK).
      followers: the other processes that have loaded it, where there are some.
    """

    model: Decoder
    layout: KVLayout
    max_model_len: int
    max_chunk: int
    eos_token_ids: tuple[int, ...]
    identity: bytes
    info: EngineInfo
    load_seconds: float
    compiles: CompileCounter
    mesh: DeviceMesh | None = None
    placement: Placement | None = None
    expert_policy: ExpertPolicy | None = None
    dysco_layers: tuple[int, ...] = ()
    probe: Probe | None = None
    followers: Followers | None = None


def load_model(config: EngineConfig, leader: Leader | None = None) -> LoadedModel:
    """Loads the configured model; of several processes, all do.

    Args:
      leader: of the processes, in those that follow.

    Raises:
      ModelError: no such model, or its files can't be used.
      ConfigError: settings that don't fit the model, or processes that don't come.
      EngineDeadError: another process has ended.
    """
    claim_devices(config.devices_per_process)
    use_compilation_cache(config.compilation_cache_dir)
    compiles = CompileCounter()
    checked = _check(config)
    if leader is not None or config.num_processes == 1:
        return _load_model(config, checked, compiles, leader)
    from jaxdual.engine.joining import lead  # it speaks in messages that an engine by itself needs no package for

    followers = lead(config)
    try:
        return dataclasses.replace(_load_model(config, checked, compiles, followers), followers=followers)
    except BaseException:
        followers.close()
        raise


class _Checked(NamedTuple):
    """What is known of a configured model before any device is used."""

    folder: Path
    served_model_name: str
    model: ModelConfig
    generation: GenerationConfig
    sizes: ParallelSizes
    profile: RouterProfile | None
    policy: ExpertPolicy | None


def _check(config: EngineConfig) -> _Checked:
    sizes = ParallelSizes(config.data_parallel_size, config.expert_parallel_size, config.tensor_parallel_size)
    folder, served_model_name = find_model(config)
    model_config = load_config(folder)
    if config.counted_of_routers != "off" and not model_config.sparse_layers:
        raise ConfigError(f"router_statistics={config.counted_of_routers!r}: the model has no experts")
    if sizes.devices > 1 or config.redundant_experts:
        sizes.check(model_config, config.redundant_experts)
    profile = _read_profile(config, model_config)
    policy = expert_policy(
        config.expert_placement,
        config.expert_parallel_size,
        redundant=config.redundant_experts,
        anchor=config.expert_anchor,
        profile=None if profile is None else profile.window,
    )
    generation = load_generation_config(folder)
    return _Checked(folder, served_model_name, model_config, generation, sizes, profile, policy)


def _load_model(
    config: EngineConfig, checked: _Checked, compiles: CompileCounter, others: Leader | Followers | None
) -> LoadedModel:
    folder, served_model_name, model_config, generation, sizes, profile, policy = checked
    start = time.perf_counter()
    if others is not None:  # with the first use of a device, they wait for each other
        others.agree("configuration", hashlib.blake2b(repr(model_config).encode()).digest())
    max_model_len = _max_model_len(config, model_config)
    mesh = device_mesh(sizes) if sizes.devices > 1 or config.redundant_experts else None
    model = _model(config, folder, model_config, None if mesh is None else sharding_rule(mesh.mesh, mesh.rules))
    dtype = jnp.dtype(model.embedding[...].dtype)
    identity = model_fingerprint(folder, dtype.name, random_weights=config.load_format == "dummy")
    if profile is not None and profile.fingerprint != identity.hex():
        raise ConfigError(
            f"expert_profile={config.expert_profile!r} is of another model or number type than {folder} in {dtype.name}"
        )
    placement = None if mesh is None else first_placement(model_config, mesh, config.redundant_experts)
    if profile is not None and policy is not None:
        placement = policy(profile.window)
    if others is not None:  # from here on, they do everything together
        what = "model" if profile is None else "model or expert_profile"
        others.agree(what, _identity_with(identity, placement))
    if mesh is not None and placement is not None:
        put_experts(model, placement, mesh)
    load_seconds = time.perf_counter() - start

    layout = KVLayout.of_layers(
        [_window(model_config, layer, max_model_len) for layer in range(model_config.num_layers)],
        kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        page_size=config.block_size,
        dtype=dtype.name,
        itemsize=dtype.itemsize,
        every_head=() if model_config.iha is None else model_config.iha.layers,
    )
    eos_token_ids = generation.eos_token_ids or model_config.eos_token_ids
    if len(eos_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(
            f"{folder}: {len(eos_token_ids)} end-of-sequence tokens; at most {MAX_STOP_TOKENS} are supported"
        )
    refusal = _dysco_refusal(layout, model_config) or (
        "requests are not decoded so here" if config.dysco_requests == "none" else ""
    )
    dysco_profile = _dysco_profile(config, model_config, refusal, identity.hex())
    if others is not None and dysco_profile is not None:
        others.agree("dysco_profile", hashlib.blake2b(repr(dysco_profile).encode()).digest())
    probe = _probe(config, model_config, layout, identity.hex())
    info = EngineInfo(
        model_folder=str(folder),
        served_model_name=served_model_name,
        family=model_config.family,
        num_layers=model_config.num_layers,
        vocab_size=model_config.vocab_size,
        dtype=dtype.name,
        device=jax.devices()[0].device_kind,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs * sizes.ranks,
        block_size=config.block_size,
        fingerprint=identity.hex(),
        default_sampling=_default_sampling(generation),
        kv_layout=layout.fingerprint().hex(),
        kv_block_bytes=sum(layout.full_block_bytes(group) for group in range(len(layout.groups))),
        full_attention=len(layout.groups) == 1 and layout.groups[0].window is None,
        num_heads=model_config.num_heads,
        dysco_refusal=refusal,
        dysco_profile=dysco_profile,
        dysco_only_compiled=config.dysco_requests == "compiled",
        layer_sizes=LayerSizes.of(active_parameters(model_config), 0 if probe is None else probe.tap),
        gate_refusal=_gate_refusal(config),
    )
    return LoadedModel(
        model,
        layout,
        max_model_len,
        min(config.max_num_batched_tokens, max_model_len),
        tuple(eos_token_ids),
        identity,
        info,
        load_seconds,
        compiles,
        mesh,
        placement,
        policy,
        () if dysco_profile is None else dysco_profile.layers,
        probe,
    )


def _gate_refusal(config: EngineConfig) -> str:
    if config.kv_transport is not None:
        return "engines of a cluster hand prompts over, and don't judge them"
    return ""


def _probe(config: EngineConfig, model: ModelConfig, layout: KVLayout, fingerprint: str) -> Probe | None:
    """The probe that a configuration names, for an engine that can ask it."""
    if config.probe is None:
        return None
    refusal = _gate_refusal(config)
    if config.num_devices > 1 or config.redundant_experts:
        refusal = "prompts that may be refused are computed on one device"
    elif any(group.window is not None for group in layout.groups) or len(layout.groups) > 1:
        refusal = "the model has layers that don't see all tokens"
    elif config.counted_of_routers != "off":
        refusal = f"router_statistics={config.counted_of_routers!r} count whole passes"
    try:
        if refusal:
            raise ValueError(refusal)
        return load_probe(Path(config.probe), fingerprint, model.num_layers, model.hidden_size)
    except ValueError as error:
        raise ConfigError(f"probe={config.probe!r}: {error}") from None


def _dysco_refusal(layout: KVLayout, model: ModelConfig) -> str:
    if model.iha is not None:
        return "the model has Interleaved Head Attention, for which DySCO is not defined"
    if any(group.window is not None for group in layout.groups):
        return "the model has layers that don't see all tokens"
    return ""


def _dysco_profile(config: EngineConfig, model: ModelConfig, refusal: str, fingerprint: str) -> DyscoProfile | None:
    """The profile that a configuration names, for a model that it fits."""
    name = config.dysco_profile
    if name is None:
        return None
    try:
        if refusal:
            raise ValueError(refusal)
        profile = read_dysco_profile(name)
        DyscoModel("", model.num_layers, model.num_heads, fingerprint=fingerprint).check(profile, name)
    except ValueError as error:
        raise ConfigError(f"dysco_profile={name!r}: {error}") from None
    return profile


def _read_profile(config: EngineConfig, model: ModelConfig) -> RouterProfile | None:
    """The profile that a configuration names, whose sizes are those of the model."""
    if config.expert_profile is None:
        return None
    profile = read_profile(Path(config.expert_profile))
    layers, _, experts = profile.window.sources.shape
    wanted = len(model.sparse_layers), 0 if model.moe is None else model.moe.num_experts
    if (layers, experts) != wanted:
        raise ConfigError(
            f"expert_profile={config.expert_profile!r} is of {layers} layers of {experts} experts, and the model has "
            f"{wanted[0]} of {wanted[1]}"
        )
    if profile.window.transitions is None and config.expert_placement in ("edr", "edr_column"):
        raise ConfigError(
            f"expert_profile={config.expert_profile!r} has no transitions, which "
            f"expert_placement={config.expert_placement!r} needs"
        )
    return profile


def _identity_with(identity: bytes, placement: Placement | None) -> bytes:
    """Identifies a model whose experts lie so."""
    return identity if placement is None else hashlib.blake2b(identity + placement.experts.tobytes()).digest()


def use_compilation_cache(folder: str | None) -> None:
    """Turns on JAX's persistent compilation cache for programs of any size.

    Args:
      folder: where it lies; None for `$JAX_COMPILATION_CACHE_DIR`, else `jaxdual/xla` in the user's cache folder;
        "" leaves JAX's settings alone.
    """
    if folder == "":
        return
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(cache_home) / "jaxdual" / "xla")
    jax.config.update("jax_compilation_cache_dir", chosen)
    # JAX's defaults skip programs that compile in under a second, which is most of a small model's.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _model(config: EngineConfig, folder: Path, model: ModelConfig, sharding: ShardingRule | None) -> Decoder:
    if config.load_format == "auto":
        return load(folder, dtype=config.dtype, sharding=sharding)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return init(model, dtype=dtype if config.dtype == "auto" else config.dtype, sharding=sharding)


def _default_sampling(generation: GenerationConfig) -> dict[str, float]:
    values = {name: getattr(generation, name) for name in RECOMMENDED_SAMPLING}
    return {name: value for name, value in values.items() if value is not None}


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is None:
        return min(limit, _CPU_MODEL_LEN) if jax.default_backend() == "cpu" else limit
    if config.max_model_len > limit:
        raise ConfigError(f"max_model_len={config.max_model_len} must be at most {limit}, for which the model was made")
    return config.max_model_len


def _window(model: ModelConfig, layer: int, max_model_len: int) -> int | None:
    """Tokens that a query of a layer needs at most; if no sequence has more, it is full attention."""
    window = model.tokens_in_sight(layer)
    return None if window is None or window >= max_model_len else window
