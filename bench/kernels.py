"""Speed of the operations of `pallas_kernels`, beside each other's implementations and other libraries.

`python -m bench.kernels --json FILE`. Each named workload is first computed by every implementation and compared with
float32; what is wrong or fails is not timed, and the exit status says so. Then each is timed with inputs that rotate
(`bench.device_clock`). Figures are set against ceilings measured in the same run: bytes per second of a copy, and
floating-point operations per second of a large matrix product. `roofline` is the least time that a workload's bytes and
operations can take by those if all bytes come from memory; `of_roofline` is that over the time measured. It is 1 at
best where inputs rotate out of the caches. Those of a small workload, such as the shipped models', may stay in them:
`rotated_bytes` says how much is read and written until an input comes again, to be set beside the device's L2 cache.

On a CPU only the workloads of the shipped models are run unless others are named. `--seconds` bounds the time:
operations take turns, and workloads that were not reached are missing from the report.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other libraries need memory, too

import jax
import jax.numpy as jnp
import numpy as np

from bench.contenders import CONTENDERS, Contender
from bench.device_clock import Ceilings, ceilings, measure
from bench.operations import Case, in_turns, operations
from bench.report import header, table, write_json

_SHIPPED = ("base_", "small_", "moe_")
_ROTATED_BYTES = 2**28  # several times the L2 cache of a GPU
_MAX_SETS = 16
_REFERENCE = "reference"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status: 1 if a result was wrong or could not be had."""
    options = _parse(arguments)
    chosen = in_turns(operations(), options.op, lambda name: _wanted(name, options.spec))
    if not chosen:
        _say("no workload of that name")
        return 2
    end = time.monotonic() + options.seconds
    report = header("bench.kernels")
    device = jax.devices()[0]
    report["device"] = {"kind": device.device_kind, "platform": device.platform}
    limits = ceilings()
    report["ceilings"] = limits._asdict()
    _say(
        f"{device.device_kind}: copy {limits.copy_bytes_per_second / 1e9:.0f} GB/s, "
        f"{limits.matmul} product {limits.matmul_flops_per_second / 1e12:.2f} TFLOP/s"
    )
    found: dict[str, dict[str, Any]] = {op: {} for op, _, _ in chosen}
    report["operations"] = found
    bad = []
    for op, name, case in chosen:
        if time.monotonic() > end:
            _say(f"no time for {op} {name}")
            continue
        found[op][name] = _measure_case(op, case, options.compare, limits)
        print(f"\n{op} {name}\n{_table(found[op][name])}", flush=True)
        write_json(options.json, report)
        bad += [
            f"{kind.upper()}: {op} {name} {who}"
            for who, one in found[op][name]["by"].items()
            for kind in ("wrong", "failed")
            if kind in one
        ]
    for line in bad:
        _say(line)
    return 1 if bad else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--op", action="append", choices=list(operations()), help="only this; may be repeated")
    parser.add_argument(
        "--spec", action="append", metavar="TEXT", help="only workloads with this in their name; may be repeated"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further workload after so many")
    parser.add_argument(
        "--compare", type=lambda text: text.split(","), metavar="NAMES", help="only these, for example mosaic,xla,cudnn"
    )
    options = parser.parse_args(arguments)
    known = sorted({name for cases in operations().values() for case in cases.values() for name in _ours(case)})
    known += sorted({name for contenders in CONTENDERS.values() for name in contenders})
    unknown = [name for name in options.compare or () if name not in known]
    if unknown:
        parser.error(f"--compare: {unknown} are none of {known}")
    return options


def _wanted(name: str, parts: Sequence[str] | None) -> bool:
    if parts:
        return any(part in name for part in parts)
    return _on_gpu() or name.startswith(_SHIPPED)


def _measure_case(op: str, case: Case, names: Sequence[str] | None, limits: Ceilings) -> dict[str, Any]:
    spec = case.spec
    inputs = inputs_of(case)
    expected = np.asarray(case.expected(inputs[0]), np.float32)
    roofline = limits.seconds(spec.bytes_moved, spec.flops)
    contenders = {name: functools.partial(our_calls, case, name) for name in _ours(case)}
    for name, contender in CONTENDERS.get(op, {}).items():
        contenders[name] = functools.partial(_their_calls, contender, spec.options)
    by: dict[str, dict[str, Any]] = {}
    for name, calls_on in contenders.items():
        if names is None or name in names:
            by[name] = _measure_one(calls_on, inputs, expected, case.tolerance)
            if "us" in by[name]:
                seconds = by[name]["us"] / 1e6
                by[name] |= {
                    "bytes_per_second": spec.bytes_moved / seconds,
                    "flops_per_second": spec.flops / seconds,
                    "of_roofline": roofline / seconds,
                }
        gc.collect()  # what a contender laid out for itself
    report = {
        "bytes": spec.bytes_moved,
        "rotated_bytes": spec.bytes_moved * len(inputs),
        "flops": spec.flops,
        "roofline_us": roofline * 1e6,
        "by": by,
    }
    first = by.get(case.implementations[0], {}).get("us")
    if first is not None:
        others = {name: one["us"] for name, one in by.items() if "us" in one and name != case.implementations[0]}
        report["times_as_fast_as"] = {name: microseconds / first for name, microseconds in others.items()}
    return report


def _ours(case: Case) -> list[str]:
    """Implementations that are timed; the reference is there to be compared with."""
    return [name for name in case.implementations if name != _REFERENCE]


def inputs_of(case: Case) -> list[dict[str, Any]]:
    """Different inputs of a workload, up to 16: enough to be out of the caches when they come again, if it is large."""
    sets = min(_MAX_SETS, max(2, math.ceil(_ROTATED_BYTES / case.spec.bytes_moved))) if _on_gpu() else 2
    make = jax.jit(case.spec.make)
    return [make(jax.random.key(i)) for i in range(sets)]


def our_calls(case: Case, implementation: str, inputs: Sequence[dict[str, Any]]) -> list[Callable[[], Any]]:
    """One of our implementations on each of the inputs; an array that it writes in place it finds again."""
    run = case.call(implementation)
    if case.donated is None:
        return [functools.partial(run, **arrays) for arrays in inputs]
    name = case.donated

    def in_place(arrays: dict[str, Any]) -> Callable[[], Any]:
        held = arrays | {name: jnp.copy(arrays[name])}

        def again() -> Any:
            held[name] = run(**held)
            return held[name]

        return again

    return [in_place(arrays) for arrays in inputs]


def _their_calls(
    contender: Contender, options: dict[str, Any], inputs: Sequence[dict[str, Any]]
) -> list[Callable[[], Any]]:
    return [contender(arrays, options) for arrays in inputs]


def _measure_one(
    calls_on: Callable[[Sequence[dict[str, Any]]], list[Callable[[], Any]]],
    inputs: Sequence[dict[str, Any]],
    expected: np.ndarray[Any, Any],
    tolerance: float,
) -> dict[str, Any]:
    try:
        calls = calls_on(inputs)
        error = error_of(calls[0](), expected)
        if not fits(error, tolerance):
            return {"error": error, "wrong": f"error of {error:.3g}"}
        timing = measure(calls)
    except NotImplementedError as refusal:
        return {"refused": str(refusal)}
    except Exception as failure:  # of a compiler, of a library, or for want of memory: the others are measured still
        return {"failed": f"{type(failure).__name__}: {failure}"}
    clock = "wall" if timing.device is None else "device"
    return {"error": error, "us": timing.seconds * 1e6, "clock": clock, "wall_us": timing.wall * 1e6}


def fits(error: float, tolerance: float) -> bool:
    """Whether a result with this error, as `error_of` has it, may stand; NaN may not."""
    return error <= tolerance


def error_of(found: Any, expected: np.ndarray[Any, Any]) -> float:
    """The largest difference, in parts of what is expected there plus its root mean square; NaN if there is one."""
    if not isinstance(found, jax.Array):  # of torch
        found = found.float().cpu().numpy()
    difference = np.abs(np.asarray(found, np.float32) - expected)
    return float((difference / (np.abs(expected) + np.sqrt(np.mean(np.square(expected))))).max())


def _table(report: Mapping[str, Any]) -> str:
    head = ("", "us", "GB/s", "TFLOP/s", "of roofline", "error", "wall us")
    rows = []
    for name, one in report["by"].items():
        if "us" in one:
            rates = (one["bytes_per_second"] / 1e9, one["flops_per_second"] / 1e12)
            rows.append((name, one["us"], *rates, one["of_roofline"], one["error"], one["wall_us"]))
        else:
            rows.append((name, *[None] * 6))
    reasons = [
        f"  {name}: {kind}: {one[kind]}"
        for name, one in report["by"].items()
        for kind in ("wrong", "refused", "failed")
        if kind in one
    ]
    return "\n".join([table(head, rows), *reasons])


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
