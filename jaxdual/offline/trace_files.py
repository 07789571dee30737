"""Files of traces, by what they are."""

from pathlib import Path

from jaxdual.offline.burstgpt import read_burstgpt
from jaxdual.offline.trace import Session, read_trace


def read_sessions(path: Path) -> list[Session]:
    """The sessions of a file: BurstGPT's where its name ends in .csv, else one JSON object a line.

    Raises:
      TraceError: it can't be read, or is none.
    """
    return read_burstgpt(path) if path.suffix.lower() == ".csv" else read_trace(path)
