"""Writes and reads blocks for ever, or for a number of rounds, and tells of each round: a process for tests.

python -m tests.kv.store.writer FOLDER CAPACITY LENGTH KEYS SEED [ROUNDS]
"""

from __future__ import annotations

import functools
import itertools
import random
import sys

from jaxdual.kv.store import FileStore, Outcome
from tests.kv.store.blocks import aligned, content, get, key, result


def main(folder: str, capacity: int, length: int, keys: int, seed: int, rounds: int | None = None) -> None:
    draw = random.Random(seed)
    payload = functools.cache(lambda block: aligned(length, content(block, length)))  # so that it mostly writes
    with FileStore(folder, capacity) as store:
        for number in itertools.count() if rounds is None else range(rounds):
            blocks = [key(draw.randrange(keys)) for _ in range(16)]
            writes = [store.write(block, None, payload(block)) for block in blocks]
            outcomes = {result(write) for write in writes}
            if not outcomes <= {Outcome.OK, Outcome.FULL}:
                raise SystemExit(f"writes ended {outcomes}")
            outcome = get(store, key(draw.randrange(keys)), length)
            if outcome not in (Outcome.OK, Outcome.MISS):
                raise SystemExit(f"a read ended {outcome}")
            print(number, flush=True)
        print("done", store.stats(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
