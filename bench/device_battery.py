"""The kernels' tests on this machine's GPU: the same cases as `make test-kernels`, compiled and run.

`python -m bench.device_battery --json FILE`. The exit status is that of pytest. The file is written after each test, so
that one is there if time runs out: its `status` is null.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest

from bench.report import header, write_json
from bench.workers import ROOT


class _Outcomes:
    """What became of each test, as a plugin of pytest.

    Args:
      changed: called after each test and what was before and behind it.
    """

    def __init__(self, changed: Callable[[_Outcomes], None] = lambda _: None) -> None:
        self.passed = 0
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._changed = changed

    def report(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test."""
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext[-1000:]
        elif report.skipped:
            self.skipped[report.nodeid] = report.longreprtext[-200:]
        elif report.when == "call":
            self.passed += 1
        if report.when == "teardown":
            self._changed(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.device_battery", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", help="where results go")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print("no GPU here: the kernels' tests run without one by make test-kernels", file=sys.stderr)
        return 2
    os.environ["JAX_PLATFORMS"] = "cuda"  # the tests would choose the CPU
    head = header("bench.device_battery") | {"device": jax.devices()[0].device_kind}

    def write(outcomes: _Outcomes, status: int | None = None) -> None:
        write_json(options.json, head | {"status": status} | outcomes.report())

    outcomes = _Outcomes(write)
    status = int(pytest.main(["-m", "kernels", str(ROOT / "tests" / "pallas_kernels")], plugins=[outcomes]))
    write(outcomes, status)
    return status


if __name__ == "__main__":
    sys.exit(main())
