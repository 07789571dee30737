"""The input of a batch job: one request a line, in OpenAI's batch format.

A line is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body": {...}}`.
Blank lines are skipped. The file is read line by line, never whole.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

URLS = ("/v1/chat/completions", "/v1/completions")
_KEYS = ("custom_id", "method", "url", "body")


class BatchError(ValueError):
    """A batch job that cannot run; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of the batch.

    Attributes:
        number: the line's number, from 1.
        custom_id: the caller's name of the request, used once in the file.
        url: one of `URLS`.
        body: the request body, not checked yet.
        digest: hexadecimal digest of custom_id, url and body; equal requests have equal digests in every run.
    """

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]
    digest: str

    @property
    def key(self) -> str | int:
        """What the output row of this line is known by."""
        return self.custom_id


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that is no request; its `custom_id` is None where it has none of its own (absent, or used before)."""

    number: int
    custom_id: str | None
    digest: str
    code: str
    message: str
    param: str | None

    @property
    def key(self) -> str | int:
        """What the output row of this line is known by: the line number where there is no custom_id."""
        return self.number if self.custom_id is None else self.custom_id


def read_batch(path: Path) -> Iterator[BatchLine | RejectedLine]:
    """The lines of a batch file in order, the bad ones with the reason.

    Raises:
        BatchError: the file cannot be read.
    """
    first_use: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse_line(number, raw, first_use)
    except OSError as error:
        raise BatchError(f"{path}: cannot be read: {error.strerror}") from None


class _LineError(Exception):
    def __init__(self, message: str, param: str | None = None, code: str = "invalid_line") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


def _parse_line(number: int, raw: bytes, first_use: dict[str, int]) -> BatchLine | RejectedLine:
    custom_id = None
    try:
        line = _decode(raw)
        custom_id = _claim_custom_id(line, number, first_use)
        url, body = _check(line)
    except _LineError as bad:
        digest = _digest(str(number).encode(), raw.strip())
        return RejectedLine(number, custom_id, digest, bad.code, f"line {number}: {bad.message}", bad.param)
    digest = _digest(custom_id.encode(), url.encode(), json.dumps(body, sort_keys=True).encode())
    return BatchLine(number, custom_id, url, body, digest)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _LineError(f"not valid UTF-8 at byte {error.start}", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise _LineError(f"not valid JSON: {error.msg} at column {error.colno}", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise _LineError(f"not usable JSON: {error}", code="invalid_json") from None
    if not isinstance(line, dict):
        raise _LineError(f"a line must be a JSON object, got {_short(line)}")
    return line


def _claim_custom_id(line: dict[str, Any], number: int, first_use: dict[str, int]) -> str:
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        problem = f"got {_short(custom_id)}" if "custom_id" in line else "it is missing"
        raise _LineError(f"custom_id must be a string that is not empty; {problem}", "custom_id")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise _LineError(f"custom_id {custom_id!r} is not valid Unicode", "custom_id") from None
    used = first_use.setdefault(custom_id, number)
    if used != number:
        message = f"custom_id {_short(custom_id)} was already used on line {used}"
        raise _LineError(message, "custom_id", "duplicate_custom_id")
    return custom_id


def _check(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for key in line:
        if key not in _KEYS:
            raise _LineError(f"unknown key {_short(key)}; a line has {', '.join(_KEYS)}", key)
    if line.get("method", "POST") != "POST":
        raise _LineError(f"method must be 'POST', got {_short(line['method'])}", "method")
    url = line.get("url")
    if url not in URLS:
        raise _LineError(f"url must be one of {', '.join(URLS)}, got {_short(url)}", "url", "invalid_url")
    body = line.get("body")
    if not isinstance(body, dict):
        problem = f"got {_short(body)}" if "body" in line else "it is missing"
        raise _LineError(f"body must be a JSON object; {problem}", "body")
    return url, body


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
