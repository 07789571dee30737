"""The devices that one engine runs on, as a mesh.

Axes: `data` and `expert` split the sequences, each device along them a *rank* with KV memory of its own; `expert` also
splits the experts of each layer, `data` repeats them; `tensor` splits attention heads and the width of MLPs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdual.config import ConfigError
from models import ModelConfig
from models.sharding import ShardingRules

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
RANKS = (DATA, EXPERT)


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """Devices along each axis of the mesh."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def ranks(self) -> int:
        """Groups of devices that have sequences of their own."""
        return self.data * self.expert

    def check(self, model: ModelConfig, redundant_experts: int = 0) -> None:
        """Raises `ConfigError` if a model can't be split so.

        Args:
          redundant_experts: slots of each layer beyond one for each expert.
        """
        if model.packed is not None and self.tensor > 1:
            raise ConfigError(f"tensor_parallel_size={self.tensor}: packed weights can't be divided, it must be 1")
        if model.num_kv_heads % self.tensor:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor} must divide the model's {model.num_kv_heads} key-value heads: "
                "each device has whole ones"
            )
        for layer in range(model.num_layers):
            width = model.intermediate_size_of(layer)
            if width % self.tensor and not model.is_sparse(layer):
                of_layer = f" in layer {layer}" if model.layer_intermediate_sizes else ""
                raise ConfigError(
                    f"tensor_parallel_size={self.tensor} must divide the model's intermediate_size of {width}{of_layer}"
                )
        moe = model.moe
        if moe is None or not model.sparse_layers:
            if self.expert > 1 or redundant_experts:
                setting = f"expert_parallel_size={self.expert}"
                if self.expert == 1:
                    setting = f"redundant_experts={redundant_experts}"
                raise ConfigError(f"{setting}: the model has no experts")
            return
        if (moe.num_experts + redundant_experts) % self.expert:
            raise ConfigError(
                f"expert_parallel_size={self.expert} must divide the {moe.num_experts} experts of a layer and the "
                f"{redundant_experts} redundant ones together"
            )
        if moe.intermediate_size % self.tensor:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor} must divide the experts' intermediate_size of "
                f"{moe.intermediate_size}"
            )


@dataclass(frozen=True, slots=True)
class DeviceMesh:
    """A mesh, and how arrays lie on it.

    Attributes:
      mesh: of the devices.
      sizes: of its axes.
      rules: of the parameters.
    """

    mesh: Mesh
    sizes: ParallelSizes
    rules: ShardingRules = field(default_factory=ShardingRules)

    @property
    def platform(self) -> str:
        """Of its devices: "cpu", "gpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def spans_processes(self) -> bool:
        """Whether other processes drive some of its devices."""
        return bool(self.mesh.is_multi_process)

    def on_each(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """A function of one device's parts, as one of whole arrays: it runs on each device on its own part.

        Args:
          in_specs, out_specs: mesh axes that arguments and results are split over, as of `jax.shard_map`.
        """
        mapped: Callable[..., Any] = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return mapped

    def sharding(self, *axes: tuple[str, ...] | str | None) -> NamedSharding:
        """Of an array whose axes are split over these mesh axes; none for one that is the same everywhere."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def claim_devices(count: int) -> None:
    """Has a process's CPU be so many devices, unless JAX has been used, or its environment says how many there are."""
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
                jax.config.update("jax_num_cpu_devices", count)


def device_mesh(sizes: ParallelSizes) -> DeviceMesh:
    """A mesh of the devices of this job, as many of each process.

    Neighbouring devices, which are the nearest, are along `tensor`, then along `expert`.

    Raises:
      ConfigError: there are fewer devices.
    """
    processes = jax.process_count()
    each = sizes.devices // processes
    devices = list[jax.Device]()
    for number in range(processes):
        own = jax.devices() if processes == 1 else jax.local_devices(process_index=number)
        if len(own) < each:
            hint = ""
            if own[0].platform == "cpu":
                hint = ": a CPU is as many devices as jax.config's jax_num_cpu_devices says before JAX is first used"
            where = f" of {sizes.devices} in each of {processes} processes" if processes > 1 else ""
            raise ConfigError(
                f"data_parallel_size={sizes.data} times expert_parallel_size={sizes.expert} times "
                f"tensor_parallel_size={sizes.tensor} needs {each} devices{where}, and there are {len(own)}{hint}"
            )
        devices += own[:each]
    grid = np.array(devices).reshape(sizes.data, sizes.expert, sizes.tensor)
    return DeviceMesh(Mesh(grid, (DATA, EXPERT, TENSOR)), sizes)
