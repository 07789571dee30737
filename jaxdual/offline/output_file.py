"""The output of a batch job: one row a line, appended as requests finish, readable after a crash at any moment."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxdual.offline.batch_file import BatchError

# How every row begins: its first key is `id`.
_ROW_START = b'{"id": "batch_req_'


class OutputFile:
    """An output file, locked against other jobs for as long as it is open.

    Each row is one write. A row torn by a crash is the last one, and is cut off before the next one is written.

    Attributes:
        done: for the rows found at opening, by key (custom_id, or line number where there is none) the row's `id`.
        models: name and fingerprint of the models that made those rows.
        created: the time that those rows carry, seconds since the epoch; None without such a row.
        errors: rows among them that say why a line was not served.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        """Opens `path`, making its folder where needed; nothing in it changes before `begin` or `append`.

        Args:
            path: the file.
            overwrite: the rows in it are dropped by `begin`, whatever they are.

        Raises:
            BatchError: the file cannot be written, is in use by another job, or holds something else than rows.
        """
        self.path = path
        self.done: dict[str | int, str] = {}
        self.models: set[tuple[str, str]] = set()
        self.created: int | None = None
        self.errors = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise BatchError(f"{path}: not a regular file")
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise BatchError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._kept: int | None = 0 if overwrite else self._scan()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Cuts off what is not kept: a torn last row, or all with `overwrite`. The first `append` does it too."""
        if self._kept is not None:
            os.ftruncate(self._descriptor, self._kept)
            self._kept = None

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row; after the return it survives the end of this process."""
        self.begin()
        # A lone surrogate, which only a request can bring in, becomes the JSON escape that it was.
        line = memoryview(json.dumps(row, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]

    def close(self) -> None:
        """Puts the rows on the disk and releases the lock."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"{self.path}: another batch job is writing this file") from None

    def _scan(self) -> int:
        """Records the rows in the file; returns the length in bytes of what is to be kept."""
        kept = 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.endswith(b"\n") and self._record(raw):
                    kept += len(raw)
                elif file.read(1) or (number == 1 and not _may_be_torn(raw)):
                    raise BatchError(
                        f"{self.path}: line {number} is not a row of a batch output; "
                        "give another output file, or --overwrite to replace this one"
                    )
        return kept

    def _record(self, raw: bytes) -> bool:
        try:
            row = json.loads(raw)
            error, response = row["error"], row["response"]
            key = row["custom_id"] if row["custom_id"] is not None else error["line"]
            row_id = row["id"]
            body = None if response is None else response["body"]
            model = None if body is None else (body["model"], body["system_fingerprint"])
            created = None if body is None else body["created"]
        except (ValueError, KeyError, TypeError):
            return False
        if not isinstance(key, str | int) or not isinstance(row_id, str):
            return False
        if key in self.done:
            raise BatchError(f"{self.path}: custom_id or line {key!r} has two rows; --overwrite starts anew")
        self.done[key] = row_id
        if model is None:
            self.errors += 1
        else:
            self.models.add(model)
            self.created = created
        return True


def _may_be_torn(raw: bytes) -> bool:
    """Whether a first line that is no row may be the beginning of one, and not the content of some other file."""
    return raw[: len(_ROW_START)] == _ROW_START[: len(raw)]
