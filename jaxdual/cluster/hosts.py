"""Where the engines of a cluster run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, Protocol

from jaxdual.cluster.devices import devices_of
from jaxdual.config import ClusterConfig, ConfigError, EngineConfig
from jaxdual.engine.client import EngineProcess
from jaxdual.engine.cluster_part import ClusterPart


class Hosts(Protocol):
    """Machines that engines are started on.

    Attributes:
      carrier: of KV blocks between them, unless the configuration names one.
    """

    carrier: Literal["shm", "tcp"]

    async def open(self, engines: int) -> None:
        """Must be called first.

        Args:
          engines: how many are going to run at once.

        Raises:
          ConfigError: so many can't.
        """

    async def launch(
        self,
        number: int,
        config: EngineConfig,
        part: ClusterPart,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
    ) -> EngineProcess:
        """Starts an engine.

        Args:
          number: of the engine in the cluster.
          config, part, on_message, on_death: see `EngineProcess.launch`.

        Raises:
          OSError: it can't be started.
        """

    async def close(self) -> None:
        """Called when all engines have ended."""


class LocalHost:
    """This machine: engines are children of this process, with GPUs of their own where there are as many."""

    carrier: Literal["shm", "tcp"] = "shm"

    async def open(self, engines: int) -> None:
        """See `Hosts`."""

    async def launch(
        self,
        number: int,
        config: EngineConfig,
        part: ClusterPart,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
    ) -> EngineProcess:
        """See `Hosts`."""
        environment = devices_of(part.first_device, config.num_devices, os.environ)
        return await EngineProcess.launch(config, on_message, on_death, part=part, environment=environment)

    async def close(self) -> None:
        """See `Hosts`."""


def hosts_of(config: EngineConfig, cluster: ClusterConfig) -> Hosts:
    """Where a cluster's engines run.

    Raises:
      ConfigError: they can't run there.
    """
    if cluster.cluster == "local":
        return LocalHost()
    if max(config.tensor_parallel_size, cluster.prefill_tensor_parallel_size or 1) > 1:
        raise ConfigError("engines in cluster='ray' have one device each: tensor_parallel_size must be 1")
    if config.kv_transport == "shm":
        raise ConfigError("kv_transport='shm' reaches one machine only; cluster='ray' needs 'tcp' or 'verbs'")
    try:
        from jaxdual.cluster.ray_hosts import RayHosts
    except ImportError as error:
        raise ConfigError(f"cluster='ray' needs Ray, as by pip install 'jaxdual[ray]' ({error})") from error
    return RayHosts()
