"""Load on a server over HTTP or gRPC: latencies, rates, refusals.

`python -m bench.serve --json FILE` starts a server of its own (`python -m server`) and loads it from this process;
`--url` or `--grpc` name a running one instead. Definitions of TTFT, TPOT, ITL and E2E: see `bench.load`.

Scenarios:
  load      one run: Poisson arrivals at `--request-rate`, `--max-concurrency` at most under way.
  streams   `--streams` requests at once, more than the engine runs side by side: none may fail. Inter-token times are
            those of streams once they run, since the first token ends the waiting.
  overload  finds the server's capacity by a closed loop (every slot refilled at once), then runs 0.9 and 5 times
            that rate, and compares what accepted requests see; refusals must be quick.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from bench.grpc_client import GrpcClient
from bench.http_client import HttpClient
from bench.load import Client, LoadRequest, Record, make_requests, poisson_arrivals, run_load, steady_rate, summarize
from bench.report import header, table, write_json
from bench.server_process import ServerFailedError, run_server

_LOW, _HIGH = 0.9, 5.0
_WARM_REQUESTS = 8
_OVERLOAD_QUEUE = 16  # sequences that run at once, for each request that may wait


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a scenario; returns the exit status: 1 if requests failed, refusals aside."""
    options = _parse(arguments)
    results = header("bench.serve")
    results["scenario"] = options.scenario
    results["settings"] = {
        name: value for name, value in vars(options).items() if name not in ("json", "scenario", "api_key")
    }
    try:
        results["runs"] = asyncio.run(_run(options, results))
    except (ServerFailedError, OSError, ValueError) as error:
        print(f"bench.serve: {error}", file=sys.stderr)
        return 2
    results["machine"]["load_average_after"] = os.getloadavg()[0]
    write_json(options.json, results)
    print(_table(results["runs"]))
    for name, value in results.get("compared", {}).items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    errors = sum(run["errors"] for run in results["runs"].values())
    if errors:
        print(
            f"{errors} requests failed: {[run['error_details'] for run in results['runs'].values()]}", file=sys.stderr
        )
    return 1 if errors else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--scenario", choices=("load", "streams", "overload"), default="load")
    where = parser.add_argument_group("server")
    where.add_argument("--url", help="HTTP address of a running server, such as http://127.0.0.1:8000")
    where.add_argument("--grpc", metavar="HOST:PORT", help="gRPC address of a running server")
    where.add_argument("--protocol", choices=("http", "grpc"), default="http", help="to a server started here")
    where.add_argument("--api-key")
    where.add_argument("--model", help="folder of the model that a server started here serves")
    where.add_argument("--max-num-seqs", type=int, default=64, help="sequences that the engine runs at once")
    where.add_argument("--max-queued-requests", type=int, help="requests that may wait (default: the server's own)")
    load = parser.add_argument_group("load")
    load.add_argument("--requests", type=int, default=128, help="of the scenario load (default: 128)")
    load.add_argument("--request-rate", type=float, default=math.inf, help="a second, Poisson (default: inf)")
    load.add_argument("--max-concurrency", type=int, help="requests under way at most")
    load.add_argument("--streams", type=int, default=300, help="of the scenario streams (default: 300)")
    load.add_argument("--duration", type=float, default=30.0, help="seconds of each rate in overload (default: 30)")
    load.add_argument("--prompt-tokens", type=_bounds, default=(16, 128), metavar="LOW:HIGH", help="(default: 16:128)")
    load.add_argument("--output-tokens", type=_bounds, default=(8, 64), metavar="LOW:HIGH", help="(default: 8:64)")
    load.add_argument("--vocab-size", type=int, default=1000, help="prompt tokens are below it (default: 1000)")
    load.add_argument("--text", action="store_true", help="prompts are text, not token ids")
    load.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.url and options.grpc:
        parser.error("--url and --grpc exclude each other")
    for name in ("requests", "request_rate", "streams", "duration", "max_num_seqs", "vocab_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if options.max_concurrency is not None and options.max_concurrency < 1:
        parser.error("--max-concurrency must be at least 1")
    if options.scenario == "overload" and options.max_queued_requests is None:
        # Every request that may wait makes all that wait wait longer: a queue that is always full should be short.
        options.max_queued_requests = max(1, options.max_num_seqs // _OVERLOAD_QUEUE)
    return options


def _bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} must be LOW:HIGH with 1 <= LOW <= HIGH")
    return bounds


async def _run(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    async with _connected(options, results) as client:
        await _warm_up(options, client)
        if options.scenario == "streams":
            return {"streams": await _measured(options, client, options.streams, math.inf, seed=1)}
        if options.scenario == "overload":
            return await _overload(options, client, results)
        return {
            "load": await _measured(
                options, client, options.requests, options.request_rate, seed=1, concurrency=options.max_concurrency
            )
        }


@contextlib.asynccontextmanager
async def _connected(options: argparse.Namespace, results: dict[str, Any]) -> AsyncIterator[Client]:
    async with contextlib.AsyncExitStack() as stack:
        url, address = options.url, options.grpc
        if url is None and address is None:
            server = await stack.enter_async_context(run_server(_server_arguments(options)))
            results["server"] = {"ready_seconds": server.ready_seconds}
            url, address = (server.url, None) if options.protocol == "http" else (None, server.grpc)
        client: Client
        if address is not None:
            client = GrpcClient(address, options.api_key)
        else:
            client = HttpClient(url, await _served_model(url, options.api_key), options.api_key)
        stack.push_async_callback(client.close)
        yield client


def _server_arguments(options: argparse.Namespace) -> list[str]:
    given = {
        "--model": options.model,
        "--max-num-seqs": options.max_num_seqs,
        "--max-queued-requests": options.max_queued_requests,
        "--api-key": options.api_key,
    }
    return [part for name, value in given.items() if value is not None for part in (name, str(value))]


async def _served_model(url: str, api_key: str | None) -> str:
    client = HttpClient(url, "", api_key)
    try:
        status, body = await client.get("/v1/models")
    finally:
        await client.close()
    if status != 200:
        raise ValueError(f"{url}/v1/models answered {status}: {body[:200]!r}")
    name: str = json.loads(body)["data"][0]["id"]
    return name


def _requests(options: argparse.Namespace, count: int, seed: int) -> list[LoadRequest]:
    # Another seed for each run: the same prompts again would come from the prefix cache.
    return make_requests(
        count,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        vocab_size=options.vocab_size,
        as_text=options.text,
        seed=1000 * options.seed + seed,
    )


async def _warm_up(options: argparse.Namespace, client: Client) -> None:
    records = await run_load(client, _requests(options, _WARM_REQUESTS, 0), [0.0] * _WARM_REQUESTS)
    failed = [record.detail for record in records if record.status == "error"]
    if failed:
        raise ValueError(f"the server does not answer as expected: {failed[0]}")


async def _measured(
    options: argparse.Namespace,
    client: Client,
    count: int,
    rate: float,
    *,
    seed: int,
    concurrency: int | None = None,
) -> dict[str, Any]:
    return _summary(await _timed(options, client, count, rate, seed=seed, concurrency=concurrency))


async def _timed(
    options: argparse.Namespace,
    client: Client,
    count: int,
    rate: float,
    *,
    seed: int,
    concurrency: int | None = None,
) -> tuple[list[Record], float]:
    """Records of a run, and the CPU seconds that this process spent on it."""
    cpu = time.process_time()
    arrivals = poisson_arrivals(count, rate, seed)
    records = await run_load(client, _requests(options, count, seed), arrivals, max_concurrency=concurrency)
    return records, time.process_time() - cpu


def _summary(run: tuple[list[Record], float]) -> dict[str, Any]:
    records, cpu = run
    return {**summarize(records), "client_cpu_seconds": cpu}


async def _overload(options: argparse.Namespace, client: Client, results: dict[str, Any]) -> dict[str, Any]:
    # As many as the server takes without refusing, so that every slot is refilled at once.
    queued = options.max_num_seqs if options.max_queued_requests is None else options.max_queued_requests
    concurrency = options.max_num_seqs + min(queued, options.max_num_seqs)
    closed = await _timed(options, client, 8 * concurrency, math.inf, seed=2, concurrency=concurrency)
    capacity = steady_rate(closed[0])
    runs = {"capacity": _summary(closed)}
    for name, factor, seed in (("below", _LOW, 3), ("above", _HIGH, 4)):
        rate = factor * capacity
        runs[name] = await _measured(options, client, max(20, round(rate * options.duration)), rate, seed=seed)
        runs[name]["request_rate"] = rate
    below, above = runs["below"], runs["above"]
    results["compared"] = {
        "capacity_requests_per_second": capacity,
        "ttft_p95_ratio": _quotient(above["ttft_seconds"]["p95"], below["ttft_seconds"]["p95"]),
        "tpot_p95_ratio": _quotient(above["tpot_seconds"]["p95"], below["tpot_seconds"]["p95"]),
        "refusal_p99_seconds": above["refusal_seconds"]["p99"],
        "goodput_ratio": _quotient(above["requests_per_second"], capacity),
    }
    return runs


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _table(runs: dict[str, Any]) -> str:
    names = list(runs)
    counts = ("requests", "ok", "refused", "errors", "seconds", "requests_per_second", "output_tokens_per_second")
    rows: list[list[object]] = [[name, *(runs[run][name] for run in names)] for name in counts]
    for name in ("ttft_seconds", "tpot_seconds", "itl_seconds", "e2e_seconds", "refusal_seconds"):
        for figure in ("p50", "p95", "p99"):
            values = [runs[run][name][figure] for run in names]
            if any(value is not None for value in values):
                label = f"{name.removesuffix('_seconds')} {figure} ms"
                rows.append([label, *(None if value is None else 1e3 * value for value in values)])
    rows.append(["client CPU s", *(runs[run]["client_cpu_seconds"] for run in names)])
    return table(("", *names), rows)


if __name__ == "__main__":
    sys.exit(main())
