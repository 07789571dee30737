"""Child processes of measurements: pinned, answering line by line, and reported when they fail."""

import sys

import pytest

from bench.workers import Worker, WorkerError

_CHILD = """
import os, sys, time
from bench.worker_loop import serve_lines

def cores():
    print("this goes to stderr")
    return {"cores": sorted(os.sched_getaffinity(0)), "extra": os.environ["EXTRA"]}

serve_lines({
    "cores": cores,
    "add": lambda left, right: {"sum": left + right},
    "fail": lambda: 1 / 0,
    "sleep": lambda: time.sleep(60),
    "end": lambda: os._exit(3),
})
"""


@pytest.fixture
def worker():
    with Worker("child", [sys.executable, "-c", _CHILD], cores=[0], environment={"EXTRA": "yes"}) as one:
        yield one


def test_a_worker_runs_on_its_cores_with_its_environment(worker):
    assert worker.ask("cores") == {"cores": [0], "extra": "yes"}
    assert worker.ask("add", left=1, right=2) == {"sum": 3}


def test_a_failed_operation_is_reported_and_the_worker_goes_on(worker):
    with pytest.raises(WorkerError, match="child: 'fail': ZeroDivisionError"):
        worker.ask("fail")
    assert worker.ask("add", left=1, right=1) == {"sum": 2}


def test_a_worker_that_ends_is_reported(worker):
    with pytest.raises(WorkerError, match="ended with status 3 in 'end'"):
        worker.ask("end")
    with pytest.raises(WorkerError, match="ended with status 3 before 'add'"):
        worker.ask("add", left=1, right=1)


def test_a_worker_that_takes_too_long_is_given_up(worker):
    with pytest.raises(WorkerError, match=r"'sleep' took more than 0.2 s"):
        worker.ask("sleep", timeout=0.2)
