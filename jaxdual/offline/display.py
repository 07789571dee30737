"""What a batch job shows on a terminal: a progress bar, and on request the completions."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from jaxdual.offline.batch_file import BatchLine, RejectedLine
from jaxdual.offline.runner import Totals

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} requests [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A progress bar on standard error with tokens per second and the time left.

    Args:
        total: lines of the batch.
        done: lines that an earlier run has served.
        shown: False for no bar.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total, initial=done, disable=not shown, bar_format=_BAR, mininterval=interval, file=sys.stderr
        )
        self._done = done
        self._start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, totals: Totals, generated_tokens: int) -> None:
        """Brings the bar up to date."""
        rate = generated_tokens / max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s, {totals.failed} failed", refresh=False)
        self._bar.update(self._done + totals.ok + totals.failed - self._bar.n)


def format_results(lines: Iterable[BatchLine | RejectedLine], output: Path) -> Iterator[str]:
    """Prompt and completion of each line of a batch, in the order of the input."""
    places: dict[str | int, int] = {}
    with output.open("rb") as file:
        while True:
            place, raw = file.tell(), file.readline()
            if not raw:
                break
            row = json.loads(raw)
            places[row["error"]["line"] if row["custom_id"] is None else row["custom_id"]] = place
        for line in lines:
            file.seek(places[line.key])
            yield _format_row(line, json.loads(file.readline()))


def _format_row(line: BatchLine | RejectedLine, row: dict[str, Any]) -> str:
    name = row["custom_id"] or f"line {line.number}"
    if row["error"] is not None or isinstance(line, RejectedLine):
        return f"--- {name}: error\n{row['error']['message']}\n"
    body = row["response"]["body"]
    parts = [f"--- {name}", _format_prompt(line.body)]
    for choice in body["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        parts.append(f">>> completion {choice['index']} ({choice['finish_reason']})\n{text}")
    return "\n".join(parts) + "\n"


def _format_prompt(body: dict[str, Any]) -> str:
    if "messages" in body:
        return "\n".join(f"{message['role']}: {message['content']}" for message in body["messages"])
    prompt = body["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
