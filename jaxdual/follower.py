"""`python -m jaxdual.follower`: a further process of an engine whose devices are spread over several.

It joins the engine that is started with the same `--coordinator-address`, drives its share of the devices as the
engine's own process says, and ends with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxdual.engine.build import follower_runner
from jaxdual.engine.followers import Leader
from jaxdual.engine.joining import join
from jaxdual.engine.loading import load_model
from jaxdual.engine.replay import follow


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxdual.follower", description=__doc__)
    parser.add_argument("--coordinator-address", required=True, metavar="HOST:PORT", help="of the engine")
    parser.add_argument("--process-id", required=True, type=int, metavar="NUMBER", help="of this process, from 1")
    parser.add_argument("--join-timeout", type=float, default=300.0, metavar="SECONDS", help="to wait for the others")
    parser.add_argument("--model", metavar="FOLDER", help="where the engine's model is on this machine, if elsewhere")
    options = parser.parse_args(arguments)
    if options.process_id < 1:
        parser.error(f"--process-id {options.process_id} must be at least 1: 0 is the engine's own process")
    try:
        leader, config = join(options.coordinator_address, options.process_id, options.join_timeout)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.model is not None:
        config = dataclasses.replace(config, model=options.model)
    try:
        loaded = load_model(config, leader)
        follow(leader, lambda begin: follower_runner(loaded, config, begin.memory))
    except (Exception, KeyboardInterrupt) as error:
        _give_up(leader, error)
    leader.leave()
    return 0


def _give_up(leader: Leader, error: BaseException) -> NoReturn:
    if isinstance(error, ConnectionError):
        print(f"python -m jaxdual.follower: the engine has ended: {error}", file=sys.stderr)
    elif not isinstance(error, (ValueError, KeyboardInterrupt)):
        traceback.print_exc()
    leader.failed(error)
    sys.stderr.flush()
    os._exit(1)  # an end in peace would have JAX wait for the others


if __name__ == "__main__":
    sys.exit(main())
