"""Child processes that measurements run in, each pinned to its cores."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class WorkerError(RuntimeError):
    """A worker reported an error, ended, or took too long; the message says which."""


class Worker:
    """A process that runs `bench.worker_loop.serve_lines`.

    Args:
      name: for messages.
      command: to run, in the repository's root.
      cores: that the process and its threads may use.
      environment: variables added to this process's own.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, cores: Sequence[int], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._buffer = b""

    def ask(self, op: str, *, timeout: float = 600.0, **arguments: Any) -> dict[str, Any]:
        """Runs an operation.

        Args:
          op: its name.
          timeout: seconds after which the worker is given up.
          arguments: of the operation.

        Raises:
          WorkerError: the operation failed, the worker ended, or the time is over.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError(f"{self.name}: no pipes")
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self.name}: ended with status {self._process.wait()} before {op!r}") from None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                raise WorkerError(f"{self.name}: {op!r} took more than {timeout:g} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise WorkerError(f"{self.name}: ended with status {self._process.wait()} in {op!r}")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {op!r}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself, with a request unread
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
