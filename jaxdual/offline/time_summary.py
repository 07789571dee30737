"""Mean and percentiles, as all reports of replays have them."""

from collections.abc import Iterable

import numpy as np


def time_summary(values: Iterable[float | None]) -> dict[str, float] | None:
    """Of what is there; None where nothing is."""
    known = np.array([value for value in values if value is not None], float)
    if not known.size:
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(known, (50, 90, 99)))
    return {"mean": float(known.mean()), "p50": p50, "p90": p90, "p99": p99}
