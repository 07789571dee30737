"""Runs a batch job on the fake engine several times, and kills each run but the last while it writes a row.

`job_that_dies.py DEATHS ARGUMENTS...`: DEATHS is a JSON list of [row, part]: a run gets SIGKILL when it has written
that part (0 to 1) of its row of that number. A list of the runs' exit statuses is printed, negative for a signal.
"""

import json
import os
import signal
import sys

from fake_llm import FakeLLM

from jaxdual.offline import __main__ as command
from jaxdual.offline import output_file


class DyingOs:
    """The `os` module with a `write` that is the last one."""

    def __init__(self, last_row, part):
        self.rows_left = last_row
        self.part = part

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, descriptor, data):
        self.rows_left -= 1
        if self.rows_left == 0:
            os.write(descriptor, data[: int(len(data) * self.part)])
            os.kill(os.getpid(), signal.SIGKILL)
        return os.write(descriptor, data)


def run(death, arguments):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        output_file.os = DyingOs(*death)
        os._exit(command.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


command.LLM = FakeLLM
deaths = json.loads(sys.argv[1])
print([run(death, sys.argv[2:]) for death in [*deaths, (0, 0)]])
