"""`python -m bench.router_counting`: what a decode step costs more while the routers' choices are counted.

Engines of one model that count nothing, activations, and transitions, too, serve the same requests in the plain loop,
in which a step is over when its tokens are there. They take turns step by step, in an order that changes, so that what
else the machine does meets them alike; compared are the steps of one turn. Where an engine's memory lies makes a
percent or two, so there are two engines of each kind, made in opposite order; how those that count nothing differ is
reported, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.report import header, table, write_json
from jaxdual import LLM, SamplingParams

MODES = ("off", "activations", "transitions")
GOAL = 1.01
_PROMPT = 16  # tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.router_counting", description=__doc__)
    parser.add_argument("--model", default="models/shipped/moe", help="folder of a model with experts")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--sequences", type=int, default=64, help="of a step")
    parser.add_argument("--steps", type=int, default=400, help="of each engine")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    report = header("bench.router_counting") | {"goal": GOAL}
    seconds = measure(options.model, options.load_format, options.sequences, options.steps)
    both = seconds.mean(axis=1)
    report["modes"] = {mode: _figures(both[:, 0], both[:, number]) for number, mode in enumerate(MODES)}
    report["second_off_by_first"] = _figures(seconds[:, 0, 0], seconds[:, 1, 0])
    columns = ["counted", "step ms", "ratio to off", "95 %"]
    rows = [
        [mode, of_mode["step_ms"], f"{of_mode['ratio']:.4f}", "{:.4f} to {:.4f}".format(*of_mode["ratio_95"])]
        for mode, of_mode in report["modes"].items()
    ]
    print(table(columns, rows))
    print(f"the second engine that counts nothing by the first: {report['second_off_by_first']['ratio']:.4f}")
    write_json(options.json, report)
    return 0


def measure(model: str, load_format: str, sequences: int, steps: int) -> np.ndarray:
    """Seconds of decode steps, `[steps, 2, modes]`."""
    places = [(0, number) for number in range(len(MODES))] + [(1, number) for number in reversed(range(len(MODES)))]
    engines = [_engine(model, load_format, sequences, steps, MODES[number]) for _, number in places]
    seconds = np.empty((steps, 2, len(MODES)))
    order = np.random.default_rng(0)
    for turn in range(steps):
        for at in order.permutation(len(places)):
            start = time.perf_counter()
            engines[at].step()
            seconds[(turn, *places[at])] = time.perf_counter() - start
    return seconds


def _engine(model: str, load_format: str, sequences: int, steps: int, mode: str) -> LLM:
    """An engine all of whose sequences decode, for at least so many steps."""
    settings: dict[str, Any] = {"max_num_seqs": sequences, "max_num_batched_tokens": max(512, sequences)}
    llm = LLM(
        model,
        **settings,
        load_format=load_format,
        router_statistics=mode,
        async_scheduling=False,
        max_model_len=_PROMPT + steps + 64,
        seed=0,
    )
    params = SamplingParams(max_tokens=steps + 48, temperature=0, ignore_eos=True)
    rng = np.random.default_rng(0)
    for _ in range(sequences):
        llm.submit({"prompt_token_ids": rng.integers(0, llm.info.vocab_size, _PROMPT).tolist()}, params)
    while llm.stats().num_waiting or llm.stats().generation_tokens < 8 * sequences:
        llm.step()
    return llm


def _figures(before: np.ndarray, seconds: np.ndarray) -> dict[str, Any]:
    ratios = seconds / before
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return {
        "step_ms": float(np.median(seconds)) * 1e3,
        "ratio": float(np.median(ratios)),
        "ratio_95": np.percentile(medians, [2.5, 97.5]).tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
