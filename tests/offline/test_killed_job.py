"""The batch command, killed for real at random moments."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import FIXTURES

REQUESTS = 120


def write_batch(path: Path, rng: random.Random) -> None:
    stem = [rng.randrange(320) for _ in range(40)]
    with path.open("w") as file:
        for number in range(REQUESTS):
            body = {
                "prompt": stem[: rng.randrange(40)] + [rng.randrange(320) for _ in range(1 + rng.randrange(20))],
                "max_tokens": 1 + rng.randrange(60),
                "logprobs": 0,
                **({"temperature": 0} if number % 3 else {"temperature": 0.9}),
            }
            if number == 17:
                body["temperature"] = "warm"
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def start(source: Path, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jaxdual.offline", "-i", source, "-o", target, "--model", FIXTURES / "qwen3"]
    options = ["--block-size", "8", "--max-model-len", "128", "--max-num-seqs", "4", "--no-progress"]
    return subprocess.Popen([*map(str, command), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_five_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    rng = random.Random(11)
    source, whole, killed = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write_batch(source, rng)
    assert start(source, whole).wait(timeout=300) == 0
    for kill in range(5):
        process = start(source, killed)
        # Somewhere within the next part of the rows, at no particular point of the loop.
        goal = min(rows(killed) + rng.randint(1, 20), REQUESTS - 5 + kill)
        deadline = time.monotonic() + 120
        while process.poll() is None and rows(killed) < goal and time.monotonic() < deadline:
            time.sleep(rng.random() / 100)
        assert process.poll() is None, "the job ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 0 < rows(killed) < REQUESTS
    assert start(source, killed).wait(timeout=300) == 0

    expected = {json.loads(line)["custom_id"]: line for line in whole.read_text().splitlines()}
    got = [json.loads(line)["custom_id"] for line in killed.read_text().splitlines()]
    assert sorted(got) == sorted(expected)
    assert len(expected) == REQUESTS
    for line in killed.read_text().splitlines():
        row = json.loads(line)
        want = json.loads(expected[row["custom_id"]])
        # The last bits of a log-probability depend on the batch that the row ran in.
        assert take_logprobs(row) == pytest.approx(take_logprobs(want), abs=1e-3)
        assert row == want


def take_logprobs(row: dict[str, Any]) -> list[float]:
    """Removes the log-probabilities from a row, and returns them."""
    taken: list[float] = []
    for choice in row["response"]["body"]["choices"] if row["response"] else []:
        taken += choice["logprobs"].pop("token_logprobs")
        del choice["logprobs"]["top_logprobs"]  # of the same tokens
    return taken
