"""`python -m jaxdual.routers`: runs requests through a model with experts, and says what its routers choose.

Settings are those of the engine that is profiled; experts stay in order, whatever `expert_placement` says, since no
choice depends on where they are. Exit status: 0 when every request was served, 1 when not, 2 for a call that can't
work, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdual.api import LLM
from jaxdual.arguments import run_command, whole
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.config_sources import add_arguments, read_config
from jaxdual.errors import EngineDeadError
from jaxdual.model_folder import find_model
from jaxdual.offline.batch_file import read_batch
from jaxdual.offline.report import write_report
from jaxdual.result_files import check_picture, check_writable
from jaxdual.routers.figures import comparison, figures
from jaxdual.routers.picture import draw
from jaxdual.routers.profile import RouterProfile, write_profile
from jaxdual.routers.report import format_report
from jaxdual.routers.workloads import BatchWorkload, RandomWorkload, Served, Workload
from jaxdual.scheduling.expert_policies import RouterWindow
from models import ModelConfig, load_config

_PROG = "python -m jaxdual.routers"
_WHOLE_RUN = 2**31 - 1  # steps of a window that no run fills
_PLACING = ("expert_placement", "expert_profile", "expert_anchor", "expert_interval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_flags(parser, options)
    return run_command(_PROG, lambda: _run(options), failures=(EngineDeadError, OSError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Runs requests through a model with experts, and says what its routers choose: how uneven loads "
        "are, which experts follow each other, and what placements make of it. Requests of both kinds are compared.",
        epilog="Experts stay in order while it counts, whatever --expert-placement says.",
    )
    parser.add_argument("-i", "--input-file", type=Path, metavar="FILE.jsonl", help="OpenAI batch requests, one a line")
    parser.add_argument(
        "--random-requests", type=whole(1), metavar="N", help="requests of random tokens, by --seed (0)"
    )
    parser.add_argument("--random-input-len", type=whole(1), metavar="N", help="tokens of each; default 1024")
    parser.add_argument("--random-output-len", type=whole(1), metavar="N", help="tokens of its output; default 128")
    parser.add_argument(
        "--devices",
        type=whole(1),
        metavar="N",
        help="of the figures of placements; default --expert-parallel-size, or 2 where that is 1",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE.npz",
        help="where the counts go, for --expert-profile; of requests of both kinds, those of the batch",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of loads and of the strongest pairs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go, too")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_arguments(parser, EngineConfig)
    return parser


def _check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if there are no requests, or flags of random ones without any."""
    if options.random_requests is not None:
        return
    if options.input_file is None:
        parser.error("there are no requests: give -i/--input-file, --random-requests, or both")
    for name in ("random_input_len", "random_output_len"):
        if getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} needs --random-requests")


def _run(options: argparse.Namespace) -> int:
    config = _counting(read_config(EngineConfig, options))
    files = [file for file in (options.profile, options.plot, options.json) if file is not None]
    for file in files:
        check_writable(file)
    named = [file.resolve() for file in (options.input_file, *files) if file is not None]
    if len(set(named)) < len(named):
        raise ConfigError("requests, profile, picture and figures must be different files")
    if options.plot is not None:
        check_picture(options.plot)
    workloads = _workloads(options, config)
    folder, _ = find_model(config)
    model = load_config(folder)
    if model.moe is None or not model.sparse_layers:
        raise ConfigError(f"{folder}: the model has no experts")
    devices = options.devices or (config.expert_parallel_size if config.expert_parallel_size > 1 else 2)
    if model.moe.num_experts % devices:
        raise ConfigError(f"--devices {devices} must divide the {model.moe.num_experts} experts")
    llm = LLM.from_config(config)
    for workload in workloads.values():
        workload.check(llm)
    served, windows = dict[str, Served](), dict[str, RouterWindow]()
    for name, workload in workloads.items():
        served[name] = workload.run(llm)
        window = llm.router_statistics(so_far=True)
        if window is None or not window.tokens:
            print(f"{_PROG}: error: no request of {name} was served: {served[name].problem}", file=sys.stderr)
            return 1
        windows[name] = window
    llm.close()
    if options.profile is not None:
        write_profile(options.profile, RouterProfile(next(iter(windows.values())), llm.info.fingerprint))
    report = _report(llm, model, devices, served, windows)
    print(format_report(report))
    if options.json is not None:
        write_report(options.json, report)
    if options.plot is not None:
        draw(windows, model.sparse_layers, options.plot)
    for name, one in served.items():
        if one.failed:
            print(f"{one.failed} requests of {name} failed; the first: {one.problem}", file=sys.stderr)
    return 1 if any(one.failed for one in served.values()) else 0


def _counting(config: EngineConfig) -> EngineConfig:
    """The configuration of an engine that counts, until it is asked, and moves nothing."""
    default = EngineConfig()
    placing: dict[str, Any] = {name: getattr(default, name) for name in _PLACING}
    return dataclasses.replace(config, **placing, router_statistics="transitions", expert_window=_WHOLE_RUN)


def _workloads(options: argparse.Namespace, config: EngineConfig) -> dict[str, Workload]:
    workloads: dict[str, Workload] = {}
    progress = not options.no_progress
    if options.input_file is not None:
        lines = sum(1 for _ in read_batch(options.input_file))
        if not lines:
            raise ConfigError(f"{options.input_file}: has no requests")
        workloads["batch"] = BatchWorkload(options.input_file, lines, progress)
    if options.random_requests is not None:
        lengths = options.random_input_len or 1024, options.random_output_len or 128
        workloads["random"] = RandomWorkload(options.random_requests, *lengths, config.seed or 0, progress)
    return workloads


def _report(
    llm: LLM, model: ModelConfig, devices: int, served: Mapping[str, Served], windows: Mapping[str, RouterWindow]
) -> dict[str, Any]:
    layers, moe = model.sparse_layers, model.moe
    return {
        "model": llm.served_model_name,
        "fingerprint": llm.info.fingerprint,
        "layers": layers,
        "experts": 0 if moe is None else moe.num_experts,
        "experts_per_token": 0 if moe is None else moe.num_experts_per_tok,
        "devices": devices,
        "engine": dataclasses.asdict(llm.config),
        "workloads": {
            name: {"requests": {"ok": one.ok, "failed": one.failed}, **figures(windows[name], layers, devices)}
            for name, one in served.items()
        },
        "comparison": comparison(windows["batch"], windows["random"], devices) if len(windows) == 2 else None,
    }


if __name__ == "__main__":
    sys.exit(main())
