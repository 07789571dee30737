"""The child's end of a benchmark worker: JSON requests on stdin, JSON answers on stdout, one a line.

Needs nothing but the standard library and Python 3.11, since the reference side runs it too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Operation = Callable[..., Mapping[str, Any]]


def serve_lines(operations: Mapping[str, Operation]) -> None:
    """Answers requests until stdin ends.

    A request is `{"op": name, **arguments}`. The answer is what the operation returns, or `{"error": text}`. Whatever
    else the process prints goes to stderr.

    Args:
      operations: by name.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = dict(operations[arguments.pop("op")](**arguments))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
