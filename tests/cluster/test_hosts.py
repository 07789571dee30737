"""Where engines run: what can't be is said before anything starts."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from jaxdual import AsyncLLM, EngineConfig
from jaxdual.config import ClusterConfig, ConfigError
from tests.engine.models import folder


def start(cluster: ClusterConfig, **settings: object) -> None:
    async def main() -> None:
        config = EngineConfig(model=str(folder("qwen3")), **settings)  # type: ignore[arg-type]
        async with AsyncLLM.from_config(config, cluster=cluster):
            pass

    asyncio.run(asyncio.wait_for(main(), 60))


def test_ray_needs_a_carrier_between_hosts() -> None:
    with pytest.raises(ConfigError, match="'shm' reaches one machine only"):
        start(ClusterConfig(prefill=1, decode=1, cluster="ray"), kv_transport="shm")


def test_ray_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "jaxdual.cluster.ray_hosts", raising=False)
    from jaxdual.cluster.hosts import hosts_of

    with pytest.raises(ConfigError, match=r"pip install 'jaxdual\[ray\]'"):
        hosts_of(EngineConfig(), ClusterConfig(prefill=1, decode=1, cluster="ray"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill": 1, "decode": 1, "storage_nic_rate": 1e6}, {"prefill": 1, "decode": 1, "cluster": "k8s"}],
)
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="cluster="):
        ClusterConfig(**{"cluster": "ray", **settings})  # type: ignore[arg-type]


@pytest.mark.slow
def test_too_little_memory_is_told_by_the_name_of_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prefill_kv_blocks gives 2 KV pages"):
        start(
            ClusterConfig(prefill=1, decode=1, prefill_kv_blocks=2),
            kv_store=str(tmp_path),
            kv_store_capacity_bytes=1 << 28,
            block_size=8,
        )
