"""BurstGPT's traces: CSV files of requests, with the time and the lengths of each."""

import csv
import math
from pathlib import Path

from jaxdual.offline.trace import Session, TraceError, Turn

_TIME, _PROMPT, _OUTPUT = "Timestamp", "Request tokens", "Response tokens"


def read_burstgpt(path: Path) -> list[Session]:
    """The requests of a file, each a session of one turn. Those that failed, without tokens, are left out.

    Raises:
      TraceError: the file can't be read, has other columns, or a value that is no number.
    """
    sessions = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in (_TIME, _PROMPT, _OUTPUT) if name not in (rows.fieldnames or ())]
            if missing:
                raise TraceError(f"{path}: line 1: column {missing[0]!r} is missing, which a BurstGPT trace has")
            for row in rows:
                where = f"{path}: line {rows.line_num}"
                prompt, output = (_number(where, row, name) for name in (_PROMPT, _OUTPUT))
                if prompt and output:
                    turn = Turn(int(prompt), int(output))
                    sessions.append(Session(str(rows.line_num), (turn,), _number(where, row, _TIME)))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: is no CSV: {error}") from None
    if not sessions:
        raise TraceError(f"{path}: has no requests")
    return sessions


def _number(where: str, row: dict[str, str], name: str) -> float:
    text = row[name]
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    whole = name == _TIME or value == math.floor(value) if 0 <= value < math.inf else False
    if not whole:
        accepted = "a number of seconds" if name == _TIME else "a whole number"
        raise TraceError(f"{where}: {name} {text!r} must be {accepted}, at least 0")
    return value
