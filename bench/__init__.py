"""Measurements: `python -m bench.engine` and `python -m bench.serve`."""
