"""Configurations of engines, clusters and servers; `config_sources` makes them from flags, environment and files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

MAX_QUEUED_REQUESTS = 256
_LEAST_SECRET = 16  # characters
DTYPES = ("auto", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A setting that can't be used; the message names it, its value and what is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Names are vLLM's where the meaning is the same.

    Sequences, tokens and pages are those of a rank, where data or expert parallelism make several; memory in bytes is
    that of each device.

    Attributes:
      model: folder in Hugging Face layout, or a hub name; None for the model that ships with jaxdual.
      served_model_name: name in responses; the hub name, or the folder's own name, if None.
      dtype: of weights, activations and KV cache; "auto" is float32 on a CPU, else the checkpoint's.
      load_format: "auto" reads the checkpoint; "dummy" draws random weights, for measurements: the folder needs no more
        than a config.json, and `dtype` "auto" is bfloat16 where it would be the checkpoint's.
      max_model_len: tokens of prompt and output together; None for what the model was made for (at most 8192 on a CPU).
      block_size: tokens of a KV page, which is also the unit of prefix sharing.
      max_num_seqs: sequences that run at once.
      max_num_batched_tokens: tokens computed in a step.
      prefill_beside_decode: prompt tokens computed in a step that also decodes; more starts prompts sooner, less keeps
        running outputs even. None for 128 on a CPU, elsewhere as many as `max_num_batched_tokens` leaves.
      num_kv_blocks: pages of KV memory; None to derive it from the memory settings below.
      kv_cache_memory_bytes: bytes of KV memory; None for `gpu_memory_utilization` of a GPU, or on a CPU what
        `max_num_seqs` sequences of full length need, up to 1 GiB.
      gpu_memory_utilization: part of a GPU's memory that weights and KV memory may take together.
      host_cache_bytes: bytes of host memory that hold evicted and swapped blocks.
      kv_store: where full blocks of KV memory are kept and read from again: a folder or "s3://bucket/prefix", which
        outlive the engine, or "memory:", which does not; None for nowhere.
      kv_store_capacity_bytes: of the store; what was used least lately makes room. Required with `kv_store`.
      kv_staging_bytes: bytes of host memory that blocks come through on their way from and to the store; None for what
        two sequences of full length need, at least 64 MiB.
      kv_transport: carrier of KV blocks between the engines of a cluster: "shm" on one machine, "tcp" anywhere, "verbs"
        by RDMA; None for "shm" in a cluster on one machine, "tcp" in a Ray cluster, and none in an engine by itself.
      kv_host: address at which engines take blocks over "tcp" and "verbs"; None for that of the host in a Ray cluster,
        else 127.0.0.1.
      kv_secret: what engines must know to write blocks into each other's memory over these, 16 characters or more; None
        for one that the cluster draws.
      kv_store_read_only: reads blocks of the store and adds none, as prefill engines of a cluster do, since the engines
        that go on from their prompts store these.
      kv_load_timeout: seconds that a request waits for stored blocks before it goes on without them.
      kv_landing: how blocks come from host memory into KV memory: "scatter" by a program; "direct" by a copy straight
        to its address, which is there on a CPU only, and faster.
      enable_prefix_caching: shares blocks of equal prefixes between requests.
      scheduling_policy: who is next of those that wait, within a priority: "fcfs" first come, first served; "sjf" the
        shortest prompt, but whoever has waited for `theta_age` before all others; "sjf_rolling" the same with a limit
        of 0.9 of the latest requests' 99th percentile of TTFT; "sjf_linear" by length, 600 tokens less for each second.
      theta_age: seconds after which a request goes before shorter ones, under "sjf"; inf for never.
      preemption_mode: "recompute" or "swap", for sequences that must give way.
      tensor_parallel_size: devices that share each layer: attention by key-value heads, MLPs by their width.
      expert_parallel_size: devices that share the experts of each layer; each has sequences and KV memory of its own.
      data_parallel_size: how often all of that is repeated, on devices of its own with sequences of its own.
      num_processes: that these devices are spread over, evenly: on several machines, or to use several processes of
        one. The engine's own is the first.
      coordinator_address: "host:port" at which the engine waits for the other processes, `python -m jaxdual.follower`,
        and JAX's coordinator at the port after it; None starts them on this machine.
      join_timeout: seconds in which all processes must have come.
      redundant_experts: slots of each layer beyond one for each expert, for further copies of some.
      expert_placement: where the experts of each layer lie, decided anew every `expert_interval` steps: "linear" in
        order, for ever; "eplb" so that loads are balanced; "edr" Algorithm 3 of arXiv 2602.21626, which pins experts
        that follow each other on one device and balances the others, "edr_column" with one assignment for all layers;
        "source" near the sequences that choose them; "metro" so that as many experts are at work on each device.
      expert_profile: file of `python -m jaxdual.routers` that the first placement of all but "linear" and "source" is
        made of while loading, and that says what "edr" and "edr_column" pin; of the same model in the same number type.
        None for experts in order at first, and for the first window to say what is pinned.
      expert_anchor: the device, of those that share the experts, that "edr" and "edr_column" pin experts on.
      expert_interval: steps between two relocations.
      expert_window: steps whose choices a relocation looks at.
      router_statistics: what is counted of the routers' choices: "off", "activations" of experts, or also "transitions"
        between neighbouring layers; None for what `expert_placement` needs.
      probe: file of a P(IK) probe of the model, as `python -m jaxdual.cascade train` writes it, which gates of requests
        ask; None for none. It takes part of the KV memory: a row of the hidden size for each token.
      dysco_profile: heads and limits of the requests that are decoded by DySCO and name neither: a profile that ships
        with jaxdual, or a file; what it needs is compiled with all else, while otherwise the first such request waits
        for it. None for the profile of the model's name.
      dysco_requests: what requests may ask of DySCO: "any" heads, profile and mode; only what `dysco_profile` has
        "compiled", so that none keeps others waiting for a compiler; or "none".
      dispatch_policy: which of the data and expert parallel ranks gets a request: "rr" in turn; "vllm_counts" the one
        with the fewest requests; "gimbal" Algorithm 1 of arXiv 2602.21626 as printed, "gimbal_relaxed" with its load
        rule also below saturation; "score" the best sum of cached prefix, load and KV memory.
      theta_kv: KV usage from which "gimbal" takes a rank for saturated.
      theta_diff: difference of KV usages from which "gimbal" avoids the fuller rank.
      theta_load: difference of loads, in tokens, above which "gimbal" avoids the busier rank.
      user_ttl: seconds from a user's last request within which "gimbal" sends the next to the same rank; inf for ever.
      async_scheduling: plans the next step while the device works on this one; False is the plain loop that it must
        agree with.
      compile_ahead: whether an engine's process compiles all padded shapes from its start on, between requests; False
        leaves each to the first step that needs it: the process has less to do, and single requests wait longer.
      seed: of the seeds drawn for requests that bring none; None for a random one.
      compilation_cache_dir: JAX's persistent compilation cache; None for `$JAX_COMPILATION_CACHE_DIR`, else
        `jaxdual/xla` in the user's cache folder; "" for none.
    """

    model: str | None = None
    served_model_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: int | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefill_beside_decode: int | None = None
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    host_cache_bytes: int = 0
    kv_store: str | None = None
    kv_store_capacity_bytes: int | None = None
    kv_staging_bytes: int | None = None
    kv_transport: Literal["shm", "tcp", "verbs"] | None = None
    kv_host: str | None = None
    kv_secret: str | None = None
    kv_store_read_only: bool = False
    kv_load_timeout: float = 10.0
    kv_landing: Literal["scatter", "direct"] = "scatter"
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "sjf", "sjf_rolling", "sjf_linear"] = "fcfs"
    theta_age: float = 5.0
    preemption_mode: Literal["recompute", "swap"] = "recompute"
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    data_parallel_size: int = 1
    num_processes: int = 1
    coordinator_address: str | None = None
    join_timeout: float = 300.0
    redundant_experts: int = 0
    expert_placement: Literal["linear", "eplb", "edr", "edr_column", "source", "metro"] = "linear"
    expert_profile: str | None = None
    expert_anchor: int = 0
    expert_interval: int = 3000
    expert_window: int = 1000
    router_statistics: Literal["off", "activations", "transitions"] | None = None
    probe: str | None = None
    dysco_profile: str | None = None
    dysco_requests: Literal["any", "compiled", "none"] = "any"
    dispatch_policy: Literal["rr", "vllm_counts", "gimbal", "gimbal_relaxed", "score"] = "vllm_counts"
    theta_kv: float = 0.9
    theta_diff: float = 0.10
    theta_load: int = 3000
    user_ttl: float = 600.0
    async_scheduling: bool = True
    compile_ahead: bool = True
    seed: int | None = None
    compilation_cache_dir: str | None = None

    def __post_init__(self) -> None:
        _read_types(self)
        for name, low in (
            ("max_model_len", 1),
            ("block_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("prefill_beside_decode", 1),
            ("num_kv_blocks", 1),
            ("kv_cache_memory_bytes", 1),
            ("host_cache_bytes", 0),
            ("kv_store_capacity_bytes", 1),
            ("kv_staging_bytes", 1),
            ("tensor_parallel_size", 1),
            ("expert_parallel_size", 1),
            ("data_parallel_size", 1),
            ("num_processes", 1),
            ("redundant_experts", 0),
            ("expert_anchor", 0),
            ("expert_interval", 1),
            ("expert_window", 1),
            ("theta_load", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value} must be at least {low}")
        if self.model == "":
            raise ConfigError("model='' must be a folder or a hub name")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, since each running sequence takes one token a step"
            )
        if (self.kv_store is None) != (self.kv_store_capacity_bytes is None):
            raise ConfigError("kv_store and kv_store_capacity_bytes must be given together")
        if self.kv_store is not None and not self.enable_prefix_caching:
            raise ConfigError("kv_store needs enable_prefix_caching: stored blocks are found by their prefix")
        if self.kv_secret is not None and len(self.kv_secret) < _LEAST_SECRET:
            raise ConfigError(f"kv_secret of {len(self.kv_secret)} characters; at least {_LEAST_SECRET} are needed")
        if not 0 < self.kv_load_timeout < float("inf"):
            raise ConfigError(f"kv_load_timeout={self.kv_load_timeout} must be above 0 seconds")
        self._check_experts()
        self._check_processes()
        for name in ("theta_kv", "theta_diff"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if self.needs_kv_agent and self.num_ranks > 1:
            setting = "kv_store" if self.kv_store is not None else "kv_transport"
            raise ConfigError(
                f"{setting} needs an engine with one rank: data_parallel_size={self.data_parallel_size} and "
                f"expert_parallel_size={self.expert_parallel_size} must be 1"
            )
        if self.kv_landing == "direct" and self.num_devices > 1:
            raise ConfigError(f'kv_landing="direct" writes to one device, and this engine has {self.num_devices}')
        if not self.theta_age > 0:
            raise ConfigError(f"theta_age={self.theta_age} must be above 0 seconds")
        if not self.user_ttl >= 0:
            raise ConfigError(f"user_ttl={self.user_ttl} must be at least 0 seconds")
        if self.preemption_mode == "swap" and not self.host_cache_bytes:
            raise ConfigError('preemption_mode="swap" needs host_cache_bytes above 0')

    def _check_processes(self) -> None:
        for name in ("coordinator_address", "join_timeout"):
            self._refuse_unused(name, self.num_processes > 1, "num_processes above 1")
        if not 0 < self.join_timeout < float("inf"):
            raise ConfigError(f"join_timeout={self.join_timeout} must be above 0 seconds")
        if self.coordinator_address is not None:
            host_and_port(self.coordinator_address)
        if self.num_devices % self.num_processes:
            raise ConfigError(f"num_processes={self.num_processes} must divide the {self.num_devices} devices")
        if self.num_processes == 1:
            return
        for setting in ("kv_store", "kv_transport", "host_cache_bytes"):
            if getattr(self, setting):
                raise ConfigError(
                    f"{setting}={getattr(self, setting)!r}: blocks leave the devices of an engine of one process only, "
                    f"and num_processes={self.num_processes}"
                )

    def _check_experts(self) -> None:
        if self.expert_placement != "linear" and self.expert_window > self.expert_interval:
            raise ConfigError(
                f"expert_window={self.expert_window} must be at most expert_interval={self.expert_interval}"
            )
        self._refuse_unused("dispatch_policy", self.num_ranks > 1, "several data or expert parallel ranks")
        for name in ("theta_kv", "theta_diff", "theta_load", "user_ttl"):
            self._refuse_unused(name, self.dispatch_policy.startswith("gimbal"), 'dispatch_policy="gimbal"')
        self._refuse_unused("theta_age", self.scheduling_policy == "sjf", 'scheduling_policy="sjf"')
        self._refuse_unused(
            "expert_interval", self.expert_placement != "linear", "another expert_placement than linear"
        )
        self._refuse_unused("expert_window", self.counted_of_routers != "off", "router_statistics")
        if self.kv_transport is not None and self.router_statistics not in (None, "off"):
            raise ConfigError(f"router_statistics={self.router_statistics!r} are those of an engine by itself")
        pinned = self.expert_placement in ("edr", "edr_column")
        self._refuse_unused(
            "expert_profile",
            pinned or self.expert_placement in ("eplb", "metro"),
            'expert_placement="eplb", "metro", "edr" or "edr_column"',
        )
        self._refuse_unused("dysco_profile", self.dysco_requests != "none", 'dysco_requests other than "none"')
        if self.dysco_requests == "compiled" and self.dysco_profile is None:
            raise ConfigError("dysco_requests='compiled' needs dysco_profile")
        self._refuse_unused("expert_anchor", pinned, 'expert_placement="edr" or "edr_column"')
        if self.expert_placement != "linear" and self.expert_parallel_size == 1:
            raise ConfigError(f"expert_placement={self.expert_placement!r} needs expert_parallel_size above 1")
        if self.expert_anchor >= self.expert_parallel_size:
            raise ConfigError(
                f"expert_anchor={self.expert_anchor} must be below expert_parallel_size={self.expert_parallel_size}"
            )
        if self.redundant_experts and self.expert_placement not in ("linear", "eplb", "metro"):
            raise ConfigError(
                f"redundant_experts={self.redundant_experts} have no use under "
                f"expert_placement={self.expert_placement!r}"
            )
        if self.counted_of_routers == "off" and self.expert_placement != "linear":
            raise ConfigError(f'router_statistics="off": expert_placement={self.expert_placement!r} needs them')
        if pinned and self.counted_of_routers != "transitions":
            raise ConfigError(f'expert_placement={self.expert_placement!r} needs router_statistics="transitions"')

    def _refuse_unused(self, name: str, used: bool, needs: str) -> None:
        (field,) = (field for field in fields(self) if field.name == name)
        if not used and getattr(self, name) != field.default:
            raise ConfigError(f"{name}={getattr(self, name)!r} needs {needs}")

    @property
    def counted_of_routers(self) -> Literal["off", "activations", "transitions"]:
        """`router_statistics`, or what the placement needs."""
        if self.router_statistics is not None:
            return self.router_statistics
        if self.expert_placement == "linear":
            return "off"
        return "transitions" if self.expert_placement in ("edr", "edr_column") else "activations"

    @property
    def num_ranks(self) -> int:
        """Parts of the engine that have sequences of their own."""
        return self.data_parallel_size * self.expert_parallel_size

    @property
    def num_devices(self) -> int:
        """Devices that the engine runs on."""
        return self.num_ranks * self.tensor_parallel_size

    @property
    def devices_per_process(self) -> int:
        return self.num_devices // self.num_processes

    @property
    def shares_kv_store(self) -> bool:
        """Whether other engines find the blocks that this one stores."""
        return self.kv_store is not None and not self.kv_store.startswith("memory:")

    @property
    def needs_kv_agent(self) -> bool:
        """Whether KV blocks go to or come from anywhere else."""
        return self.kv_store is not None or self.kv_transport is not None

    def check_alone(self) -> None:
        """Raises `ConfigError` if anything is set that only engines of a cluster have a use for."""
        if self.kv_transport is not None:
            raise ConfigError(
                f"kv_transport={self.kv_transport!r} needs a cluster: one engine sends no blocks to others"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """A configuration from names and values; unknown names are errors.

        Raises:
          ConfigError: an unknown name, or a value that can't be used.
        """
        refuse_unknown(values, (cls,))
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Engines that serve one model together, each in a process of its own.

    Attributes:
      prefill: engines that compute prompts; 0 for one engine that does everything.
      decode: engines that go on from them; 0 together with `prefill`.
      prefill_tensor_parallel_size: `tensor_parallel_size` of prefill engines; None for that of decode engines.
      cluster: where the engines run: "local" for this machine, "ray" for the hosts of a Ray cluster.
      path_mode: how a cluster with a store that its engines share moves stored blocks, as DualPath's paper compares it:
        "full" reads on the side with the shorter queue, "split" on both sides at once, "roundrobin" on either in turn,
        "layerwise" and "basic" on the prefill engine's, the latter without overlapping anything; "oracle" moves
        nothing, and gives tokens of no meaning, to measure how fast the rest is.
      prefill_layer_slots: layers whose keys and values a prefill engine holds at a time, in such a cluster: at least 3
        to load one, compute another and send a third away.
      prefill_kv_blocks: KV memory of a prefill engine in such a cluster, in Full Blocks; it holds more than that, but
        not all layers of each. None for as much as any engine has.
      compute_quota: seconds of attention that a prefill engine puts in one pass, in the modes "full", "split" and
        "oracle".
      storage_nic_rate: bytes per second, in each direction, of the network card that every engine reads stored blocks
        through. For measurements: it plays cards of this rate. None for as fast as it goes.
      compute_nic_rate: likewise of the card that an engine reaches its device and other engines through.
      least_layer_seconds: that a prefill engine's device takes for a layer. For measurements: it plays a slower one.
    """

    prefill: int = 0
    decode: int = 0
    prefill_tensor_parallel_size: int | None = None
    cluster: Literal["local", "ray"] = "local"
    path_mode: Literal["basic", "layerwise", "roundrobin", "full", "split", "oracle"] = "full"
    prefill_layer_slots: int = 3
    prefill_kv_blocks: int | None = None
    compute_quota: float = 0.3
    storage_nic_rate: float | None = None
    compute_nic_rate: float | None = None
    least_layer_seconds: float = 0.0

    def __post_init__(self) -> None:
        _read_types(self)
        if not self.prefill and not self.decode and self.cluster == "local":
            for field in fields(self):
                value = getattr(self, field.name)
                if value != field.default:
                    raise ConfigError(f"{field.name}={value!r} needs prefill and decode: one engine has no use for it")
        for name in ("prefill", "decode"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("prefill_tensor_parallel_size", "prefill_layer_slots", "prefill_kv_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        for name in ("compute_quota", "storage_nic_rate", "compute_nic_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be above 0")
        if not 0 <= self.least_layer_seconds < float("inf"):
            raise ConfigError(f"least_layer_seconds={self.least_layer_seconds} must be at least 0")
        if bool(self.prefill) != bool(self.decode):
            raise ConfigError(f"prefill={self.prefill} and decode={self.decode} must both be at least 1, or both 0")
        if self.cluster == "ray":
            if not self:
                raise ConfigError("cluster='ray' needs prefill and decode: it says where these engines run")
            for name in ("storage_nic_rate", "compute_nic_rate"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} plays network cards on one machine, and has no place in cluster='ray'")

    def __bool__(self) -> bool:
        """Whether there is more than one engine."""
        return self.prefill > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of a server beside those of its engine. Names are vLLM's where the meaning is the same.

    Attributes:
      host: address that both faces listen on.
      port: of HTTP; 0 for a free one.
      grpc_port: of gRPC; 0 for a free one.
      cascade: TOML file of the tiers that answer as one model, in place of `model`; None for one model.
      max_queued_requests: outputs that may wait for their turn beyond those that run; more are refused at the door.
      shutdown_timeout: seconds that running requests have to finish after SIGTERM; 0 ends them at once.
      api_key: what clients must present, as a bearer token; None takes everybody.
      ssl_certfile: file of the certificate chain in PEM form, for both faces; None for no TLS.
      ssl_keyfile: file of its key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    cascade: str | None = None
    max_queued_requests: int = MAX_QUEUED_REQUESTS
    shutdown_timeout: float = 30.0
    api_key: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        _read_types(self)
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 65535]")
        if self.port and self.port == self.grpc_port:
            raise ConfigError(f"port={self.port} and grpc_port must be different")
        if self.max_queued_requests < 0:
            raise ConfigError(f"max_queued_requests={self.max_queued_requests} must be at least 0")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ConfigError(f"shutdown_timeout={self.shutdown_timeout} must be at least 0 seconds")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile must be given together")
        for name in ("ssl_certfile", "ssl_keyfile"):
            file = getattr(self, name)
            if file is not None and not os.access(file, os.R_OK):
                raise ConfigError(f"{name}={file!r} can't be read")
        if self.api_key == "" or self.host == "":
            raise ConfigError("host and api_key must not be empty")


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of a `coordinator_address`.

    Raises:
      ConfigError: it is none.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ConfigError(f"coordinator_address={address!r} must be HOST:PORT, with a port from 1 to 65534")
    return host.removeprefix("[").removesuffix("]"), int(port)


def refuse_unknown(values: Mapping[str, Any], kinds: Sequence[type]) -> None:
    """Raises `ConfigError` if a name is that of no setting of these configurations."""
    known = [field.name for kind in kinds for field in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(known)}")


def _read_types(config: Any) -> None:
    """Gives each field of a frozen configuration its own type, where it came as text."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = _typed(field.name, getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` says, read from text where it is text."""
    options = get_args(hint)
    if type(None) in options:
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name}={value!r} must be one of {', '.join(get_args(hint))}")
        return value
    try:
        if hint is bool:
            return (
                value
                if isinstance(value, bool)
                else {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            )
        if hint is str and isinstance(value, (str, Path)):
            return str(value)
        if hint in (int, float) and not isinstance(value, bool):
            number = hint(value)
            if number == value or isinstance(value, str):
                return number
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        pass
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    raise ConfigError(f"{name}={value!r} must be {kind}")
