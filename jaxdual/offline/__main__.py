"""`python -m jaxdual.offline -i IN -o OUT`: runs a file of OpenAI batch requests through a model.

Exit status: 0 when every line has its row in OUT (rows with an error included), 1 when the run broke off, 2 for a call
that cannot work, 130 after Ctrl-C. After 1 and 130 the same command continues where it stopped.

With `--cascade FILE` a cascade answers in place of one model, and each row tells which tier did.

With `--trace TRACE` it replays agent sessions instead, and measures them. Exit status: 0 when every request was served,
1 when not, 2 and 130 as above.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from jaxdual.api import LLM
from jaxdual.arguments import run_command
from jaxdual.cascade.config import read_cascade
from jaxdual.cascade.serving.blocking import BlockingCascade
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.config import ClusterConfig, EngineConfig
from jaxdual.config_sources import add_arguments, read_config
from jaxdual.offline.batch_file import BatchError, read_batch
from jaxdual.offline.cascade_report import CascadeTotals, cascade_report, format_cascade_report
from jaxdual.offline.display import Progress, format_results
from jaxdual.offline.output_file import OutputFile
from jaxdual.offline.replay_command import add_trace_arguments, run_trace, trace_flags_given
from jaxdual.offline.report import build_report, format_report, write_report
from jaxdual.offline.rows import row_id
from jaxdual.offline.runner import BatchModel, BatchRunner, Totals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_flags(parser, options)
    stopped = f"\nstopped; the same command continues with the rest of {options.input_file}"
    return run_command(parser.prog, lambda: _run(options), stopped=stopped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxdual.offline",
        description="Runs a file of OpenAI batch requests through a model. Started again with the same files, an "
        "interrupted run continues. With --trace, replays agent sessions instead.",
    )
    parser.add_argument("-i", "--input-file", type=Path, help="requests, one JSON object a line")
    parser.add_argument("-o", "--output-file", type=Path, help="where the rows go, one a request")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write counts, times and rates as JSON")
    parser.add_argument("--overwrite", action="store_true", help="start anew: drop the rows in the output file")
    parser.add_argument("--show", action="store_true", help="print prompts and completions at the end")
    parser.add_argument(
        "--warmup", action="store_true", help="compile everything before the first request, for undisturbed times"
    )
    parser.add_argument(
        "--cascade", type=Path, metavar="FILE.toml", help="tiers that answer as one model, in place of --model"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_trace_arguments(parser)
    add_arguments(parser, ClusterConfig, EngineConfig)
    return parser


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if options.trace is not None:
        _check_report(options.report)
        return run_trace(options)
    _check_paths(options)
    config = read_config(EngineConfig, options)
    with OutputFile(options.output_file, options.overwrite) as output:
        total = _check_input(options.input_file, output)
        llm: BatchModel = LLM.from_config(config) if options.cascade is None else _cascade(options.cascade, config)
        with contextlib.ExitStack() as ending:
            if isinstance(llm, BlockingCascade):
                ending.callback(llm.close)  # its engines are processes, and its requests tasks
            _check_model(output, llm)
            if options.warmup:
                llm.warmup()
            output.begin()
            return _run_batch(options, llm, output, total, time.monotonic() - started)


def _cascade(path: Path, config: EngineConfig) -> BlockingCascade:
    # A batch hands over no more than it wants to be queued.
    return BlockingCascade(CascadeLLM.from_config(read_cascade(path, config), max_queued_requests=sys.maxsize))


def _check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if there are flags of both a batch and a replay, or files of neither."""
    files = {"-i/--input-file": options.input_file, "-o/--output-file": options.output_file}
    of_trace = trace_flags_given(options)
    if options.trace is None:
        missing = [flag for flag, value in files.items() if value is None]
        if missing and not of_trace:
            parser.error(f"the following arguments are required: {', '.join(missing)} (or --trace)")
        if of_trace:
            parser.error(f"{of_trace[0]} is for a replay: it needs --trace")
        return
    of_batch = [flag for flag, value in files.items() if value is not None]
    of_batch += [f"--{name}" for name in ("overwrite", "show", "cascade") if getattr(options, name)]
    if of_batch:
        parser.error(f"{of_batch[0]} is for a batch, and does not go with --trace")


