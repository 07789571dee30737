"""Finds the fastest forms of the kernels on this machine's GPU, and keeps them beside the kernels.

`python -m bench.tune --json FILE`. Each named workload is timed in the default form of its kernel and in each that the
kernel lists, if its result is right. Where workloads that the kernel doesn't tell apart differ, the form with the least
sum of slow-downs is taken. A form is kept only if it is faster than the default by more than 2 %. `--adopt FILE` keeps
what such a file says. `--seconds` bounds the time: operations then take turns, and workloads that were not reached are
left as they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.device_clock import measure
from bench.kernels import error_of, fits, inputs_of, our_calls
from bench.operations import Case, in_turns, operations
from bench.report import header, write_json
from pallas_kernels import tuning

_GAIN = 1.02
_DEFAULT = "{}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--op", action="append", choices=list(operations()), help="only this; may be repeated")
    parser.add_argument(
        "--spec", action="append", metavar="TEXT", help="only workloads with this in their name; may be repeated"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further workload after so many")
    parser.add_argument("--adopt", metavar="FILE", type=Path, help="measure nothing, keep what was measured elsewhere")
    options = parser.parse_args(arguments)
    if options.adopt:
        report = json.loads(options.adopt.read_text())
        keep(report["device"], report["forms"])
        return 0
    named = in_turns(operations(), options.op, lambda name: any(part in name for part in options.spec or [""]))
    chosen = [one for one in named if one[2].candidates]
    if not chosen:
        print("no workload of that name", file=sys.stderr)
        return 2
    if jax.default_backend() != "gpu":
        print("no GPU here: nothing to tune for", file=sys.stderr)
        return 2
    report = header("bench.tune") | {"device": jax.devices()[0].device_kind, "times": {}, "forms": {}}
    end = time.monotonic() + options.seconds
    times: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for op, name, case in chosen:
        if time.monotonic() > end:
            print(f"no time for {op} {name}", flush=True)
            continue
        print(op, name, flush=True)
        for workload, by_form in try_forms(case).items():
            times[op][workload].append(by_form)
            print(f"  fastest: {min(by_form, key=by_form.__getitem__)}", flush=True)
        report["times"] = times
        report["forms"] = {
            op: {workload: fastest(each) for workload, each in found.items()} for op, found in times.items()
        }
        write_json(options.json, report)
    keep(report["device"], report["forms"])
    return 0


def try_forms(case: Case) -> dict[str, dict[str, float]]:
    """Seconds by form, by the workload that the kernel takes the case for.

    A form that can't be had or gives something wrong is said and left out; without the default there is nothing to
    compare with, and the result is empty.
    """
    inputs = inputs_of(case)
    expected = np.asarray(case.expected(inputs[0]), np.float32)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for config in (None, *case.candidates):
        form = _DEFAULT if config is None else json.dumps(dataclasses.asdict(config))
        try:
            with tuning.trying(config) as chosen_for:
                calls = our_calls(case, "mosaic", inputs)
                error = error_of(calls[0](), expected)
                if not fits(error, case.tolerance):
                    raise ValueError(f"error of {error:.3g}")
                seconds = measure(calls).seconds
        except Exception as failure:  # of the kernel, of the compiler or of the device: the others are tried still
            print(f"  not {form}: {type(failure).__name__}: {failure}", flush=True)
            if config is None:
                return {}
            continue
        for _, workload in chosen_for:
            found[workload][form] = seconds
    return found


def fastest(times: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Fields of the form that is best for workloads together; empty for the default."""
    forms = set.intersection(*(set(by_form) for by_form in times))
    # In the mean of logarithms: no workload counts more for being longer.
    cost = {form: sum(math.log(by_form[form] / by_form[_DEFAULT]) for by_form in times) / len(times) for form in forms}
    best = min(cost, key=lambda form: (cost[form], form != _DEFAULT))
    fields: dict[str, Any] = json.loads(best) if cost[best] < -math.log(_GAIN) else {}
    return fields


def keep(device: str, forms: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the forms of each operation beside its kernel, in place of what was known of the same workloads."""
    for op, found in forms.items():
        file = tuning.file_of(op, device)
        known = json.loads(file.read_text()) if file.exists() else {}
        forms_now = {workload: form for workload, form in sorted((known | found).items()) if form}
        if forms_now or known:
            write_json(str(file), forms_now)


if __name__ == "__main__":
    sys.exit(main())
