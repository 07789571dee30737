"""`python -m server`: serves a model over HTTP, as OpenAI does, and over gRPC.

Exit status: 0 after SIGTERM or Ctrl-C, 1 when the engine can't be started any more, 2 for a call that can't work.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from jaxdual.cascade.config import CascadeConfig, read_cascade
from jaxdual.config import ClusterConfig, ConfigError, EngineConfig, ServerConfig
from jaxdual.config_sources import add_arguments, read_config
from server.serve import Server


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serves a model: OpenAI's HTTP API and metrics on one port, gRPC (jaxdual.v1, KServe's Open "
        "Inference Protocol, health, reflection) on the other.",
    )
    add_arguments(parser, ServerConfig, ClusterConfig, EngineConfig)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request to a cascade's remote tier
    try:
        engine_config, server_config = read_config(EngineConfig, options), read_config(ServerConfig, options)
        cluster_config = read_config(ClusterConfig, options)
        cascade = _cascade(server_config.cascade, engine_config, cluster_config)
        return asyncio.run(Server(engine_config, server_config, cluster_config, cascade).run())
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _cascade(path: str | None, engine: EngineConfig, cluster: ClusterConfig) -> CascadeConfig | None:
    if path is None:
        return None
    if cluster:
        raise ConfigError(f"cascade={path!r}: its tiers are engines by themselves, and prefill={cluster.prefill}")
    return read_cascade(path, engine)


if __name__ == "__main__":
    sys.exit(main())