def _check_paths(options: argparse.Namespace) -> None:
    source, output, report = options.input_file, options.output_file, options.report
    if str(source) == "-" or str(output) == "-":
        raise BatchError(
            "standard input and output are not supported: an interrupted run could not continue; give files"
        )
    if not source.is_file():
        raise BatchError(f"{source}: {'not a regular file' if source.exists() else 'no such file'}")
    named = [path.resolve() for path in (source, output, report) if path is not None]
    if len(set(named)) < len(named):
        raise BatchError("input, output and report must be different files")
    _check_report(report)


def _check_report(report: Path | None) -> None:
    if report is not None and report.is_dir():
        raise BatchError(f"{report}: is a directory")
    if report is not None:
        folder = next(parent for parent in report.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise BatchError(f"{report}: cannot be written: {folder} is no folder that takes files")


def _check_input(source: Path, output: OutputFile) -> int:
    """Counts the lines of the batch, and makes sure that the rows already there are rows of this batch."""
    total = found = 0
    for line in read_batch(source):
        total += 1
        existing = output.done.get(line.key)
        if existing is None:
            continue
        found += 1
        if existing != row_id(line):
            raise BatchError(
                f"{output.path} belongs to another batch: its row for {line.key!r} answers another request than "
                f"line {line.number} of {source}; give another output file, or --overwrite to replace this one"
            )
    if found < len(output.done):
        raise BatchError(
            f"{output.path} belongs to another batch: {len(output.done) - found} of its rows are of no line of "
            f"{source}; give another output file, or --overwrite to replace this one"
        )
    return total


def _check_model(output: OutputFile, llm: BatchModel) -> None:
    served = (llm.served_model_name, llm.system_fingerprint)
    others = sorted(output.models - {served})
    if others:
        raise BatchError(
            f"{output.path} has rows of model {others[0][0]!r} ({others[0][1]}), not of {served[0]!r} ({served[1]}); "
            "give another output file, or --overwrite to replace this one"
        )


def _run_batch(
    options: argparse.Namespace, llm: BatchModel, output: OutputFile, total: int, startup_seconds: float
) -> int:
    # A job that goes on keeps its first part's time, whatever became of the input file's.
    created = int(options.input_file.stat().st_mtime) if output.created is None else output.created
    start = time.monotonic()
    cascade = CascadeTotals()
    if isinstance(llm, BlockingCascade):
        llm.cascade.on_decision(cascade.add)
    try:
        with Progress(total, len(output.done), not options.no_progress) as progress, _Interrupt() as interrupt:

            def show(totals: Totals) -> None:
                interrupt.check()
                progress.show(totals, llm.stats().generation_tokens)

            totals = BatchRunner(llm, output, created, show).run(read_batch(options.input_file))
    except Exception as error:  # whatever breaks the run, the user is told that a restart continues it
        traceback.print_exc()
        print(f"the run broke off: {error}; the same command continues with the remaining requests", file=sys.stderr)
        return 1
    wall_seconds = time.monotonic() - start
    if isinstance(llm, BlockingCascade):
        report = cascade_report(llm.cascade, cascade, totals, wall_seconds, startup_seconds)
    else:
        report = build_report(llm, totals, wall_seconds, startup_seconds)
    llm.close()
    if options.show:
        for text in format_results(read_batch(options.input_file), options.output_file):
            print(text)
    print(format_cascade_report(report) if isinstance(llm, BlockingCascade) else format_report(report))
    if options.report is not None:
        write_report(options.report, report)
    errors = totals.failed + output.errors
    failed = f", {errors} with an error; they are not tried again unless --overwrite is given" if errors else ""
    print(f"{total} rows in {options.output_file}{failed}", file=sys.stderr)
    return 0


class _Interrupt:
    """Ctrl-C as a request to stop between two steps.

    Raised wherever it happens to arrive, the exception can be lost in a callback from native code. A second Ctrl-C is
    raised at once all the same.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


if __name__ == "__main__":
    sys.exit(main())
